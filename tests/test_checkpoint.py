"""Checkpoints: bits, shardings, interrupted saves, and what a mismatch says."""

import gc
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from radlads_jax.run.checkpoint import Checkpoints


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    pair: tuple[jax.Array, ...]


class Moments(NamedTuple):
    mean: jax.Array
    count: jax.Array


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


def make_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    # Every bit pattern of bfloat16, NaN payloads and subnormals among them.
    patterns = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16).reshape(256, 256)
    params = {
        "mixer": {"w0": jnp.asarray(rng.standard_normal((3, 8, 5)), jnp.float32), "all_bits": jnp.asarray(patterns)},
        "norm.scale": jnp.asarray(rng.standard_normal(7), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.constant_schedule(1e-3)))
    return State(
        step=jnp.int32(12),
        params=params,
        opt_state=(optimizer.init(params), Moments(jnp.float32(0.5), jnp.int32(2**31 - 1))),
        pair=(jnp.array([True, False]), jnp.arange(4, dtype=jnp.uint32)),
    )


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert bits(a) == bits(b)


def save(checkpoints: Checkpoints, step: int, state: Any, *, wait: bool = True) -> bool:
    return checkpoints.save(step, state, data_state={"row": step}, meta={"stage": "1"}, wait=wait)


def test_round_trip_is_bit_for_bit(tmp_path: pathlib.Path) -> None:
    state = make_state()
    data_state, meta = {"row": 96, "inner": {"epoch": [1, 2]}}, {"stage": "align", "loss": 0.25, "note": None}
    with Checkpoints(tmp_path / "new" / "dir") as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.save(12, state, data_state=data_state, meta=meta)
    with Checkpoints(tmp_path / "new" / "dir") as checkpoints:
        assert checkpoints.latest_step() == 12
        restored, data, info = checkpoints.restore(12, abstract(state))
        assert checkpoints.restore_meta(12) == meta
    assert_same(restored, state)
    assert (data, info) == (data_state, meta)


def test_nothing_is_pickled(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, make_state())
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), path
    assert json.loads((tmp_path / "1" / "data" / "metadata").read_text()) == {"row": 1}


def test_buffers_may_be_donated_at_once(tmp_path: pathlib.Path) -> None:
    def advance(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return jax.tree.map(lambda x: x * 2 + 1, tree)

    advance = jax.jit(advance, donate_argnums=0)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(jnp.arange(2**20, dtype=jnp.float32), NamedSharding(mesh, PartitionSpec("fsdp")))
    state = {"sharded": sharded, "whole": jnp.arange(2**21, dtype=jnp.float32)}
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    target = abstract(state)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state, wait=False)
        for _ in range(4):
            state = advance(state)
        jax.tree.map(lambda x: x.delete(), state)
        restored, _, _ = checkpoints.restore(1, target)
    assert_same(restored, expected)


def test_restores_to_other_shardings_and_dtypes(tmp_path: pathlib.Path) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec("fsdp", "data"))
    state = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8) / 3, NamedSharding(mesh, PartitionSpec("data")))}
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state)
        resharded, _, _ = checkpoints.restore(1, {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=split)})
        narrow, _, _ = checkpoints.restore(1, {"w": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)})
    assert resharded["w"].sharding == split
    assert bits(resharded["w"]) == bits(state["w"])
    assert narrow["w"].sharding.device_set == {jax.local_devices()[0]}
    assert bits(narrow["w"]) == bits(state["w"].astype(jnp.bfloat16))


def test_parameters_alone_are_read_without_the_optimizer(tmp_path: pathlib.Path) -> None:
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state)
        assert_same(checkpoints.restore_params(1, abstract(state.params)), state.params)
        with pytest.raises(ValueError, match=r"norm\.scale .*\bonly\b"):
            checkpoints.restore_params(1, {"mixer": abstract(state.params["mixer"])})


def test_keeps_the_newest_and_saves_a_step_once(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path, keep=2, every=10) as checkpoints:
        assert [step for step in range(41) if checkpoints.due(step)] == [10, 20, 30, 40]
        for step in (10, 20, 30):
            assert save(checkpoints, step, {"x": jnp.float32(step)}, wait=False)
        assert not save(checkpoints, 30, {"x": jnp.float32(99)})
        with pytest.raises(ValueError, match=r"step 15 in .* already holds step 30"):
            save(checkpoints, 15, {"x": jnp.float32(15)})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "30"]
        state, data_state, _ = checkpoints.restore(30, {"x": jnp.float32(0)})
    assert (float(state["x"]), data_state) == (30.0, {"row": 30})


