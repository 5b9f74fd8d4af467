"""Intervals of shares."""

# Of a normal distribution, for 95%.
Z = 1.96


def wilson(share: float, samples: int) -> tuple[float, float]:
    """The 95% interval of a share that was found in so many samples (Wilson 1927); of means in [0, 1], at least 95%."""
    centre = share + Z**2 / (2 * samples)
    spread = Z * (share * (1 - share) / samples + Z**2 / (4 * samples**2)) ** 0.5
    low, high = ((centre + sign * spread) / (1 + Z**2 / samples) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)
