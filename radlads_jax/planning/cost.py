"""The arithmetic of a plan: a model's own FLOPs, and how long a step takes at best."""

import dataclasses
from collections.abc import Mapping

from radlads_jax.distill.stages import STAGES, is_aligned_mixer
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.decoder import abstract_params
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.tensors import tensor_of
from radlads_jax.models.tree import path_leaves
from radlads_jax.planning.chips import Chip
from radlads_jax.planning.hlo import Counts

_KERNEL_COLUMNS = 128
# Of an hour, at best and at worst, what loading and compiling take at a start; the share of the steps that saving takes
# or that is trained again after a restart, of which there is one a day.
_START_HOURS = (0.05, 0.25)
_LOST = 0.05
_STEPS_ALONE = (
    "hours, chip-hours and USD are of training steps alone; the range of USD adds to what the steps may take less or "
    f"more {60 * _START_HOURS[0]:.0f} to {60 * _START_HOURS[1]:.0f} minutes of a start, and at most another one a day "
    f"and {_LOST:.0%} of the steps, for saving and for what is trained again. No evaluation."
)
# Of the peak, where nothing was compiled: what well-kept training of dense models gets.
_EFFICIENCY = 0.4
# Of the library's attention, for an element of q and a position of its row: of two products forward, of seven backward,
# of which those of dk and dv are counted with dq's; keys behind a query are skipped. Of the peak: no compiler and no
# simulation says it.
_ATTENTION_FLOPS = {"splash_mha_fwd": 2.0, "splash_mha_dq": 7.0, "splash_mha_dkv": 0.0}
_ATTENTION_EFFICIENCY = 0.45
ASSUMPTIONS = (
    "step = factor x (max(compiler's cycles / clock, FLOPs / peak, HBM bytes / rate) + what links do alone); "
    "cycles are the TPU compiler's static estimates of its own operations, the factor is of a published run.",
    "the recurrence runs as this project's TPU kernels, at their static cycles on a v6e, twice as many on v5e and v5p.",
    f"attention from 2,048 tokens a row on is the library's kernel, at {_ATTENTION_EFFICIENCY:.0%} of the peak.",
    "links: one ring over one torus axis, at its full rate; a collective runs beside what the compiler scheduled "
    "between its start and its end.",
    _STEPS_ALONE,
)
ASSUMPTIONS_UNCOMPILED = (
    "nothing was compiled: FLOPs are the model's own, with remat full one forward pass computed again, at "
    f"{_EFFICIENCY:.0%} of the peak (in float32, TF32's, of half of it); memory is parameters, optimizer, gradients "
    "and teacher as they are split, and activations counted by hand.",
    _STEPS_ALONE,
)


def matmul_weights(cfg: ModelConfig, *, mixers_of: ModelConfig | None = None) -> int:
    """Elements of all matrices that a token is multiplied with; of aligned mixers alone with `mixers_of`."""
    total = 0
    for path, leaf in path_leaves(abstract_params(cfg)).items():
        if mixers_of is not None and not is_aligned_mixer(path, mixers_of):
            continue
        tensor = tensor_of(cfg, path)
        assert tensor is not None, path
        if tensor.multiplies or (path == "embed/embedding" and cfg.tie_embeddings):
            total += leaf.size
    return total


def first_matrices(cfg: ModelConfig) -> int:
    """Elements of the aligned layers' matrices that what a mixer reads is multiplied with."""
    return sum(
        leaf.size
        for path, leaf in path_leaves(abstract_params(cfg)).items()
        if is_aligned_mixer(path, cfg) and (tensor := tensor_of(cfg, path)) and tensor.multiplies == "input"
    )


def mixing_flops(cfg: ModelConfig, seq_len: int, *, aligned_only: bool = False) -> float:
    """Of a token's forward pass through scores or states; aligned_only: of the layers that a student aligns."""
    return sum(
        n * MIXERS[mixer].flops(cfg, seq_len)
        for stack, (mixer, n) in enumerate(cfg.stacks)
        if cfg.is_aligned(stack) or not aligned_only
    )


