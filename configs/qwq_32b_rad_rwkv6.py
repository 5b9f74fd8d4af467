"""QwQ-32B to RAD-RWKV6, by the paper's recipe.

    python -m radlads_jax.launch --config configs/qwq_32b_rad_rwkv6.py --workdir runs/qwq_32b_rad_rwkv6

Hardware: 625 GB for weights, gradients, Adam and teacher, activations apart; the paper: 8 MI300X for 2.5 + 27 + 3 h.
Tokens: 100M + 500M + 100M of DCLM in stages 1, 2 and 3,
or, with --config configs/qwq_32b_rad_rwkv6.py:long=true, 100M + 600M in stages 1 and 2a.
Expected (the published model's card; 0-shot, student/teacher, arc_e acc_norm): lambada 66.2/66.8, mmlu 74.3/79.9,
arc_c 56.4/55.6, arc_e 78.4/78.7, hellaswag 83.0/84.1, piqa 80.4/79.8, winogrande 73.2/70.5.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config(arg: str = "") -> ConfigDict:
    return paper("Qwen/QwQ-32B", "rad_rwkv6", arg)
