"""Torch files that an export carries, so that transformers can run it; they import nothing of this package."""
