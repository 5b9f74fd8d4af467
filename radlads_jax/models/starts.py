"""What several mixers make of what their teacher does, for a calibrated start (spec.Calibration).

Source of the ideas: Taylor-Calibrate (arXiv 2606.16429).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from radlads_jax.models.config import ModelConfig
from radlads_jax.models.spec import Calibration, LayerOutputs, TeacherStatistics

# Of what is there a head takes away so much at least, and so much more at most.
_REMOVALS = (0.3, 0.4)
_LEAST_LIKENESS = 0.1
# Of the mean square of what o reads.
_RIDGE = 1e-2
_SOLVER_STEPS = 64


def log_decay_of_look_back(look_back: Float[Array, "L H"]) -> Float[Array, "L H"]:
    """The log decay a token with which the mean age of what a state holds is the look-back: -log(1 + 1/d)."""
    return -jnp.log1p(1 / look_back)


def removal_of_entropy(entropy: Float[Array, "L H"]) -> Float[Array, "L H"]:
    """From 0.3 for the layer's head of the most entropy to 0.7 for that of the least."""
    low, high = (end(entropy, axis=-1, keepdims=True) for end in (jnp.min, jnp.max))
    return _REMOVALS[0] + _REMOVALS[1] * (high - entropy) / jnp.maximum(high - low, 1e-6)


def of_heads(per_head: Float[Array, "L H"], parameter: Float[Array, "L d"]) -> Float[Array, "L d"]:
    """A head's number for each of its channels, in the parameter's dtype."""
    return jnp.repeat(per_head, parameter.shape[-1] // per_head.shape[-1], axis=-1).astype(parameter.dtype)


def low_rank_gate_at_one(cfg: ModelConfig, mixer: dict[str, Any], seen: TeacherStatistics) -> dict[str, Any]:
    """sigmoid(x A) B is 1 whatever x: A is zero, and each of B's columns, still random, adds up to 2."""
    b = mixer["gate"]["b"]
    wide = b.astype(jnp.float32)
    return {"gate": mixer["gate"] | {"b": (wide - wide.mean(1, keepdims=True) + 2 / b.shape[1]).astype(b.dtype)}}


def _scales(cfg: ModelConfig, seen: LayerOutputs) -> Float[Array, " d"]:
    """<attention, mixer> / <mixer, mixer> of each head, for each of its channels: what brings them nearest.

    Where they are less alike than a correlation of 0.1 it is what that one would give, that no head begins silent.
    """
    weight = seen.counted[..., None, None]
    attention, mixer = (x.reshape(*x.shape[:2], cfg.num_heads, -1) for x in (seen.attention, seen.mixer))
    # The mixer's may be the first channels of attention's heads (models/gdn_start.py).
    attention = attention[..., : mixer.shape[-1]]
    both, ours, theirs = (
        jnp.sum(x * y * weight, (0, 1, 3)) for x, y in ((attention, mixer), (mixer, mixer), (attention, attention))
    )
    scale = jnp.maximum(both, _LEAST_LIKENESS * jnp.sqrt(ours * theirs)) / jnp.maximum(ours, 1e-30)
    return jnp.repeat(scale, mixer.shape[-1])


def _scaled_output(cfg: ModelConfig, mixer: dict[str, Any], seen: LayerOutputs) -> dict[str, Any]:
    kernel = mixer["o"]["kernel"]
    return {"o": mixer["o"] | {"kernel": (kernel * _scales(cfg, seen)[:, None]).astype(kernel.dtype)}}


def _solved_output(cfg: ModelConfig, mixer: dict[str, Any], seen: LayerOutputs) -> dict[str, Any]:
    """o = s W with heads' scales s and the W of least sum |target - (s mixer) W|^2 + ridge |W - o|^2."""
    kernel, scales = mixer["o"]["kernel"].astype(jnp.float32), _scales(cfg, seen)
    outputs = seen.mixer * scales
    counted = outputs * seen.counted[..., None]
    gram = jnp.einsum("bti,btj->ij", counted, outputs)
    left = jnp.einsum("bti,btd->id", counted, seen.target - outputs @ kernel)
    ridge = _RIDGE * jnp.trace(gram) / len(gram)
    change, _ = jax.scipy.sparse.linalg.cg(lambda w: gram @ w + ridge * w, left, maxiter=_SOLVER_STEPS)
    solved = scales[:, None] * (kernel + change)
    return {"o": mixer["o"] | {"kernel": solved.astype(mixer["o"]["kernel"].dtype)}}


SCALED_OUTPUT = Calibration(of_outputs=_scaled_output)
SOLVED_OUTPUT = Calibration(of_outputs=_solved_output)
