"""The judgement of soak.py: what stays flat passes, what grows or loses its checkpoints does not."""

import numpy as np
import pytest
import soak


def samples(leak: float = 0.0, files: float = 0.0, kept: int = 2) -> list[soak.Sample]:
    """Three lives of 500 s; leak: MiB, and files: open ones, that every second adds after a settling of 100 s."""
    rng, taken = np.random.default_rng(0), []
    for life in range(soak.LIVES):
        for second in range(0, 500, 2):
            grown = max(second - 100, 0)
            memory = 900 * min(1.0, 0.5 + second / 200) + leak * grown + rng.normal(0, 1)
            values = (memory, 40 + files * grown + rng.integers(0, 3), 60.0 + rng.integers(0, 2), 23.0)
            taken.append(soak.Sample(life, 600.0 * life + second, values, tuple(range(1, kept + 1))))
    return taken


@pytest.mark.parametrize(
    ("kinds", "fine"),
    [({}, True), ({"leak": 0.05}, False), ({"files": 0.01}, False), ({"kept": 0}, False), ({"kept": 4}, False)],
    ids=["flat", "memory", "files", "no checkpoint", "too many checkpoints"],
)
def test_verdicts(kinds: dict, fine: bool, capsys: pytest.CaptureFixture) -> None:
    assert soak.report(samples(**kinds), [10, 20, 30]) == fine
    said = capsys.readouterr().out
    assert ("NOT" in said) == (not fine) and "memory of its own" in said


def test_the_slope_is_the_leak(tmp_path) -> None:
    mean, slope, error = soak.slope_per_hour(samples(leak=0.05), 0)
    assert slope == pytest.approx(0.05 * 3600, rel=0.02) and 900 < mean < 925 and 0 < error < 5
    soak.draw(samples(), tmp_path / "plot.png")
    assert 1000 < (tmp_path / "plot.png").stat().st_size < 100_000
