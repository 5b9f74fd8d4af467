"""Disks, buckets, signals, processes, command lines: what lies beneath."""
