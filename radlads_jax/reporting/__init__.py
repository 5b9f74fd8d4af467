"""The page of a run: its log read, its charts, its tables."""
