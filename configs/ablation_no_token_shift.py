"""Ablation on Qwen2.5-7B-Instruct to RAD-RWKV6: without token shift.

    python -m radlads_jax.launch --config configs/ablation_no_token_shift.py --workdir runs/ablation_no_token_shift

Hardware: 145 GB for weights, gradients, Adam and teacher, activations apart; the paper: 8 MI300X for 0.75 + 5.5 h.
Tokens: 100M + 500M in stages 1 and 2; the paper's ablations have no stage 3.
Expected (0-shot, this/unchanged student): lambada 67.1/67.5, mmlu 65.8/65.7, arc_c 55.5/56.3, arc_e 80.4/81.4,
hellaswag 78.7/79.0, piqa 80.4/80.3, winogrande 68.8/71.1.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config() -> ConfigDict:
    config = paper("Qwen/Qwen2.5-7B-Instruct", "rad_rwkv6")
    config.stages = ("stage1", "stage2")
    config.student.token_shift = False
    return config
