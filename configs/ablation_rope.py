"""Ablation on Qwen2.5-7B-Instruct to RAD-RWKV6: RoPE on r and k, as the teacher has it.

    python -m radlads_jax.launch --config configs/ablation_rope.py --workdir runs/ablation_rope

Hardware: 145 GB for weights, gradients, Adam and teacher, activations apart; the paper: 8 MI300X for 0.75 + 5.5 h.
Tokens: 100M + 500M in stages 1 and 2; the paper's ablations have no stage 3.
Expected (0-shot, this/unchanged student): lambada 67.4/67.5, mmlu 66.1/65.7, arc_c 56.7/56.3, arc_e 81.7/81.4,
hellaswag 78.9/79.0, piqa 79.9/80.3, winogrande 70.6/71.1.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config() -> ConfigDict:
    config = paper("Qwen/Qwen2.5-7B-Instruct", "rad_rwkv6")
    config.stages = ("stage1", "stage2")
    config.student.use_rope = True
    return config
