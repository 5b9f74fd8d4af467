"""How the recurrences' Triton kernels are called: what they are compiled for, who runs them, the pass over chunks.

The kernels are in modules of their own, imported when first needed: triton and jax-triton come with the extra `cuda`.
"""

import contextlib
import contextvars
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import KERNEL_HEAD_SIZES

# The first is the default. For float32 a chunk of 32 does not fit the registers.
_CHUNK_SIZES = {"bfloat16": (32, 16), "float32": (16,)}

Tuning = Mapping[str, Mapping[str, Mapping[str, int]]]


class Launch(NamedTuple):
    """A Triton kernel and what it is called with: pointers to inputs, then to outputs, and compile-time settings."""

    kernel: Any
    grid: tuple[int, ...]
    inputs: Sequence[Any]
    outputs: Sequence[jax.ShapeDtypeStruct]
    settings: dict[str, Any]
    num_warps: int


class Plan(NamedTuple):
    """The dimensions that kernels are compiled for, C the chunk size, and the dtype of their sequences."""

    B: int
    T: int
    H: int
    K: int
    V: int
    C: int
    dtype: str

    @property
    def chunks(self) -> int:
        return -(-self.T // self.C)

    @property
    def settings(self) -> dict[str, Any]:
        """What every kernel is told; products of float32 are as good as float32, or as needed beside bfloat16 ones."""
        precision = "tf32x3" if self.dtype == "float32" else "tf32"
        return {"T": self.T, "H": self.H, "K": self.K, "V": self.V, "C": self.C, "PRECISION": precision}

    def keys(self, dtype: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, self.T, self.H, self.K), dtype or self.dtype)

    def values(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, self.T, self.H, self.V), self.dtype)

    def per_chunk(self, *shape: int, dtype: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B, self.H, self.chunks, *shape), dtype or self.dtype)


def _run_jax_triton(launch: Launch) -> Sequence[jax.Array]:
    """Runs a kernel on the GPU."""
    triton_call = importlib.import_module("jax_triton").triton_call
    # The argument's name differs between the jax-triton releases of the two jax pairs.
    modern = "out_type" in inspect.signature(triton_call).parameters
    outputs = {"out_type" if modern else "out_shape": tuple(launch.outputs)}
    return triton_call(
        *launch.inputs,
        kernel=launch.kernel,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=2,
        **outputs,
        **launch.settings,
    )


_Runner = Callable[[Launch], Sequence[Any]]
_runner: contextvars.ContextVar[_Runner | None] = contextvars.ContextVar("runner", default=None)


@contextlib.contextmanager
def running(runner: _Runner) -> Iterator[None]:
    """Lets `runner` stand in for the GPU: an interpreter, or what only looks at the kernels."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


def run(
    plan: Plan,
    tuned: Tuning,
    kernel: Any,
    inputs: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    blocks_of: int | None = None,
    every_chunk: bool = True,
    **settings: Any,
) -> Sequence[Any]:
    """Calls a kernel for every batch and head, every chunk, and every BLOCK of `blocks_of` channels."""
    chosen = dict(tuned[plan.dtype][kernel.fn.__name__])
    num_warps = chosen.pop("num_warps")
    grid: tuple[int, ...] = (plan.chunks,) if every_chunk else ()
    grid += () if blocks_of is None else (blocks_of // chosen["BLOCK"],)
    launch = Launch(
        kernel, (*grid, plan.B * plan.H), inputs, outputs, {**plan.settings, **chosen, **settings}, num_warps
    )
    return (_runner.get() or _run_jax_triton)(launch)


def import_kernels(operation: str, module: str = "triton_kernels") -> ModuleType:
    """The operation's module of kernels; NotImplementedError without triton and jax-triton."""
    try:
        if _runner.get() is None:
            importlib.import_module("jax_triton")
        return importlib.import_module(f"pallas_kernels.{operation}.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("triton", "jax_triton"):
            raise
        raise NotImplementedError(
            f"{operation} got implementation='triton_gpu', which needs {error.name}; install the extra cuda "
            "(pip install -e '.[cuda]'), or leave implementation out."
        ) from error


def make_plan(operation: str, r: jax.Array, v: jax.Array, others: Sequence[jax.Array], chunk_size: int | None) -> Plan:
    """The plan for these sequences; NotImplementedError for a head or chunk size that the kernels are not made for.

    Heads are filled up to the next size with zeros, which change nothing. The dtype is bfloat16 where all sequences
    are, else float32.
    """
    batch, length, heads, key_size = r.shape
    if max(key_size, v.shape[-1]) > KERNEL_HEAD_SIZES[-1]:
        raise NotImplementedError(
            f"{operation} got heads of size K={key_size}, V={v.shape[-1]}, and its Triton kernels take at most "
            f"{KERNEL_HEAD_SIZES[-1]}; pass implementation='chunked'."
        )
    dtype = "bfloat16" if all(x.dtype == jnp.bfloat16 for x in (r, v, *others)) else "float32"
    allowed = _CHUNK_SIZES[dtype]
    if chunk_size not in (None, *allowed):
        raise NotImplementedError(
            f"{operation} got chunk_size={chunk_size}, and for {dtype} its Triton kernels take {allowed}; pass one of "
            "these, or None."
        )
    key_whole, value_whole = (next(n for n in KERNEL_HEAD_SIZES if size <= n) for size in (key_size, v.shape[-1]))
    return Plan(batch, length, heads, key_whole, value_whole, chunk_size or allowed[0], dtype)


def fill(x: jax.Array, *sizes: int, dtype: Any) -> jax.Array:
    """x with zeros at the end of its last dimensions, up to sizes."""
    missing = [(0, whole - size) for size, whole in zip(x.shape[-len(sizes) :], sizes, strict=True)]
    x = x.astype(dtype)
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(sizes)) + missing) if any(end for _, end in missing) else x


def as_pointer(segment_ids: jax.Array | None) -> jax.Array:
    """A pointer needs an array even where there is nothing to point to."""
    return jnp.zeros((1,), jnp.int32) if segment_ids is None else segment_ids


def pass_states(
    plan: Plan,
    tuned: Tuning,
    removal: Sequence[jax.Array] | None,
    into: jax.Array,
    y: jax.Array,
    decay: jax.Array,
    start: jax.Array,
    *,
    reverse: bool,
) -> Sequence[jax.Array]:
    """X, the states that chunks begin with, and the last; see `triton_states.pass_states`. `removal` is P, X0, Q."""
    p, x0, q = removal or (into, y, into)
    return run(
        plan,
        tuned,
        import_kernels("shared", "triton_states").pass_states,
        (p, x0, q, into, y, decay, start),
        [
            plan.values() if removal else jax.ShapeDtypeStruct((1,), plan.dtype),
            plan.per_chunk(plan.V, plan.K),
            jax.ShapeDtypeStruct((plan.B, plan.H, plan.K, plan.V), jnp.float32),
        ],
        blocks_of=plan.V,
        every_chunk=False,
        REMOVAL=removal is not None,
        REVERSE=reverse,
    )
