"""Distillation of softmax-attention language models into recurrent ones, in JAX."""
