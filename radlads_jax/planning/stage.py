"""One stage of a run on one mesh: what its compiled step needs and does, and what that costs.

A record is what the compiler said, a document for JSON; `priced` turns it into hours and USD.
"""

import dataclasses
import re
import time
from typing import Any

import jax

from pallas_kernels import dispatch
from radlads_jax.config import RATE_FACTORS
from radlads_jax.distill import mesh as mesh_lib
from radlads_jax.distill.program import StagePlan, abstract_arguments, make_step
from radlads_jax.planning import cost, hlo, memory
from radlads_jax.planning.chips import Chip

_HBM_OOM = re.compile(r"([\d.]+)([KMGT])\) exceeds available HBM|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
BILLS = ("usd", "usd_low", "usd_high", "usd_spot", "usd_counted")
_TIMES = ("raw_step_seconds", "step_seconds", "tokens_per_second", "mfu", "bound", "hours", "chip_hours")


def by_arithmetic(plan: StagePlan) -> dict[str, Any]:
    """What is known of a stage on one device before anything is compiled: the model's FLOPs, and bytes by hand.

    The compiler has so far needed more bytes than this count each time.
    """
    recipe, mesh = plan.recipe, plan.mesh
    assert mesh is not None
    state, frozen, weights, _ = abstract_arguments(plan)
    tokens = recipe.tokens_per_step
    models = (plan.student, plan.teacher, plan.name, recipe.seq_len)
    flops = {
        key: tokens * cost.model_flops(*models, remat=remat, stored=plan.reads_logits) / mesh.size
        for key, remat in (("model_flops", False), ("ideal_flops", recipe.remat == "full"))
    }
    held = {
        "parameter_bytes": memory.shard_bytes((state.params, frozen)),
        "optimizer_bytes": memory.shard_bytes(state.opt_state),
        "teacher_bytes": memory.shard_bytes(weights),
    }
    gradients = memory.shard_bytes(state.params)
    needed = memory.temporary_bytes(recipe, plan.student, gradients, mesh, whole_student=plan.stage.whole_student)
    parts = mesh_lib.batch_parts(recipe, mesh)
    steps = recipe.steps + (len(RATE_FACTORS) * recipe.trial_steps if recipe.sweep else 0)
    sizes = {"name": plan.name, "steps": steps, "tokens_per_step": tokens, "accumulate": parts}
    sizes["dtype"] = plan.student.dtype
    temporary = sum(needed.values())
    by_hand = {"temp_bytes_by_hand": temporary, "peak_bytes_by_hand": sum(held.values()) + temporary}
    return sizes | held | flops | by_hand


def compile_step(plan: StagePlan) -> jax.stages.Compiled:
    """A stage's step by the TPU compiler; JaxRuntimeError where it does not fit."""
    arguments = abstract_arguments(plan)
    with dispatch.traced_for("tpu"):
        lowered = make_step(plan).lower(*arguments)
    return lowered.compile()


def text_of(program: jax.stages.Compiled) -> str:
    """Its optimised HLO."""
    text = program.as_text()
    assert text is not None  # the TPU compiler gives it
    return text


def compiled(plan: StagePlan) -> dict[str, Any]:
    """What the TPU compiler says of a stage's step: peak and temporary bytes, counts; of what does not fit the peak."""
    started = time.monotonic()
    try:
        program = compile_step(plan)
    except jax.errors.JaxRuntimeError as error:
        peak = oom_bytes(str(error))
        if peak is None:
            raise
        return {"peak_bytes": peak, "temp_bytes": None, "counts": None, "compile_seconds": time.monotonic() - started}
    seconds = time.monotonic() - started
    sizes = program.memory_analysis()
    peak = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return {
        "peak_bytes": peak + sizes.temp_size_in_bytes,
        "temp_bytes": sizes.temp_size_in_bytes,
        "counts": dataclasses.asdict(hlo.count(text_of(program))),
        "compile_seconds": seconds,
    }


def uncompiled(record: dict[str, Any]) -> dict[str, Any]:
    """In the place of `compiled`, for a chip without a compiler here, or what can not fit: all by hand."""
    counted = {"peak_bytes": record["peak_bytes_by_hand"], "temp_bytes": record["temp_bytes_by_hand"]}
    return counted | {"counts": None, "compile_seconds": 0.0}


def priced(record: dict[str, Any], chip: Chip, price: float | None, chips: int) -> dict[str, Any]:
    """The record with whether it fits, and where it does how long it takes and what that costs.

    raw_step_seconds: before the chip's factor. usd, usd_spot: of the steps; usd_low, usd_high: with what a chip's times
    may be off by, starts, saves and restarts (cost.ASSUMPTIONS); None where no such price is known. usd_counted: by
    FLOPs alone, whether or not it was compiled: what chips are ranked by.
    """
    fits = record["peak_bytes"] <= chip.usable
    if not fits:
        return record | {"fits": False} | dict.fromkeys((*_TIMES, *BILLS))
    if record["counts"] is None:
        timed, done, factor = cost.step_time_uncompiled(chip, record["ideal_flops"], record["dtype"]), {}, 1.0
    else:
        # A file of results has lists.
        begun = [tuple(map(float, transfer)) for transfer in record["counts"]["begun"]]
        counts = hlo.Counts(**record["counts"] | {"begun": begun})
        timed, factor = cost.step_time(chip, counts), chip.step_factor
        done = {
            "compiled_flops": counts.flops + cost.attention_flops(counts.kernels),
            "hbm_bytes": counts.hbm_bytes,
            "link_bytes": counts.link_bytes,
            "exposed_link_bytes": counts.exposed_link_bytes,
            "loops_of_unknown_length": counts.unknown_loops,
            "compute_seconds": timed.compute,
            "memory_seconds": timed.memory,
            "network_seconds": timed.network,
        }
    counted = cost.step_time_uncompiled(chip, record["ideal_flops"], record["dtype"]).step
    seconds = factor * timed.step
    hours = seconds * record["steps"] / 3600
    low, high = cost.rented_hours(hours, chip.step_spread)
    return (
        record
        | done
        | {
            "fits": True,
            "raw_step_seconds": timed.step,
            "step_seconds": seconds,
            "tokens_per_second": record["tokens_per_step"] / seconds,
            "mfu": record["model_flops"] / (seconds * chip.flops),
            "bound": timed.bound,
            "hours": hours,
            "chip_hours": hours * chips,
            "usd": _bill(hours * chips, price),
            "usd_low": _bill(low * chips, price),
            "usd_high": _bill(high * chips, price),
            "usd_spot": _bill(hours * chips, chip.spot),
            "usd_counted": _bill(counted * record["steps"] / 3600 * chips, price),
        }
    )


def _bill(chip_hours: float, price: float | None) -> float | None:
    return None if price is None else chip_hours * price


def oom_bytes(message: str) -> int | None:
    """What a program would have needed, from the compiler's refusal; None where it refused for another reason."""
    match = _HBM_OOM.search(message)
    if match is None:
        return None
    number, unit = (group for group in match.groups() if group)
    return int(float(number) * _UNITS[unit])
