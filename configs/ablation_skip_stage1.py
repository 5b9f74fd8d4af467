"""Ablation on Qwen2.5-7B-Instruct to RAD-RWKV6: stage 1 skipped, at equal tokens.

    python -m radlads_jax.launch --config configs/ablation_skip_stage1.py --workdir runs/ablation_skip_stage1

Hardware: 145 GB for weights, gradients, Adam and teacher, activations apart.
Tokens: 600M in stage 2.
Expected: much worse, the loss levels off higher however long it trains; figures not published.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config() -> ConfigDict:
    config = paper("Qwen/Qwen2.5-7B-Instruct", "rad_rwkv6")
    config.stages = ("stage2",)
    config.stage2.tokens = 600_000_000
    return config
