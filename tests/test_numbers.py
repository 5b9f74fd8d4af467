"""What is not finite changes nothing and is named, a run of it ends the run; spikes are marked; the same bits twice."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import killed
import numpy as np
import optax
import pytest
import tiny_run
from untrained import save_teacher

from radlads_jax.distill.losses import LossSums
from radlads_jax.distill.step import make_train_step
from radlads_jax.distill.train_state import TrainState
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.run import train
from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.metrics import is_spike

# The stage whose loss reads the tokens' weights, and which has no teacher to compile.
STEPS = {"stage3": tiny_run.STEPS["stage3"]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def run(
    teacher: pathlib.Path, workdir: pathlib.Path, steps: dict[str, int], mixer: str = "rad_rwkv7", **more: Any
) -> pathlib.Path:
    tiny_run.convert(workdir, tiny_run.settings(teacher, mixer, steps) | more)
    return workdir


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def planting(monkeypatch: Any, plant: Callable[[int, Any, Any], tuple[Any, Any]]) -> list[tuple[int, bool]]:
    """Has plant(step, state, batch) change what a step gets; returns (step, whether the state stayed) as it goes."""
    seen: list[tuple[int, bool]] = []
    original = train.make_step

    def make_step(*arguments: Any) -> Any:
        step_fn = original(*arguments)

        def step(state: TrainState, frozen: Any, teacher: Any, batch: Any) -> Any:
            number = int(state.step) + 1
            state, batch = plant(number, state, batch)
            before = bits((state.params, state.opt_state))
            state, metrics = step_fn(state, frozen, teacher, batch)
            seen.append((number, bits((state.params, state.opt_state)) == before))
            return state, metrics

        return step

    monkeypatch.setattr(train, "make_step", make_step)
    return seen


def bad_weights(values: dict[int, float]) -> Callable[[int, Any, Any], tuple[Any, Any]]:
    """Plants a value, by the step, in the weight of one token."""

    def plant(step: int, state: Any, batch: Any) -> tuple[Any, Any]:
        if step in values:
            batch = batch | {"loss_mask": jnp.asarray(batch["loss_mask"]).at[0, 0].set(values[step])}
        return state, batch

    return plant


def test_a_bad_weight_changes_nothing_and_is_named(teacher, tmp_path, monkeypatch, capsys) -> None:
    seen = planting(monkeypatch, bad_weights({2: np.nan, 4: np.inf, 5: -np.inf}))
    falling = {"stage3.lr_final": 1e-4, "stage3.mixer_lr_final": 1e-4}
    run(teacher, tmp_path, STEPS, **falling)
    assert [step for step, same in seen if same] == [2, 4, 5] and len(seen) == 11
    monkeypatch.undo()
    said = capsys.readouterr().out
    for step, in_a_row in ((2, 1), (4, 1), (5, 2)):
        assert re.search(rf"stage3: step {step} is skipped\b.*\({in_a_row} in a row\)", said)
    lines = read_metrics(tmp_path)
    assert [line["finite"] for line in lines] == [1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3]
    # The rates that were applied: three steps moved no schedule.
    updates = [0, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7]
    undisturbed = read_metrics(run(teacher, tmp_path / "undisturbed", STEPS, **falling))
    assert [line["lr_rest"] for line in lines] == [undisturbed[count]["lr_rest"] for count in updates]
    assert len({line["lr_rest"] for line in undisturbed}) > 5
    assert np.isfinite(json.loads((tmp_path / "summary.json").read_text())["stages"][0]["last_loss"])


def test_a_bad_parameter_ends_the_run_with_the_checkpoint_before_it(teacher, tmp_path, monkeypatch) -> None:
    def plant(step: int, state: Any, batch: Any) -> tuple[Any, Any]:
        if step == 3:
            norm = state.params["norm"] | {"scale": state.params["norm"]["scale"].at[5].set(jnp.nan)}
            state = state._replace(params=state.params | {"norm": norm})
        return state, batch

    seen = planting(monkeypatch, plant)
    with pytest.raises(train.TooManyNonFinite, match=r"\b3 to 5\b.*config\.stage3\.lr.*config\.json"):
        run(teacher, tmp_path, STEPS, **{"train.max_skipped": 2})
    assert [step for step, same in seen if same] == [3, 4, 5]
    with Checkpoints(tmp_path / "checkpoints" / "stage3") as checkpoints:
        assert checkpoints.latest_step() == 2
        params = checkpoints.restore(2, checkpoints.shapes(2))[0]
    assert all(np.isfinite(value).all() for value in params.values())


def test_a_run_of_them_costs_nothing_but_the_time(teacher, tmp_path, monkeypatch) -> None:
    run(teacher, tmp_path / "undisturbed", STEPS)
    with monkeypatch.context() as patched:
        planting(patched, bad_weights(dict.fromkeys(range(4, 12), np.nan)))
        with pytest.raises(train.TooManyNonFinite, match="the 4 steps from 4 to 7 "):
            run(teacher, tmp_path / "disturbed", STEPS, **{"train.max_skipped": 3})
    run(teacher, tmp_path / "disturbed", STEPS, **{"train.max_skipped": 3})
    assert killed.problems(tmp_path / "disturbed", killed.result(tmp_path / "undisturbed", STEPS), STEPS) == []


@pytest.mark.parametrize("planted", ["loss", "gradient"])
def test_what_is_not_finite_in_one_gradient(planted: str) -> None:
    """The square root's gradient at 0 is infinite, where its value is not; the logarithm has neither."""

    def loss_fn(params: Any, _: Any, batch: Any) -> LossSums:
        bend = {"loss": jnp.log, "gradient": jnp.sqrt}[planted]
        return LossSums(jnp.sum(bend(jnp.square(params["x"]) * batch["row"])), jnp.float32(1), {})

    optimizer = optax.adam(0.1)
    state = TrainState.create({"x": jnp.float32(2.0), "y": jnp.float32(1.0)}, optimizer)
    step = jax.jit(make_train_step(loss_fn, optimizer))
    good, metrics = step(state, {}, None, {"row": jnp.ones(2)})
    assert metrics["finite"] == 1
    after, metrics = step(good, {}, None, {"row": jnp.array([1.0, 0.0])})
    assert np.isfinite(metrics["loss"]) == (planted == "gradient") and not np.isfinite(metrics["grad_norm"])
    assert metrics["finite"] == 0 and int(after.skipped) == 1
    assert bits((after.params, after.opt_state)) == bits((good.params, good.opt_state))


