"""Which tensor of a Hugging Face checkpoint is which parameter: the mixers' tables, read in both directions.

Linear weights are [out, in] on disk and [in, out] here; vectors of the recurrent mixers are [1, 1, d] on disk.
"""

import dataclasses
import itertools

from radlads_jax.models.config import ModelConfig
from radlads_jax.models.spec import Layout
from radlads_jax.models.tensors import layer_tensors, outer_tensors
from radlads_jax.models.tree import ParamPath, keys_of
from radlads_jax.porting.families import FAMILIES


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a tensor on disk lives in the parameter tree: tree[path][index], in this layout."""

    path: ParamPath
    index: tuple[int, ...]
    shape: tuple[int, ...]
    layout: Layout

    @property
    def disk_shape(self) -> tuple[int, ...]:
        return {"same": self.shape, "transposed": self.shape[::-1], "vector": (1, 1, *self.shape)}[self.layout]


def disk_tensors(cfg: ModelConfig) -> dict[str, Location]:
    """Every tensor that a checkpoint of this model holds, by its name on disk."""
    # A student's checkpoint has Hugging Face's usual names, whatever its teacher's family calls them.
    disk_name = FAMILIES[cfg.family].disk_name if cfg.recurrent_mixer is None else str
    tensors = {}
    for tensor in outer_tensors(cfg):
        tensors[disk_name(tensor.name)] = Location(keys_of(tensor.path), (), tensor.shape, tensor.layout)
    for stack, ((mixer, count), start) in enumerate(zip(cfg.stacks, cfg.stack_starts, strict=True)):
        for layer, tensor in itertools.product(range(count), layer_tensors(cfg, mixer)):
            index = (layer,) if tensor.row is None else (layer, tensor.row)
            location = Location(("stacks", stack, *keys_of(tensor.path)), index, tensor.shape, tensor.layout)
            tensors[disk_name(f"model.layers.{start + layer}.{tensor.name}")] = location
    return tensors