def model_flops(
    student: ModelConfig, teacher: ModelConfig, name: str, seq_len: int, *, remat: bool = False, stored: bool = False
) -> float:
    """Of a token in a stage's training step: what trains forward and (twice that) backward, its teacher forward.

    A stage that runs mixers beside the teacher's layers has no use for the gradient of what a mixer reads. remat: with
    the layers' one forward pass that is computed again, but for the head: its loss keeps what it needs. stored: the
    teacher's logits are read, not computed.
    """
    if (own_count := STAGES[name].flops) is not None:
        return own_count(student, teacher, seq_len)
    head = 2.0 * teacher.vocab_size * teacher.hidden_size
    whole_teacher = 2.0 * matmul_weights(teacher) + mixing_flops(teacher, seq_len)
    if not STAGES[name].whole_student:
        mixers = 2.0 * matmul_weights(student, mixers_of=student) + mixing_flops(student, seq_len, aligned_only=True)
        return whole_teacher - head + (4 if remat else 3) * mixers - 2.0 * first_matrices(student)
    own = 2.0 * matmul_weights(student) + mixing_flops(student, seq_len)
    again = own - head if remat else 0.0
    return 3 * own + again + (whole_teacher if STAGES[name].needs_teacher and not stored else 0.0)


def rented_hours(hours: float, spread: float) -> tuple[float, float]:
    """What a stage takes at least and at most, by its steps' hours and the share by which these may be off."""
    restarts = hours / 24
    least = (1 - spread) * hours + _START_HOURS[0]
    return least, (1 + spread) * (1 + _LOST) * hours + _START_HOURS[1] * (1 + restarts)


@dataclasses.dataclass(frozen=True)
class _StepTime:
    """Seconds of one step, by what would bound it; step: all together; bound: the largest; exposed: of links, what
    nothing runs beside.
    """

    compute: float
    memory: float
    network: float
    step: float
    bound: str
    exposed: float


def kernel_seconds(chip: Chip, name: str, work: float) -> float:
    """Of a kernel, by what it computes (`hlo.Operation.work`)."""
    if name in _ATTENTION_FLOPS:
        return attention_flops({name: work}) / (_ATTENTION_EFFICIENCY * chip.flops)
    cycles = {name: each for spec in MIXERS.values() if spec.operator for name, each in spec.operator.cycles.items()}
    return chip.kernel_cycles * cycles[name] * work / _KERNEL_COLUMNS / chip.clock


def attention_flops(kernels: Mapping[str, float]) -> float:
    """Of the library's attention among a program's kernels (`hlo.Counts.kernels`)."""
    return sum(each * kernels.get(name, 0.0) for name, each in _ATTENTION_FLOPS.items())


def step_time(chip: Chip, counts: Counts) -> _StepTime:
    """See ASSUMPTIONS."""
    own = sum(kernel_seconds(chip, name, work) for name, work in counts.kernels.items())
    compute = max(counts.cycles / chip.clock + own, counts.flops / chip.flops)
    memory, network = counts.hbm_bytes / chip.hbm_rate, counts.all_link_bytes / chip.link_rate
    exposed = counts.exposed_link_bytes / chip.link_rate
    for received, beside, times in counts.begun:
        exposed += times * max(0.0, received / chip.link_rate - beside / chip.clock)
    busy = max(compute, memory)
    step = busy + exposed + max(0.0, network - exposed - busy)
    parts = {"compute": compute, "memory": memory, "network": network}
    return _StepTime(compute, memory, network, step, max(parts, key=lambda name: parts[name]), exposed)


def step_time_uncompiled(chip: Chip, flops: float, dtype: str) -> _StepTime:
    """See ASSUMPTIONS_UNCOMPILED."""
    peak = chip.flops / (1 if dtype == "bfloat16" or chip.is_compiled_for else 2)
    seconds = flops / (_EFFICIENCY * peak)
    return _StepTime(seconds, 0.0, 0.0, seconds, "compute", 0.0)
