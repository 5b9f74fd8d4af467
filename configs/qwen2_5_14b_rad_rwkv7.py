"""Qwen2.5-14B-Instruct to RAD-RWKV7, by the paper's recipe.

    python -m radlads_jax.launch --config configs/qwen2_5_14b_rad_rwkv7.py --workdir runs/qwen2_5_14b_rad_rwkv7

Hardware: 273 GB for weights, gradients, Adam and teacher, activations apart.
Tokens: 100M + 500M + 100M of DCLM in stages 1, 2 and 3,
or, with --config configs/qwen2_5_14b_rad_rwkv7.py:long=true, 100M + 600M in stages 1 and 2a.
Expected: not published.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config(arg: str = "") -> ConfigDict:
    return paper("Qwen/Qwen2.5-14B-Instruct", "rad_rwkv7", arg)
