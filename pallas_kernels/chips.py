"""What chips do at best, by their makers: the one table that kernels, plans and a run's MFU are held against."""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one JAX device. flops: dense bfloat16 a second. usable: bytes of memory that a program may take. hbm_rate,
    link_rate: bytes a second. clock: Hz of a TPU's cores. kinds: what JAX calls the device, or how its name begins. 0
    where nothing asks for it.

    link_rate: both directions of a ring over one axis of the torus, the least that a collective gets.
    """

    flops: float
    usable: float = 0.0
    hbm_rate: float = 0.0
    link_rate: float = 0.0
    clock: float = 0.0
    kinds: tuple[str, ...] = ()


# TPUs: docs.cloud.google.com/tpu/docs/v5e and its kin; a TPU7x chip is two devices, and a ring over its links goes
# through both. Clocks follow from the operations a cycle of the MXUs, links are 45 GB/s one way (v5e) or 90, and the
# compiler keeps a part of a GiB of memory for itself.
# GPUs: NVIDIA's data sheets, SXM cards without sparsity.
CHIPS = {
    "v4": Chip(275e12, kinds=("TPU v4",)),
    "v5e": Chip(197e12, 15.75 * _GIB, 819e9, 90e9, 1.5e9, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(459e12, 95.0 * _GIB, 2765e9, 180e9, 1.75e9, ("TPU v5", "TPU v5p")),
    "v6e": Chip(918e12, 31.25 * _GIB, 1638e9, 180e9, 1.75e9, ("TPU v6 lite", "TPU v6e")),
    "tpu7x": Chip(1153.5e12, 94.75 * _GIB, 3690e9, 180e9, 2.2e9, ("TPU7x",)),
    "a100": Chip(312e12, 76.0 * _GIB, kinds=("NVIDIA A100",)),
    "h100-pcie": Chip(756e12, kinds=("NVIDIA H100 PCIe",)),
    "h100": Chip(989e12, 76.0 * _GIB, kinds=("NVIDIA H100",)),
    "h200": Chip(989e12, 134.0 * _GIB, kinds=("NVIDIA H200",)),
    "b200": Chip(2250e12, 171.0 * _GIB, kinds=("NVIDIA B200",)),
}


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip of a JAX device of this kind; None where it is not known, as for a CPU."""
    chips = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
    if device_kind.startswith("TPU"):
        return chips.get(device_kind)
    # A GPU's kind goes on with form factor and memory: "NVIDIA H100 80GB HBM3".
    names = [name for name in chips if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-"))]
    return chips[max(names, key=len)] if names else None
