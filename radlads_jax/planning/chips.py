"""The chips that a plan knows: their rates, memory and prices, and the slices that are usually rented."""

import dataclasses
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: dense bfloat16 a second. usable: bytes of HBM that a program may take. price: USD an hour, on demand.
    slices: topologies by size, smallest first; for a GPU how many. hbm_rate, link_rate: bytes a second. clock: of a
    TPU's cores; 0 where no compiler is asked, and a plan is arithmetic alone.

    link_rate: both directions of a ring over one axis of the torus, the least that a collective gets. kernel_cycles:
    of a kernel on this chip to one on a v6e.
    """

    flops: float
    usable: float
    price: float
    slices: tuple[str, ...] = ()
    hbm_rate: float = 0.0
    link_rate: float = 0.0
    clock: float = 0.0
    kernel_cycles: float = 2.0

    @property
    def is_compiled_for(self) -> bool:
        return self.clock > 0


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
_GPUS = ("1", "2", "4", "8", "16", "32", "64")
# FLOPs, HBM and clocks from the makers' data sheets, link rates as one-way 45 GB/s (v5e) and 90 GB/s a link. Prices of
# TPUs as listed for us-central1 and us-east5 without commitment (cloud.google.com/tpu/pricing), of GPUs the middle of
# what GPU clouds list for SXM cards with 80 GB early in 2026; all of them change: see --price.
CHIPS = {
    "v5e": Chip(197e12, 15.75 * GIB, 1.20, _FLAT, 819e9, 90e9, 1.5e9),
    "v5p": Chip(459e12, 95.0 * GIB, 4.20, _CUBES, 2765e9, 180e9, 1.75e9),
    "v6e": Chip(918e12, 31.25 * GIB, 2.70, _FLAT, 1640e9, 180e9, 1.75e9, kernel_cycles=1.0),
    "a100": Chip(312e12, 76.0 * GIB, 2.00, _GPUS),
    "h100": Chip(989e12, 76.0 * GIB, 3.00, _GPUS),
}


def known_chip(topology: str) -> str:
    """The chip of a topology; ValueError where it is none of CHIPS."""
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise ValueError(
            f"the topology {topology!r} is not known; expected {', '.join(CHIPS)}, as in v5e:2x2 or h100:8."
        )
    return name


def prices(overrides: Mapping[str, float]) -> dict[str, float]:
    """USD a chip-hour by chip. Raises ValueError for a chip that is not in CHIPS, or a price below 0."""
    for name, price in overrides.items():
        if name not in CHIPS or price < 0:
            raise ValueError(
                f"the price {name}={price} is not known; expected one of {', '.join(CHIPS)} and at least 0."
            )
    return {name: overrides.get(name, chip.price) for name, chip in CHIPS.items()}
