"""The demo: a small real model, shipped with the repository, converted to RAD-RWKV7 on a laptop's CPU in minutes.

python -m radlads_jax.launch --config configs/demo.py --workdir runs/demo
"""

from ml_collections import ConfigDict

from radlads_jax.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.dtype = "float32"
    config.teacher.path = "configs/demo_teacher"
    config.teacher.dtype = "float32"
    config.data.source = "synthetic"
    config.data.seed = 1
    config.data.documents = 20_000
    config.export.dtype = "float32"
    return config
