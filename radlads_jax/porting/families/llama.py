"""Llama 2 and 3, and what is written in their format, as SmolLM2 (transformers' LlamaConfig)."""

from radlads_jax.porting.families.family import Family, attention_bias

FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    max_positions=2048,
    biases=attention_bias,
    keys=lambda cfg: {"attention_bias": cfg.qkv_bias},
)
