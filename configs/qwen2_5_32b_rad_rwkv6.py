"""Qwen2.5-32B-Instruct to RAD-RWKV6, by the paper's recipe.

    python -m radlads_jax.launch --config configs/qwen2_5_32b_rad_rwkv6.py --workdir runs/qwen2_5_32b_rad_rwkv6

Hardware: 625 GB for weights, gradients, Adam and teacher, activations apart; the paper: 8 MI300X for 2.5 + 27 + 3 h.
Tokens: 100M + 500M + 100M of DCLM in stages 1, 2 and 3,
or, with --config configs/qwen2_5_32b_rad_rwkv6.py:long=true, 100M + 600M in stages 1 and 2a.
Expected (0-shot, student/teacher): lambada 74.2/75.2, mmlu 76.6/81.8, arc_c 60.9/58.7, arc_e 84.3/82.2,
hellaswag 83.0/85.2, piqa 81.2/81.0, winogrande 78.2/72.9.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config(arg: str = "") -> ConfigDict:
    return paper("Qwen/Qwen2.5-32B-Instruct", "rad_rwkv6", arg)
