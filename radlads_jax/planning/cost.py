"""The arithmetic of a plan: chips and their prices, a model's own FLOPs, and how long a step takes at best."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from radlads_jax.distill.stages import STAGES, is_recurrent_mixer
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.decoder import abstract_params
from radlads_jax.planning.hlo import Counts
from radlads_jax.train_state import path_leaves

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: dense bfloat16 a second. hbm_rate, link_rate: bytes a second. price: USD an hour, on demand.

    link_rate: both directions of a ring over one axis of the torus, the least that a collective gets. usable: bytes of
    HBM that a program may take. kernel_cycles: of a kernel on this chip to one on a v6e.
    """

    flops: float
    hbm_rate: float
    link_rate: float
    clock: float
    usable: float
    price: float
    kernel_cycles: float = 2.0


# FLOPs, HBM and clocks from the maker's data sheets, link rates as one-way 45 GB/s (v5e) and 90 GB/s a link, prices as
# listed for us-central1 and us-east5 without commitment (cloud.google.com/tpu/pricing); they change: see --price.
CHIPS = {
    "v5e": Chip(197e12, 819e9, 90e9, 1.5e9, 15.75 * GIB, 1.20),
    "v5p": Chip(459e12, 2765e9, 180e9, 1.75e9, 95.0 * GIB, 4.20),
    "v6e": Chip(918e12, 1640e9, 180e9, 1.75e9, 31.25 * GIB, 2.70, kernel_cycles=1.0),
}
# Cycles of a v6e for a token and 128 columns of r: `pallas_kernels.static_cost` at B=1 T=8192 H=16 K=128, bfloat16, by
# kernel; a backward is the forward and backward less the forward.
KERNEL_CYCLES = {"wkv7_forward": 3.6, "wkv7_backward": 6.7, "wkv6_forward": 3.0, "wkv6_backward": 5.7}
KERNEL_COLUMNS = 128
ASSUMPTIONS = (
    "step = max(compiler's cycles / clock, FLOPs / peak, HBM bytes / rate) + what links can not do beside it; cycles "
    "are the TPU compiler's static estimates of its own operations, which tend to be 1.3 to 1.8 times too many.",
    "the recurrence runs as this project's TPU kernels, at their static cycles on a v6e, twice as many on v5e and v5p.",
    "links: one ring over one torus axis; collectives that the compiler started early run beside the computation.",
    "hours are of training steps alone: no compilation, loading, checkpoints, evaluation or preemption.",
)


def matmul_weights(cfg: ModelConfig, *, mixers_of: ModelConfig | None = None) -> int:
    """Elements of all matrices that a token is multiplied with; of the recurrent mixers alone with `mixers_of`."""
    total = 0
    for path, leaf in path_leaves(abstract_params(cfg)).items():
        if mixers_of is not None and not is_recurrent_mixer(path, mixers_of):
            continue
        name = path.rsplit("/", 1)[-1]
        if name in ("kernel", "a", "b") or (name == "embedding" and cfg.tie_embeddings):
            total += leaf.size
    return total


def mixing_flops(cfg: ModelConfig, seq_len: int, *, recurrent_only: bool = False) -> float:
    """Of a token's forward pass through scores or states; causal attention sees half the row.

    attention 2 T d; wkv6 5 K d and wkv7 9 K d (decay, removal, two outer products, output), d = heads x head size.
    """
    width = cfg.num_heads * cfg.head_dim
    each = {"attention": 2.0 * seq_len * width, "rad_rwkv6": 5.0 * cfg.head_dim * width}
    each["rad_rwkv7"] = 9.0 * cfg.head_dim * width
    return sum(n * each[mixer] for mixer, n in cfg.stacks if not (recurrent_only and mixer == "attention"))


def model_flops(student: ModelConfig, teacher: ModelConfig, name: str, seq_len: int, *, remat: bool = False) -> float:
    """Of a token in a stage's training step: what trains forward and (twice that) backward, its teacher forward.

    remat: with the one forward pass that is computed again.
    """
    passes = 4 if remat else 3
    whole_teacher = 2.0 * matmul_weights(teacher) + mixing_flops(teacher, seq_len)
    if name == "stage1":
        head = 2.0 * teacher.vocab_size * teacher.hidden_size
        mixers = 2.0 * matmul_weights(student, mixers_of=student) + mixing_flops(student, seq_len, recurrent_only=True)
        return whole_teacher - head + passes * mixers
    own = 2.0 * matmul_weights(student) + mixing_flops(student, seq_len)
    return passes * own + (whole_teacher if STAGES[name].needs_teacher else 0.0)


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        part = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        size = leaf.dtype.itemsize
        for length in part:
            size *= length
        total += size
    return total


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what would bound it; step: all together; bound: the largest."""

    compute: float
    memory: float
    network: float
    step: float
    bound: str


def step_time(chip: Chip, counts: Counts) -> StepTime:
    """See ASSUMPTIONS."""
    own = sum(KERNEL_CYCLES[name] * elements / KERNEL_COLUMNS for name, elements in counts.kernels.items())
    compute = max((counts.cycles + chip.kernel_cycles * own) / chip.clock, counts.flops / chip.flops)
    memory, network = counts.hbm_bytes / chip.hbm_rate, counts.all_link_bytes / chip.link_rate
    exposed = counts.exposed_link_bytes / chip.link_rate
    busy = max(compute, memory)
    step = busy + exposed + max(0.0, network - exposed - busy)
    parts = {"compute": compute, "memory": memory, "network": network}
    return StepTime(compute, memory, network, step, max(parts, key=lambda name: parts[name]))


def prices(given: Mapping[str, float]) -> dict[str, float]:
    """USD a chip-hour by generation. Raises ValueError for a chip that is not in CHIPS, or a price below 0."""
    for name, price in given.items():
        if name not in CHIPS or price < 0:
            raise ValueError(
                f"the price {name}={price} is not known; expected one of {', '.join(CHIPS)} and at least 0."
            )
    return {name: given.get(name, chip.price) for name, chip in CHIPS.items()}
