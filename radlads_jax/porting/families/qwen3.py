"""Qwen3: RMSNorm of every head's query and key, heads of a size of their own (transformers' Qwen3Config)."""

from radlads_jax.porting.families.family import Family, attention_bias

FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    max_positions=32768,
    kv_heads=32,
    head_dim=128,
    qk_norm=True,
    biases=attention_bias,
    keys=lambda cfg: {"attention_bias": cfg.qkv_bias, "head_dim": cfg.head_dim},
)
