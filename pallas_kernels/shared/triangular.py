"""The inverse of a unit lower triangular matrix, as the delta rules need one a chunk, from matrix products."""

import jax
import jax.numpy as jnp

# Up to this size a triangular inverse is made from whole products under masks, beyond from its quarters.
_SMALL_INVERSE = 16


def invert_unit_lower(strict: jax.Array) -> jax.Array:
    """(I - strict)^-1 for strictly lower triangular [...,C,C], C a power of two.

    [[X, 0], [Z L X, Z]] inverts [[X^-1, 0], [-L, Z^-1]]: diagonal blocks of doubling size are merged. This is as
    stable as substitution; the product (I + L)(I + L^2)(I + L^4)... is not, when keys repeat.
    """
    size = strict.shape[-1]
    if size <= _SMALL_INVERSE:
        return _invert_small(strict)
    half = size // 2
    upper, lower = strict[..., :half, :half], strict[..., half:, half:]
    both = invert_unit_lower(jnp.stack([upper, lower], axis=-3))
    first, second = both[..., 0, :, :], both[..., 1, :, :]
    corner = second @ strict[..., half:, :half] @ first
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _invert_small(strict: jax.Array) -> jax.Array:
    """The same, all blocks of one width at once: X <- X + X (their corners of strict) X."""
    size = strict.shape[-1]
    index = jnp.arange(size)

    def corners(width: int) -> jax.Array:
        block = index // width
        return strict * ((block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1))

    inverse = jnp.eye(size, dtype=strict.dtype) + corners(1)
    width = 2
    while width < size:
        inverse = inverse + inverse @ corners(width) @ inverse
        width *= 2
    return inverse
