"""How fast a run was, by the times of its lines: without pauses, compilation and scores."""

from typing import Any

import pytest

from radlads_jax.reporting import run_log


@pytest.mark.parametrize("together", [1, 3, 10])
def test_paces_leave_pauses_out(together: int) -> None:
    """Lines written together every few steps of 0.5 s, and a night between two of them."""
    records = []
    for step in range(1, 61):
        written = -(-step // together) * together
        night = 40_000.0 if step > 30 else 0.0
        records.append({"stage": "s", "step": step, "time": 0.5 * written + night + 1e-4 * (step % together)})
    stage = run_log.StageLog("s", tuple(records), {"batch_size": 2, "seq_len": 8, "tokens": 960})
    paces = stage.paces()
    assert sum(steps for _, steps, _ in paces) == 60 - 2 * together
    assert all(seconds / steps == pytest.approx(0.5, rel=1e-2) for _, steps, seconds in paces)
    assert paces[-1][0] == 960


@pytest.mark.parametrize(("together", "every"), [(1, 10), (5, 10), (5, 13), (10, 25), (10, 100)])
def test_paces_leave_the_time_of_scores_out(together: int, every: int) -> None:
    """Scores of 7 s between steps of half a second; lines that wait are written before them."""
    records: list[dict[str, Any]] = []
    for step in range(1, 201):
        written = min(-(-step // together) * together, -(-step // every) * every)
        scored = {"heldout_seconds": 7.0} if step % every == 0 else {}
        records.append({"stage": "s", "step": step, "time": 0.5 * written + 7.0 * ((written - 1) // every)} | scored)
    paces = run_log.StageLog("s", tuple(records), {}, log_every=together).paces()
    assert 150 < sum(steps for _, steps, _ in paces) < 200
    assert all(seconds / steps == pytest.approx(0.5) for _, steps, seconds in paces)


@pytest.mark.parametrize(("count", "paces"), [(30, 2), (12, 1), (10, 0), (4, 0)])
def test_few_lines_written_together_slowly(count: int, paces: int) -> None:
    """Steps of 50 s whose lines a loaded machine writes ten at once, 20 ms apart."""
    written = [min(-(-step // 10) * 10, count) for step in range(1, count + 1)]
    records = [{"stage": "s", "step": i, "time": 50.0 * at + 0.02 * i} for i, at in enumerate(written, 1)]
    got = run_log.StageLog("s", tuple(records), {}, log_every=10).paces()
    assert len(got) == paces
    assert all(seconds / steps == pytest.approx(50.0, rel=1e-2) for _, steps, seconds in got)
