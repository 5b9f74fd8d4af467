"""Qwen2.5-72B-Instruct to RAD-RWKV6, by the paper's recipe.

    python -m radlads_jax.launch --config configs/qwen2_5_72b_rad_rwkv6.py --workdir runs/qwen2_5_72b_rad_rwkv6

Hardware: 1415 GB for weights, gradients, Adam and teacher, activations apart; the paper: 8 MI300X for 7.5 + 54 + 6 h.
Tokens: 100M + 500M + 100M of DCLM in stages 1, 2 and 3,
or, with --config configs/qwen2_5_72b_rad_rwkv6.py:long=true, 100M + 600M in stages 1 and 2a.
Expected (0-shot, student/teacher): lambada 75.4/75.1, mmlu 77.5/83.4, arc_c 63.8/63.2, arc_e 86.5/85.9,
hellaswag 85.7/87.4, piqa 82.5/83.6, winogrande 79.6/76.3.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config(arg: str = "") -> ConfigDict:
    return paper("Qwen/Qwen2.5-72B-Instruct", "rad_rwkv6", arg, tensor=4)
