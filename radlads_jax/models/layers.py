"""The parts every layer is built from: norms, projections, the gated MLP, low-rank maps, token shift."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from pallas_kernels.sharded import ROWS, constrain
from pallas_kernels.shared.products import kernel_gradient, product
from radlads_jax.models.config import ModelConfig


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def spread(param: Float[Array, " d"], shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """A vector of parameters for every token, in the dtype that is computed in; its gradient is summed in float32.

    Left to itself the sum is of that dtype: of 16,384 tokens in bfloat16 a CPU's is off by a tenth and more.
    """
    return jnp.broadcast_to(param.astype(dtype), shape)


def _spread_forward(param: Array, shape: tuple[int, ...], dtype: DTypeLike) -> tuple[Array, Array]:
    return spread(param, shape, dtype), param


def _spread_backward(shape: tuple[int, ...], _dtype: DTypeLike, param: Array, d_out: Array) -> tuple[Array]:
    return (jnp.sum(d_out, range(len(shape) - 1), dtype=jnp.float32).astype(param.dtype),)


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def scaled(x: Float[Array, "... d"], scale: Float[Array, " d"]) -> Float[Array, "... d"]:
    """x times a vector of parameters, in x's dtype; the vector's gradient is summed in float32, as `spread` says."""
    return x * scale.astype(x.dtype)


def _scaled_forward(x: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return scaled(x, scale), (x, scale)


def _scaled_backward(kept: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, scale = kept
    of_tokens = d_out.astype(jnp.float32) * x.astype(jnp.float32)
    return scaled(d_out, scale), jnp.sum(of_tokens, range(x.ndim - 1)).astype(scale.dtype)


scaled.defvjp(_scaled_forward, _scaled_backward)


class RMSNorm(nnx.Module):
    """y = scale * x / sqrt(mean(x^2) + eps), or (1 + scale) * ... where zero-centred; statistics float32."""

    def __init__(self, size: int, cfg: ModelConfig, *, zero_centred: bool | None = None):
        """zero_centred: None: as the family's norms are."""
        self.zero_centred = cfg.zero_centred_norms if zero_centred is None else zero_centred
        self.scale = nnx.Param(jnp.full((size,), 0 if self.zero_centred else 1, cfg.param_dtype))
        self.eps = cfg.rms_norm_eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return self.scaled(normed, x.dtype)

    def scaled(self, normed: Float[Array, "... D"], dtype: jnp.dtype, *, times: int = 1) -> Float[Array, "... D"]:
        """What is normed, scaled, in this dtype; times: so often the scale's channels lie side by side."""
        scale = jnp.tile(self.scale[...], times) if times > 1 else self.scale[...]
        if self.zero_centred:
            return ((1 + scale.astype(jnp.float32)) * normed).astype(dtype)
        return scaled(normed.astype(dtype), scale)


@jax.custom_vjp
def matmul(x: Float[Array, "... D"], kernel: Float[Array, "D d"]) -> Float[Array, "... d"]:
    """x @ kernel, its kernel's gradient written as x^T dy.

    JAX's own rule writes (dy^T x)^T, for which XLA on a CPU copies the wider array and leaves its fast matmul: 1.4x.
    """
    return product(x, kernel)


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel), (x, kernel)


