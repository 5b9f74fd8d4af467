"""Head and loss in one: logits exist for one slice of tokens at a time."""

from pallas_kernels.linear_loss.api import linear_cross_entropy, linear_kl, linear_stats, linear_topk_kl

__all__ = ["linear_cross_entropy", "linear_kl", "linear_stats", "linear_topk_kl"]
