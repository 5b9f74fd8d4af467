"""Norms that multiply by 1 + w, of norms that multiply by w: exact where a power of two goes to the next matrices.

w - 1 has the bits of w from 1/2 to 256. Any other w is written as c (w/c) with c a power of two and w/c in [1, 2): c
goes into the columns of the matrices that read the norm's result, which changes their exponents alone.
"""

import numpy as np

_AFTER = {
    "input_layernorm.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "linear_attn.in_proj_"),
    "post_attention_layernorm.weight": ("mlp.gate_proj", "mlp.up_proj"),
}


def powers(scale: np.ndarray) -> np.ndarray:
    """c for every channel of a norm's scale [D]."""
    size = np.abs(scale)
    fine = ((scale >= 0.5) & (scale <= 256)) | (scale == 0)
    exponents = np.floor(np.log2(np.where(fine, 1, size)))
    return np.where(fine, 1, np.sign(scale) * np.exp2(exponents)).astype(np.float32)


def stored(scale: np.ndarray, *, split: bool) -> np.ndarray:
    """w/c - 1, or w - 1 where nothing behind the norm can take c."""
    return (scale / powers(scale) if split else scale) - np.float32(1)


def norm_before(name: str) -> str | None:
    """The norm whose powers a tensor's columns take; None for what takes none."""
    if name == "lm_head.weight":
        return "model.norm.weight"
    if not name.endswith(".weight"):
        return None
    return next(
        (
            name[: name.index(reader)] + norm
            for norm, readers in _AFTER.items()
            for reader in readers
            if f".{reader}" in name
        ),
        None,
    )
