"""An export format as a stranger would add it: float tensors under our own paths, and a config.json of three keys."""

import functools

import numpy as np

from radlads_jax.porting.safetensors_write import PlannedTensor
from radlads_jax.porting.writers.writer import Writer


def _tensors(flat, cfg, dtype):
    del cfg
    return [
        PlannedTensor(
            ".".join(map(str, path)), value.shape, np.dtype(dtype or value.dtype), functools.partial(np.asarray, value)
        )
        for path, value in flat.items()
        if path[0] != "head"
    ]


WRITER = Writer(
    "plain",
    tensors=_tensors,
    config=lambda cfg, base: {"mixer": cfg.recurrent_mixer, "layers": cfg.num_layers, "width": cfg.hidden_size},
    obstacles=lambda cfg, directory: [f"{cfg.num_layers} layers"] if cfg.num_layers > 2 else [],
    expected="a model of two layers",
)
