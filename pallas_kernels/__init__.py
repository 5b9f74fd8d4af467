"""The recurrences and the fused head-and-loss: a folder per operation, with its public functions in front."""
