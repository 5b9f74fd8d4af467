"""Which implementation of an operation runs: each operation keeps one dict, name -> function."""

import contextlib
import contextvars
import functools
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

_logger = logging.getLogger(__name__)

# Tried in order on each backend; the first that the operation has is taken.
_PREFERENCE: dict[str, tuple[str, ...]] = {
    "tpu": ("pallas_tpu", "chunked"),
    "gpu": ("triton_gpu", "cudnn", "chunked"),
    "cpu": ("chunked",),
}
# The accelerators' kernels are made for these; a fit implementation for any other is `chunked`.
KERNEL_HEAD_SIZES = (64, 128)
_TRACED_FOR: contextvars.ContextVar[str | None] = contextvars.ContextVar("traced_for", default=None)


def backend() -> str:
    """The backend that what is being traced will run on: this process's own, unless `traced_for` names another."""
    return _TRACED_FOR.get() or jax.default_backend()


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
    """What is traced inside is meant for this backend, present or not. Functions jitted before keep what they have."""
    token = _TRACED_FOR.set(name)
    try:
        yield
    finally:
        _TRACED_FOR.reset(token)


def choose(
    operation: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    head_sizes: Sequence[int] = (),
) -> Callable[..., Any]:
    """Returns the named implementation, or for None the best one that `backend` has for these head sizes.

    A named implementation is never replaced by another: ValueError if the operation has none of that name. So it is
    where none that it has runs on the backend.
    """
    if implementation is None:
        preferred = (*_PREFERENCE.get(backend(), ("chunked",)), "reference")
        fitting = (name for name in preferred if name in implementations and fits(name, head_sizes))
        implementation = next(fitting, None)
        if implementation is None:
            raise ValueError(
                f"{operation} has {sorted(implementations)}, of which none runs on {backend()}; expected 'chunked' or "
                "'reference' among them, which run everywhere. Add one, or name an implementation."
            )
        _log_choice(operation, implementation, backend())
    if implementation not in implementations:
        raise ValueError(
            f"{operation} got implementation={implementation!r}, expected one of {sorted(implementations)}; "
            "name one of those, or pass None to let the backend decide."
        )
    return implementations[implementation]


def fits(name: str, head_sizes: Sequence[int]) -> bool:
    """Whether an implementation that its backend prefers can take these sizes there."""
    if name in ("chunked", "reference"):
        return True
    if not set(head_sizes) <= set(KERNEL_HEAD_SIZES):
        return False
    if name == "triton_gpu":
        return _capability() >= 8 and all(importlib.util.find_spec(of) is not None for of in ("triton", "jax_triton"))
    # JAX's own tests of cuDNN's attention with a mask and gradients ask for as much.
    return name != "cudnn" or _capability() >= 9


def _capability() -> int:
    """The first number of an NVIDIA GPU's compute capability; 0 elsewhere."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    numbers = re.fullmatch(r"(\d+)\.\d+", capability)  # AMD's name an architecture there: gfx942
    return int(numbers[1]) if numbers else 0


@functools.cache
def _log_choice(operation: str, implementation: str, where: str) -> None:
    _logger.info("%s runs as %s on %s", operation, implementation, where)
