"""The RWKV-7 recurrence: per-channel decay and a rank-one removal."""

from pallas_kernels.wkv7.api import wkv7
from pallas_kernels.wkv7.step import wkv7_step

__all__ = ["wkv7", "wkv7_step"]
