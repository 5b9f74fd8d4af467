"""Qwen2.5-7B-Instruct to Gated DeltaNet with every fourth layer softmax: engines serve it as dense Qwen3.5.

    python -m radlads_jax.launch --config configs/qwen2_5_7b_gdn.py --workdir runs/qwen2_5_7b_gdn

Hardware: 141 GB for weights, gradients, Adam and teacher, activations apart.
Tokens: the paper's, 100M + 500M + 100M of DCLM in stages 1, 2 and 3,
or, with --config configs/qwen2_5_7b_gdn.py:long=true, 100M + 600M in stages 1 and 2a.
Expected: nobody has published this conversion. The teacher has no norms of q and k: in the export the kept layers'
heads are of twice the size, and so is their cache.
"""

from ml_collections import ConfigDict

from radlads_jax.recipes import paper


def get_config(arg: str = "") -> ConfigDict:
    config = paper("Qwen/Qwen2.5-7B-Instruct", "gdn", arg)
    config.student.attention_every = 4
    return config
