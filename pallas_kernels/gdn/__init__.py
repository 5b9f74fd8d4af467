"""Gated DeltaNet: the recurrence with one decay a head and a delta rule, and the short convolution beside it."""

from pallas_kernels.gdn.api import gdn
from pallas_kernels.gdn.conv import conv_over_shards, short_conv
from pallas_kernels.gdn.step import gdn_step

__all__ = ["conv_over_shards", "gdn", "gdn_step", "short_conv"]
