"""Qwen2.5-72B-Instruct to RAD-RWKV7, by the paper's recipe.

    python -m radlads_jax.launch --config configs/qwen2_5_72b_rad_rwkv7.py --workdir runs/qwen2_5_72b_rad_rwkv7

Hardware: 1335 GB for weights, gradients, Adam and teacher, activations apart; the paper: 8 MI300X for 7.5 + 54 + 6 h.
Tokens: 100M + 500M + 100M of DCLM in stages 1, 2 and 3,
or, with --config configs/qwen2_5_72b_rad_rwkv7.py:long=true, 100M + 600M in stages 1 and 2a.
Expected: not published.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config(arg: str = "") -> ConfigDict:
    return paper("Qwen/Qwen2.5-72B-Instruct", "rad_rwkv7", arg, tensor=4)
