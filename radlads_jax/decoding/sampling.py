"""The choice of the next token: the most likely one, or a draw at a temperature from the most likely ones."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most likely token; top_k 0 and top_p 1 leave every token in.

    Logits are divided by the temperature, then the top_k largest are kept, then the fewest of them whose probabilities
    sum to top_p. Raises ValueError for values outside their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        ranges = {
            "temperature": (0 <= self.temperature < float("inf"), "a number from 0 (the most likely token) upwards"),
            "top_k": (self.top_k >= 0, "a number of tokens, 0 for all of them"),
            "top_p": (0 < self.top_p <= 1, "a probability above 0 and at most 1"),
        }
        for name, (is_right, expected) in ranges.items():
            if not is_right:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}. Change --{name}.")


GREEDY = Sampling()


def likely(logits: Float[Array, "B V"], sampling: Sampling) -> tuple[Float[Array, "B N"], Int[Array, "B N"]]:
    """The logits at this temperature of the tokens that may be drawn, -inf for the others, and those tokens' ids."""
    vocab = logits.shape[-1]
    logits = logits / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        return logits, jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), logits.shape)
    logits, ids = jax.lax.top_k(logits, min(sampling.top_k or vocab, vocab))
    probabilities = jax.nn.softmax(logits, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.where(before < sampling.top_p, logits, -jnp.inf), ids


def choose(logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """The next token of every row, drawn with the row's own key: the same whatever the other rows are."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits, ids = likely(logits, sampling)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)
