"""Recurrences, softmax attention, head and loss in one: a folder an operation, with its public functions in front."""