def _matmul_backward(kept: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, kernel = kept
    return product(d_out, kernel.T), kernel_gradient(x, d_out, kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


class _Linear(nnx.Linear):
    """Its product is `matmul`, its bias `spread`."""

    def __call__(self, inputs: Float[Array, "... D"], out_sharding: None = None) -> Float[Array, "... d"]:
        assert out_sharding is None
        y = matmul(inputs.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + spread(self.bias[...], y.shape, y.dtype)


def linear(fan_in: int, fan_out: int, cfg: ModelConfig, rngs: nnx.Rngs, *, bias: bool = False, zero: bool = False):
    """y = x W + b with W [fan_in, fan_out]; normal init of std 0.02 as the families have it, or zeros."""
    return _Linear(
        fan_in,
        fan_out,
        use_bias=bias,
        dtype=jnp.dtype(cfg.dtype),
        param_dtype=jnp.dtype(cfg.param_dtype),
        kernel_init=initializers.zeros if zero else initializers.normal(0.02),
        rngs=rngs,
    )


class MLP(nnx.Module):
    """y = (silu(x W_gate) * x W_up) W_down."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.gate = linear(cfg.hidden_size, cfg.intermediate_size, cfg, rngs)
        self.up = linear(cfg.hidden_size, cfg.intermediate_size, cfg, rngs)
        self.down = linear(cfg.intermediate_size, cfg.hidden_size, cfg, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        # Said here because a backward pass left to itself gathers all widths and computes one kernel's gradient whole.
        gate, up = (constrain(y, ROWS, "context", "tensor") for y in (self.gate(x), self.up(x)))
        return self.down(jax.nn.silu(gate) * up)


def orthogonal(gain: float) -> initializers.Initializer:
    """gain times a random matrix with orthonormal rows (columns, where there are fewer of them).

    Gram-Schmidt, each row twice for accuracy. Not XLA's QR: on CPUs that is LAPACK, and several batches of it at once
    wait for each other for ever where jax 0.10.2 has two threads.
    """

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        rows = jax.random.normal(key, sorted(shape), jnp.float32)

        def add_row(basis, i):
            row = rows[i]
            for _ in range(2):
                row = row - (basis @ row) @ basis
            return basis.at[i].set(row / jnp.linalg.norm(row)), None

        basis, _ = jax.lax.scan(add_row, jnp.zeros_like(rows), jnp.arange(len(rows)))
        return (gain * (basis if shape[0] <= shape[1] else basis.T)).astype(dtype)

    return init


class LowRank(nnx.Module):
    """y = base + f(x A) B, with A [D, R] zero and B [R, d] at the start, so that y = base for every x."""

    def __init__(
        self,
        cfg: ModelConfig,
        rank: int,
        fan_out: int,
        *,
        rngs: nnx.Rngs,
        b_init: initializers.Initializer,
        activation: Callable[[Array], Array] | None = None,
        base: Array | None = None,
    ):
        self.a = nnx.Param(jnp.zeros((cfg.hidden_size, rank), cfg.param_dtype))
        self.b = nnx.Param(b_init(rngs.params(), (rank, fan_out), jnp.dtype(cfg.param_dtype)))
        self.base = None if base is None else nnx.Param(base.astype(cfg.param_dtype))
        self.activation = activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T d"]:
        inner = matmul(x, self.a[...].astype(x.dtype))
        if self.activation is not None:
            inner = self.activation(inner)
        y = matmul(inner, self.b[...].astype(x.dtype))
        # The sums feed exponentials and sigmoids of the decay: float32 from here on.
        return y if self.base is None else y.astype(jnp.float32) + self.base[...].astype(jnp.float32)


class GroupNorm(nnx.Module):
    """Normalises every head's output to mean 0 and variance 1, then scale and bias [d]; eps = head_dim * 1e-5."""

    def __init__(self, cfg: ModelConfig):
        size = cfg.num_heads * cfg.head_dim
        self.scale = nnx.Param(jnp.ones((size,), cfg.param_dtype))
        self.bias = nnx.Param(jnp.zeros((size,), cfg.param_dtype))

    def __call__(self, x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
        wide = x.astype(jnp.float32)
        mean, variance = wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True)
        normed = (wide - mean) * jax.lax.rsqrt(variance + x.shape[-1] * 1e-5)
        scale, bias = (p[...].astype(jnp.float32).reshape(x.shape[-2:]) for p in (self.scale, self.bias))
        return (normed * scale + bias).astype(x.dtype)


def split_heads(x: Float[Array, "B T d"], heads: int) -> Float[Array, "B T H K"]:
    return x.reshape(*x.shape[:2], heads, -1)


def repeat_kv(x: Float[Array, "B T G K"], heads: int) -> Float[Array, "B T H K"]:
    """Every kv head for its heads/kv_heads query heads, neighbours together (repeat-interleave)."""
    return jnp.repeat(x, heads // x.shape[2], axis=2)


def shift_tokens(
    x: Float[Array, "B T D"], previous: Float[Array, "B D"], starts: Bool[Array, "B T"] | None
) -> Float[Array, "B T D"]:
    """x_{t-1} for every t; `previous` stands before the first token, zeros before a segment's first one."""
    shifted = jnp.concatenate([previous[:, None].astype(x.dtype), x[:, :-1]], axis=1)
    return shifted if starts is None else jnp.where(starts[..., None], 0, shifted)
