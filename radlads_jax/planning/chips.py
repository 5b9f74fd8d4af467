"""The chips that a plan knows: what they do at best, their prices, and the slices that are usually rented."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pallas_kernels import chips


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip(chips.Chip):
    """price: USD an hour, on demand; spot: of one that may be taken away; None where none is known. slices: topologies
    by size, smallest first; for a GPU how many. devices: how many JAX has on one chip; all figures but the prices are
    of one. kernel_cycles: of a kernel on this chip to one on a v6e. step_factor: a step's seconds to what its compiled
    program says; step_spread: the share by which they may still be off (tests/measure/plan_calibration.py).

    Where its clock is 0, no compiler is asked, and a plan is arithmetic alone.
    """

    price: float | None
    spot: float | None = None
    slices: tuple[str, ...] = ()
    devices: int = 1
    kernel_cycles: float = 2.0
    step_factor: float = 1.0
    step_spread: float = 0.15

    @property
    def is_compiled_for(self) -> bool:
        return self.clock > 0


def _rented(name: str, price: float | None, slices: tuple[str, ...], **more: Any) -> Chip:
    return Chip(**vars(chips.CHIPS[name]), price=price, slices=slices, **more)


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
_GPUS = ("1", "2", "4", "8", "16", "32", "64")
# Prices of TPUs as listed for us-central1 and us-east5 without commitment (cloud.google.com/tpu/pricing), on Spot the
# middle of what regions ask, of GPUs the middle of what GPU clouds list for SXM cards (an A100's of 80 GB) in 2026; all
# change: see --price. Factors are of one published run each, v6e's of two (docs/PODS.md); how far another would be off
# is a guess.
CHIPS = {
    "v5e": _rented("v5e", 1.20, _FLAT, step_factor=0.74),
    "v5p": _rented("v5p", 4.20, _CUBES, spot=1.30, step_factor=0.84),
    "v6e": _rented("v6e", 2.70, _FLAT, spot=0.96, kernel_cycles=1.0, step_factor=0.91),
    "tpu7x": _rented("tpu7x", None, _CUBES, devices=2, kernel_cycles=1.0, step_factor=0.83),
    "a100": _rented("a100", 1.30, _GPUS),
    "h100": _rented("h100", 2.75, _GPUS),
    "h200": _rented("h200", 4.10, _GPUS),
    "b200": _rented("b200", 6.00, _GPUS),
}


def known_chip(topology: str) -> str:
    """The chip of a topology; ValueError where it is none of CHIPS."""
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise ValueError(
            f"the topology {topology!r} is not known; expected {', '.join(CHIPS)}, as in v5e:2x2 or h100:8."
        )
    return name


def prices(overrides: Mapping[str, float]) -> dict[str, float | None]:
    """USD a chip-hour by chip, None where none is known; ValueError for one not in CHIPS, or a price below 0."""
    for name, price in overrides.items():
        if name not in CHIPS or not 0 <= price < math.inf:
            raise ValueError(
                f"the price {name}={price} is not known; expected one of {', '.join(CHIPS)} and at least 0."
            )
    return {name: overrides.get(name, chip.price) for name, chip in CHIPS.items()}
