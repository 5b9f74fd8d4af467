"""Ablation on Qwen2.5-7B-Instruct to RAD-RWKV6: q, k, v and o start fresh in place of the teacher's.

    python -m radlads_jax.launch --config configs/ablation_fresh_qkvo.py --workdir runs/ablation_fresh_qkvo

Hardware: 145 GB for weights, gradients, Adam and teacher, activations apart; the paper: 8 MI300X for 0.75 + 5.5 h.
Tokens: 100M + 500M in stages 1 and 2; the paper's ablations have no stage 3.
Expected: consistently worse, yet still usable; figures not published.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config() -> ConfigDict:
    config = paper("Qwen/Qwen2.5-7B-Instruct", "rad_rwkv6")
    config.stages = ("stage1", "stage2")
    config.student.fresh_qkvo = True
    return config
