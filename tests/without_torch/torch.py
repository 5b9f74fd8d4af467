"""Stands before torch in the processes that tests start: a user has none, and it takes seconds to import."""

raise ImportError("torch is there for the tests' references alone")