def test_spikes() -> None:
    rng = np.random.default_rng(0)
    falling = [float(3 + 2 * 0.99**i + 0.02 * rng.standard_normal()) for i in range(400)]
    marked = [i for i in range(400) if is_spike(falling[i], falling[max(i - 20, 0) : i])]
    assert marked == []
    assert is_spike(6.0, falling[380:]) and not is_spike(2.0, falling[380:])
    # One spike does not hide the next, and neither does a value that is none.
    assert is_spike(6.0, [*falling[381:], 9.0]) and not is_spike(float("nan"), falling[380:])
    assert not is_spike(6.0, falling[:9]), "too few to tell"
    assert not is_spike(1.05, [1.0] * 20), "a twentieth"
    assert is_spike(1.2, [1.0] * 20)


def test_a_spike_is_marked_and_reported(teacher, tmp_path, monkeypatch) -> None:
    def plant(step: int, state: Any, batch: Any) -> tuple[Any, Any]:
        if step == 11:
            state = state._replace(params=jax.tree.map(lambda x: x * 5, state.params))
        return state, batch

    planting(monkeypatch, plant)
    run(teacher, tmp_path, STEPS)
    assert [line["step"] for line in read_metrics(tmp_path) if line["spike"]] == [11]
    page = (tmp_path / "report" / "index.html").read_text()
    assert "spikes" in page and "six deviations" in page


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7"])
def test_the_same_seed_gives_the_same_bits(mixer: str, teacher, tmp_path) -> None:
    for name in ("one", "two"):
        run(teacher, tmp_path / name, killed.STEPS, mixer)
    assert killed.problems(tmp_path / "two", killed.result(tmp_path / "one")) == []
    run(teacher, tmp_path / "other", {"stage1": 9}, mixer, seed=1)
    first, other = (read_metrics(tmp_path / name)[0]["loss"] for name in ("one", "other"))
    assert first != other
