"""Qwen3-8B to Gated DeltaNet with every fourth layer softmax: a student that engines serve as dense Qwen3.5.

    python -m radlads_jax.launch --config configs/qwen3_8b_gdn.py --workdir runs/qwen3_8b_gdn

Hardware: 155 GB for weights, gradients, Adam and teacher, activations apart.
Tokens: the paper's, 100M + 500M + 100M of DCLM in stages 1, 2 and 3,
or, with --config configs/qwen3_8b_gdn.py:long=true, 100M + 600M in stages 1 and 2a.
Expected: nobody has published this conversion. The export's softmax layers are the teacher's to the bit in float32.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config(arg: str = "") -> ConfigDict:
    config = paper("Qwen/Qwen3-8B", "gdn", arg)
    config.student.attention_every = 4
    return config
