"""The RWKV-6 recurrence (gated linear attention): per-channel decay."""

from pallas_kernels.wkv6.api import wkv6

__all__ = ["wkv6"]
