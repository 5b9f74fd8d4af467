"""Numbers of bytes as a reader sees them."""

import pytest

from radlads_jax.system.space import shown_bytes


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (3072, "3.07 kB"),
        (999_600, "1 MB"),
        (2.5e9, "2.5 GB"),
        (123_456_789_000, "123 GB"),
        (5e15, "5,000 TB"),
    ],
)
def test_bytes_have_three_digits_and_a_unit(count: int | float, shown: str) -> None:
    assert shown_bytes(count) == shown
