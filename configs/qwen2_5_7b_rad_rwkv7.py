"""Qwen2.5-7B-Instruct to RAD-RWKV7, by the paper's recipe.

    python -m radlads_jax.launch --config configs/qwen2_5_7b_rad_rwkv7.py --workdir runs/qwen2_5_7b_rad_rwkv7

Hardware: 140 GB for weights, gradients, Adam and teacher, activations apart; the paper: 8 MI300X for
0.75 + 5.5 + 1 h.
Tokens: 100M + 500M + 100M of DCLM in stages 1, 2 and 3,
or, with --config configs/qwen2_5_7b_rad_rwkv7.py:long=true, 100M + 600M in stages 1 and 2a.
Expected (0-shot, student/teacher): lambada 68.4/69.6, mmlu 68.2/71.7, arc_c 55.8/55.0, arc_e 81.7/81.5,
hellaswag 79.3/80.5, piqa 79.8/79.4, winogrande 71.8/71.4.
After stages 1 and 2a: gsm8k 61.4/85.9, humaneval 50.0/79.9.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config(arg: str = "") -> ConfigDict:
    return paper("Qwen/Qwen2.5-7B-Instruct", "rad_rwkv7", arg)
