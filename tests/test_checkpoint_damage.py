"""Damaged checkpoints: what differs from what was saved is never given out; the newest whole one takes its place."""

import pathlib
import random
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.checkpoint_sums import DamagedCheckpoint, array_sum, document_sum
from radlads_jax.system import storage

DAMAGE = ("missing", "empty", "cut", "zeros", "flip", "flip", "flip")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8, jnp.bool_)


def state_of(step: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    # One array is large enough for a file of its own, one is of the kind that is stored beside its name.
    values = {"large": rng.standard_normal((64, 64)), "small": rng.standard_normal(3)}
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()} | {"step": jnp.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with the checkpoints 1 and 2."""
    directory = tmp_path_factory.mktemp("saved") / "stage1"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), data_state={"row": step}, meta={"loss": step / 7, "none": None})
    return directory


@pytest.fixture
def copy(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "stage1"))


def files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def harm(path: pathlib.Path, kind: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "flip":
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    cut = {"empty": 0, "cut": len(data) // 2}
    path.write_bytes(bytes(len(data)) if kind == "zeros" else data[: cut.get(kind)])
    if kind == "missing":
        path.unlink()


def newest(directory: pathlib.Path) -> Any:
    """(step, arrays, data_state, meta) of the newest whole checkpoint."""
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.newest(lambda step: checkpoints.restore(step, state_of(0)))
        assert restored is not None
        step, (state, data_state, meta) = restored
        return step, {name: np.asarray(x).tobytes() for name, x in state.items()}, data_state, meta


def expected(step: int) -> Any:
    arrays = {name: np.asarray(x).tobytes() for name, x in state_of(step).items()}
    return step, arrays, {"row": step}, {"loss": step / 7, "none": None}


# Orbax leaves tasks behind that were to read what is not there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", dict.fromkeys(DAMAGE))
def test_every_file_damaged(kind: str, saved: pathlib.Path, tmp_path: pathlib.Path, caplog: Any) -> None:
    rng, skipped = random.Random(kind), 0
    for number, file in enumerate(files(saved / "2")):
        for repeat in range(DAMAGE.count(kind)):
            directory = tmp_path / f"{number}-{repeat}" / "stage1"
            shutil.copytree(saved, directory)
            harm(directory / "2" / file.relative_to(saved / "2"), kind, rng)
            caplog.clear()
            step, *contents = newest(directory)
            assert [step, *contents] == list(expected(step)), (kind, file)
            if step == 1:
                skipped += 1
                aside = directory.with_name("stage1-2-damaged")
                assert f"skipping the checkpoint of step 2 in {directory}, which is damaged (" in caplog.text
                assert f"it is now {aside}" in caplog.text and aside.is_dir()
    assert skipped > 0


def test_a_flipped_bit_in_the_data_of_an_array_is_found(copy: pathlib.Path, caplog: Any) -> None:
    """What Orbax and its storage give out as if nothing were wrong."""
    largest = max(files(copy / "2"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert newest(copy) == expected(1)
    assert re.search(r"checksum of large\b.*\b1 of 3\b", caplog.text)


def test_a_damaged_one_can_be_saved_again(copy: pathlib.Path) -> None:
    (copy / "2" / "data" / "metadata").write_text('{"row": 3}')
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.newest(checkpoints.restore_meta) == (2, {"loss": 2 / 7, "none": None})
        with pytest.raises(DamagedCheckpoint, match=rf"\b2\b.*{re.escape(str(copy))}.*checksum of data\b"):
            checkpoints.restore(2, state_of(0))
        restored = checkpoints.newest(lambda step: checkpoints.restore(step, state_of(0))[1])
        assert restored == (1, {"row": 1})
        assert checkpoints.save(2, state_of(2), data_state={"row": 2}, meta={"loss": 2 / 7, "none": None}, wait=True)
    assert newest(copy) == expected(2)


def test_no_whole_one_is_no_new_beginning(copy: pathlib.Path) -> None:
    for step in (1, 2):
        (copy / str(step) / "sums" / "metadata").unlink()
    for _ in range(2):
        with Checkpoints(copy) as checkpoints, pytest.raises(ValueError, match="stage1-1-damaged, stage1-2-damaged in"):
            checkpoints.newest(checkpoints.restore_meta)
    for step in (1, 2):
        shutil.rmtree(copy.with_name(f"stage1-{step}-damaged"))
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.newest(checkpoints.restore_meta) is None


TROUBLE = [
    PermissionError("no"),
    MemoryError("none left"),
    RuntimeError("RESOURCE_EXHAUSTED"),
    # What an Orbax would raise whose API has moved.
    TypeError("restore() got an unexpected keyword argument 'args'"),
    AttributeError("'CheckpointManager' object has no attribute 'restore'"),
    KeyError("state"),
    NotImplementedError("legacy"),
    ValueError("Unknown handler"),
    FileNotFoundError("libcudart.so"),
    # And the storage, where the way to the files is closed.
    ValueError("PERMISSION_DENIED: Error reading local file"),
    ValueError("UNAVAILABLE: Error opening zarr driver"),
]


@pytest.mark.parametrize("error", TROUBLE, ids=lambda error: f"{type(error).__name__}: {error}")
def test_trouble_on_the_way_is_no_damage(error: Exception, copy: pathlib.Path, monkeypatch: Any) -> None:
    with Checkpoints(copy) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            checkpoints.newest(checkpoints.restore_meta)
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def test_a_step_is_not_repeated_twice_for_damage(copy: pathlib.Path) -> None:
    def damage_it() -> None:
        (copy / "2" / "meta" / "metadata").write_text("{}")

    damage_it()
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.newest(checkpoints.restore_meta) == (1, {"loss": 1 / 7, "none": None})
        checkpoints.save(2, state_of(2), data_state={"row": 2}, meta={"loss": 2 / 7, "none": None}, wait=True)
    damage_it()
    aside = copy.with_name("stage1-2-damaged")
    for _ in range(2):
        with Checkpoints(copy) as checkpoints, pytest.raises(ValueError, match=f"step 2 .*{aside}"):
            checkpoints.newest(checkpoints.restore_meta)
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]
    shutil.rmtree(aside)
    assert newest(copy) == expected(1) and aside.is_dir()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "zeros"])
def test_without_a_list_of_files_most_damage_is_known(kind: str, saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """As in a checkpoint whose process was killed before it could write one, or that an earlier version wrote."""
    names = ["state/_METADATA", "state/manifest.ocdbt", "sums/metadata", "data/metadata"]
    for name in names:
        directory = tmp_path / name / "stage1"
        shutil.copytree(saved, directory)
        (directory / "2" / "files.json").unlink()
        harm(directory / "2" / name, kind, random.Random(0))
        assert newest(directory) == expected(1), name


def test_a_list_that_can_not_be_made_is_missing(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    def no_answer(_: Any) -> Any:
        raise ConnectionError("503")

    monkeypatch.setattr(storage, "sizes_below", no_answer)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), data_state={"row": 1}, meta={"loss": 1 / 7, "none": None}, wait=True)
    assert not (tmp_path / "1" / "files.json").exists() and newest(tmp_path) == expected(1)


@pytest.mark.parametrize(
    "name", ["a [draft]", "100%", "x*y?", "ünï {1}", "-flag", "tab\tbed", "{a,b}", "~", "$HOME", "#1"]
)
def test_any_name_of_a_directory(name: str, saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """No character of a name is read as a pattern, an escape or a variable."""
    directory = tmp_path / name / "stage1"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), data_state={"row": step}, meta={"loss": step / 7, "none": None})
    assert newest(directory) == expected(2)
    (directory / "2" / "sums" / "metadata").unlink()
    assert newest(directory) == expected(1)
    assert {path.name for path in (tmp_path / name).iterdir()} == {"stage1", "stage1-2-damaged"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_sees_every_bit_and_its_place(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    size = np.dtype(dtype).itemsize
    raw = rng.integers(0, 2 if dtype == jnp.bool_ else 256, (3, 4, 5 * size), np.uint8)

    def sum_of(data: np.ndarray) -> int:
        return int(array_sum(jnp.asarray(data.view(dtype))))

    whole = sum_of(raw)
    assert whole == sum_of(raw.copy())
    for bit in range(0, raw.size * 8, 8 if dtype == jnp.bool_ else 1):
        changed = raw.copy().reshape(-1)
        changed[bit // 8] ^= 1 << bit % 8
        assert sum_of(changed.reshape(raw.shape)) != whole, bit
    for axis in range(3):
        turned = np.roll(raw, size if axis == 2 else 1, axis)
        assert sum_of(turned) != whole


def test_a_sum_does_not_depend_on_the_devices() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16, 4)), jnp.float32)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    for spec in ((), ("data",), ("fsdp", "data"), (None, None, "data")):
        assert int(array_sum(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))))) == int(array_sum(x))


def test_a_document_keeps_its_sum_through_a_file() -> None:
    document = {"b": (1, 2.5), "a": {"nan": float("nan"), "text": "é", "none": None}}
    read = {"a": {"text": "é", "none": None, "nan": float("nan")}, "b": [1, 2.5]}
    assert document_sum(document) == document_sum(read)
    assert document_sum(document) != document_sum(document | {"b": (1, 2.25)})
