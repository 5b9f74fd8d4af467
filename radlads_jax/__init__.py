"""Distillation of softmax-attention language models into recurrent ones, in JAX."""

import os

# transformers serves tokenizers here; that torch is missing is no news to whoever runs this.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
