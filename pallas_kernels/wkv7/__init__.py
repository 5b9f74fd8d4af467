"""The RWKV-7 recurrence: per-channel decay and a rank-one removal."""

from pallas_kernels.wkv7.api import wkv7

__all__ = ["wkv7"]