def test_saving_leaves_no_objects_behind(tmp_path: pathlib.Path) -> None:
    """Orbax keeps a few objects for each of the last 32 directories it knows, and nothing is to be added to these."""
    state, alive = make_state(), []
    gc.collect()
    gc.freeze()  # what there is already need not be looked at again and again
    try:
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            for step in range(1, 13):
                checkpoints.save(step, state, data_state={}, meta={}, wait=True)
                gc.collect()
                alive.append(len(gc.get_objects()))
    finally:
        gc.unfreeze()
    assert np.median(np.diff(alive[4:])) <= 8, alive


def test_a_failed_save_is_raised_and_deletes_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = {"x": jnp.arange(8.0)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1, x)
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.rename", refuse)
            patch.setattr("os.rename", refuse)
            patch.setattr("os.replace", refuse)
            save(checkpoints, 2, x, wait=False)
            with pytest.raises(OSError, match="disk is gone"):
                checkpoints.wait()
        assert checkpoints.latest_step() == 1
        assert_same(checkpoints.restore(1, x)[0], x)
        assert save(checkpoints, 3, x)
        assert checkpoints.latest_step() == 3
        assert not (tmp_path / "1").exists()


def refuse(*_: Any, **__: Any) -> None:
    raise OSError("disk is gone")


def test_an_unfinished_checkpoint_is_ignored_and_removed(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = {"x": jnp.arange(8.0)}
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 5, x)
    unfinished = tmp_path / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "5", unfinished)
    (unfinished / "state" / "manifest.ocdbt").unlink()
    with caplog.at_level("WARNING", logger="absl"), Checkpoints(tmp_path) as checkpoints:
        assert f"removing the unfinished checkpoint {unfinished}" in caplog.text
        assert checkpoints.latest_step() == 5
        assert save(checkpoints, 9, x)
        assert checkpoints.latest_step() == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]


def test_killed_while_saving(tmp_path: pathlib.Path) -> None:
    program = """
        import os, sys
        import jax.numpy as jnp
        from radlads_jax.run.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1], keep=1)
        for step in (1, 2):
            state = {"x": jnp.full((2**24,), step, jnp.float32)}
            checkpoints.save(step, state, data_state={}, meta={"step": step}, wait=step == 1)
        os._exit(9)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    assert subprocess.run(command, env=environment, timeout=120).returncode == 9
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        step = checkpoints.latest_step()
        assert step in (1, 2)
        state, _, meta = checkpoints.restore(step, {"x": jax.ShapeDtypeStruct((2**24,), jnp.float32)})
        assert meta == {"step": step}
        assert bool(jnp.all(state["x"] == step))
        assert save(checkpoints, 3, {"x": jnp.float32(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_mismatches_are_named(tmp_path: pathlib.Path) -> None:
    state = {"a": {str(i): jnp.zeros(2) for i in range(20)}, "n": jnp.int32(1), "shape": jnp.zeros((2, 3))}
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state)
        wanted = {"a": state["a"], "n": jnp.float32(1), "shape": jnp.zeros((3, 2)), "new": [jnp.zeros(1)]}
        with pytest.raises(ValueError) as caught:
            checkpoints.restore(1, wanted)
        message = str(caught.value)
        assert "new/0" in message
        assert re.search(r"\bshape\b.*\(2, 3\).*\(3, 2\)", message)
        assert re.search(r"\bn\b.*\bint32\b.*\bfloat32\b", message)
        with pytest.raises(ValueError, match="and 11 more") as caught:
            checkpoints.restore(1, {"n": state["n"]})
        assert str(caught.value).count("checkpoint only") == 10


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"step": 3}, r"step \(int\)"),
        ({"x": np.zeros(3)}, r"x \(ndarray\)"),
        ({"x": jnp.zeros((0, 2))}, r"x \(size 0\)"),
        ({}, "an empty state"),
        ({"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)}, "1 different paths"),
    ],
)
def test_states_that_cannot_be_saved(tmp_path: pathlib.Path, state: Any, words: str) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=words):
            save(checkpoints, 1, state)
        assert checkpoints.latest_step() is None


def test_bad_arguments(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="every is -1"):
        Checkpoints(tmp_path, every=-1)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"data_state .*JSON.*float32"):
            checkpoints.save(1, {"x": jnp.zeros(1)}, data_state={"x": np.float32(1)}, meta={})
        with pytest.raises(ValueError, match=rf"step 4 in {re.escape(str(tmp_path))}.*\[\]"):
            checkpoints.restore(4, {"x": jnp.zeros(1)})
