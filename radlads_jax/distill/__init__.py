"""Turning a student into its teacher: the stages' losses and the one training step."""
