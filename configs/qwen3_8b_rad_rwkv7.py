"""Qwen3-8B to RAD-RWKV7, by the paper's recipe.

    python -m radlads_jax.launch --config configs/qwen3_8b_rad_rwkv7.py --workdir runs/qwen3_8b_rad_rwkv7

Hardware: 152 GB for weights, gradients, Adam and teacher, activations apart.
Tokens: 100M + 500M + 100M of DCLM in stages 1, 2 and 3,
or, with --config configs/qwen3_8b_rad_rwkv7.py:long=true, 100M + 600M in stages 1 and 2a.
Expected (minerva_math, student/teacher): 25.9/41.4 in 1024 tokens, 27.6/59.9 in 2048; others not published. On DCLM
alone it loops while reasoning; the paper mixed in 10% OpenThoughts against that.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config(arg: str = "") -> ConfigDict:
    return paper("Qwen/Qwen3-8B", "rad_rwkv7", arg)
