"""What the user's environment makes of jax, before anything is computed."""

import contextlib
import functools
import os
from collections.abc import Iterator

import jax
from absl import logging

from radlads_jax.system.untrusted import brief

# Programs here say themselves what is computed in which precision; under other rules than jax's own they do not trace.
_OWN_RULES = {"jax_enable_x64": False, "jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}


@functools.cache
def require() -> None:
    """Sets jax's own rules of dtypes where the environment has others, with a warning that names the variable.

    Raises ValueError where jax has none of the devices that JAX_PLATFORMS asks for. It is the first use of a device:
    where several processes join, they do so before.
    """
    for option, rule in _OWN_RULES.items():
        if getattr(jax.config, option) != rule:
            logging.warning("%s is not heeded: this program chooses its dtypes itself", option.upper())
            jax.config.update(option, rule)
    try:
        jax.devices()
    # jax has an assertion where a plugin is missing, and RuntimeError for what a plugin says.
    except (AssertionError, RuntimeError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split()) or "no plugin for it is installed, or it has found no device"
        raise ValueError(
            f"JAX_PLATFORMS is {asked!r}, and jax can not use that here ({reason}); expected one of this machine's. "
            "Unset JAX_PLATFORMS to have the best one there is, or install jax for it, e.g. jax[cuda12] or jax[tpu]."
        ) from error


def host() -> jax.sharding.Sharding | None:
    """Where arrays lie in the host's memory; None where JAX_PLATFORMS has no CPU among its devices."""
    try:
        return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is jax's error of a device's memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def room_for(what: str, advice: str) -> Iterator[None]:
    """Raises ValueError in the place of jax's error where a device's memory is full; its other errors pass."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"{what} not fit into a device's memory ({brief(error)}); expected less at once. {advice}"
        ) from error
