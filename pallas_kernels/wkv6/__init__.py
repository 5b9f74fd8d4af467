"""The RWKV-6 recurrence (gated linear attention): per-channel decay."""

from pallas_kernels.wkv6.api import wkv6
from pallas_kernels.wkv6.step import wkv6_step

__all__ = ["wkv6", "wkv6_step"]
