"""Text from a model: the compiled loop, sampling, text as it comes, a model from any directory."""
