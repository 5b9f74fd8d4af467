"""A run and what it writes: its parts, the checks before it, the loop, what comes after, checkpoints, metrics."""
