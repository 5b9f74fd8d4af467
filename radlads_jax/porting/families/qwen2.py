"""Qwen2 and Qwen2.5: biases of q, k and v; sizes up to 3B tie their embeddings (transformers' Qwen2Config)."""

from radlads_jax.porting.families.family import Family

FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    max_positions=32768,
    kv_heads=32,
    biases=lambda keys: (True, False),
)
