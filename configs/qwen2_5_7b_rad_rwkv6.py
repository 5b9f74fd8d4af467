"""Qwen2.5-7B-Instruct to RAD-RWKV6, by the paper's recipe.

    python -m radlads_jax.launch --config configs/qwen2_5_7b_rad_rwkv6.py --workdir runs/qwen2_5_7b_rad_rwkv6

Hardware: 145 GB for weights, gradients, Adam and teacher, activations apart; the paper: 8 MI300X for
0.75 + 5.5 + 1 h.
Tokens: 100M + 500M + 100M of DCLM in stages 1, 2 and 3,
or, with --config configs/qwen2_5_7b_rad_rwkv6.py:long=true, 100M + 600M in stages 1 and 2a.
Expected (0-shot, student/teacher): lambada 67.5/69.6, mmlu 65.7/71.7, arc_c 56.3/55.0, arc_e 81.4/81.5,
hellaswag 79.0/80.5, piqa 80.3/79.4, winogrande 71.1/71.4.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config(arg: str = "") -> ConfigDict:
    return paper("Qwen/Qwen2.5-7B-Instruct", "rad_rwkv6", arg)
