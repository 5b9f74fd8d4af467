import json
import os
import re
import struct

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from radlads_jax.porting.safetensors_read import INDEX_FILE, SINGLE_FILE, open_checkpoint, read_header
from radlads_jax.porting.safetensors_write import PlannedTensor, plan_files, write_file, write_index

NUMPY_DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int8, np.uint8, np.bool_]


def tensors_of_all_dtypes() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values = {np.dtype(dtype).name: rng.integers(0, 2, (3, 5)).astype(dtype) for dtype in NUMPY_DTYPES}
    return values | {"scalar": np.array(7, np.float32), "empty": np.zeros((0, 4), np.float32)}


def planned(tensors: dict[str, np.ndarray]) -> list[PlannedTensor]:
    return [PlannedTensor(name, value.shape, value.dtype, lambda v=value: v) for name, value in tensors.items()]


def write_raw(path, header: dict | str | bytes, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(start: int, stop: int, dtype: str = "F32", shape: list | None = None) -> dict:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def test_reads_what_the_official_library_writes(tmp_path):
    tensors = tensors_of_all_dtypes()
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    stored = open_checkpoint(tmp_path)
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        got = stored[name].open()
        assert (got.shape, got.dtype) == (value.shape, value.dtype)
        assert got.tobytes() == value.tobytes()
        if value.ndim and value.size:
            (some,) = stored[name].read_rows([(1, 3)])
            assert (some.shape, some.dtype, some.tobytes()) == ((2, 5), value.dtype, value[1:3].tobytes())


def test_the_official_library_reads_what_we_write(tmp_path):
    tensors = tensors_of_all_dtypes()
    write_file(tmp_path / "x.safetensors", planned(tensors))
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].tobytes() == tensors[name].tobytes() for name in tensors)
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_data_starts_aligned(tmp_path):
    for length in range(1, 9):
        write_file(tmp_path / "x.safetensors", planned({"n" * length: np.ones(2, np.float32)}))
        assert read_header(tmp_path / "x.safetensors")["n" * length].start % 8 == 0


def test_opening_maps_the_file_without_copying_it(tmp_path):
    save_file({"a": np.arange(10, dtype=np.float32), "b": np.ones(3, np.float32)}, tmp_path / SINGLE_FILE)
    view = open_checkpoint(tmp_path)["a"].open()
    assert not view.flags.owndata
    assert not view.flags.writeable
    with open(tmp_path / SINGLE_FILE, "r+b") as file:
        file.seek(open_checkpoint(tmp_path)["a"].start)
        file.write(struct.pack("<f", 99.0))
    assert view[0] == 99.0


BAD_HEADERS = {
    "not json": ("{", b""),
    "not utf-8": (b"\xff\xff", b""),
    "a list": ("[]", b""),
    "nested too deep": ("[" * 100_000, b""),
    "duplicate": ('{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": 1}', b""),
    "no text in the metadata": ('{"__metadata__": {"a": true}}', b""),
    "no object of metadata": ('{"__metadata__": ["a"]}', b""),
    "not a number": ('{"__metadata__": {"a": NaN}}', b""),
    "half a surrogate pair": (r'{"__metadata__": {"a": "\ud800"}}', b""),
    "half a surrogate pair as a key": (r'{"__metadata__": {"\ud800": "a"}}', b""),
    "half a surrogate pair in a list": (
        r'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0],"more":[["\ud800"]]}}',
        b"",
    ),
    "no entry": ({"a": 7}, b""),
    "unknown dtype": ({"a": entry(0, 4, "F4")}, bytes(4)),
    "dtype of another type": ({"a": entry(0, 4, ["F32"])}, bytes(4)),
    "negative size": ({"a": entry(0, 4, shape=[-1])}, bytes(4)),
    "boolean size": ({"a": entry(0, 4, shape=[True])}, bytes(4)),
    "size of another type": ({"a": entry(0, 4, shape=["1"])}, bytes(4)),
    "shape of another type": ({"a": entry(0, 4, shape=4)}, bytes(4)),
    "huge size": ({"a": entry(0, 4, shape=[1 << 70])}, bytes(4)),
    "overflowing size": ({"a": entry(0, 4, shape=[1 << 61, 1 << 61, 1 << 61])}, bytes(4)),
    "wrong size": ({"a": entry(0, 8, shape=[1])}, bytes(8)),
    "backward": ({"a": entry(4, 0, shape=[1])}, bytes(4)),
    "three offsets": ({"a": entry(0, 4) | {"data_offsets": [0, 4, 8]}}, bytes(8)),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "gap": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "late start": ({"a": entry(4, 8)}, bytes(8)),
    "too long": ({"a": entry(0, 4)}, bytes(8)),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(tmp_path, case):
    header, data = BAD_HEADERS[case]
    write_raw(tmp_path / SINGLE_FILE, header, data)
    with pytest.raises(ValueError, match=SINGLE_FILE):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [3, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_impossible_header_lengths_are_refused(tmp_path, length):
    write_raw(tmp_path / SINGLE_FILE, "{}", length=length)
    with pytest.raises(ValueError, match=SINGLE_FILE):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 8, 40, -1])
def test_truncated_files_are_refused_with_their_sizes(tmp_path, kept):
    save_file({"a": np.ones(1000, np.float32)}, tmp_path / SINGLE_FILE)
    whole = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=SINGLE_FILE) as raised:
        open_checkpoint(tmp_path)
    assert str(len(whole[:kept])) in str(raised.value)
    if kept == -1:
        assert f"got {len(whole) - 1} bytes, expected {len(whole)}" in str(raised.value)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), min_size=1, max_size=4))
@hypothesis.settings(max_examples=300, deadline=None)
def test_flipped_header_bytes_never_give_tensors_outside_the_file(tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("flipped") / SINGLE_FILE
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.float16)}, path)
    content = bytearray(path.read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    path.write_bytes(content)
    try:
        stored = read_header(path)
    except ValueError:
        return
    for tensor in stored.values():
        assert 8 <= tensor.start <= tensor.stop <= len(content)
        assert tensor.open().nbytes == tensor.stop - tensor.start


def sharded(directory, weight_map: object) -> None:
    save_file({"a": np.ones(2, np.float32)}, directory / "one.safetensors")
    save_file({"b": np.ones(3, np.float32)}, directory / "two.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": weight_map}))


def test_reads_the_files_of_an_index(tmp_path):
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    stored = open_checkpoint(tmp_path)
    assert {name: tensor.file.name for name, tensor in stored.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }
    assert stored["b"].open().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({}, "weight_map"),
        (None, "weight_map"),
        (["a"], "weight_map"),
        ({"a": 1, "b": "two.safetensors"}, "1"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "three.safetensors"),
        ({"a": "one.safetensors", "b": "../two.safetensors"}, r"\.\./two"),
        ({"a": "one.safetensors", "b": "/etc/two.safetensors"}, "/etc/two"),
        ({"a": "one.safetensors", "b": "sub\\two.safetensors"}, "two.safetensors"),
        ({"a": "one.safetensors", "b": "pytorch_model.bin"}, "pytorch_model.bin"),
    ],
)
def test_wrong_indices_are_refused(tmp_path, weight_map, named):
    sharded(tmp_path, weight_map)
    with pytest.raises(ValueError, match=named):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "there"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors"}, {"a"}),
        ({"a": "one.safetensors", "c": "two.safetensors"}, {"a"}),
        ({"b": "two.safetensors"}, {"b"}),
    ],
)
def test_what_the_index_lists_is_what_there_is(tmp_path, weight_map, there):
    sharded(tmp_path, weight_map)
    assert open_checkpoint(tmp_path).keys() == there


def test_of_a_tensor_in_two_files_the_index_says_which(tmp_path):
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": np.zeros(2, np.float32), "b": np.ones(3, np.float32)}, tmp_path / "two.safetensors")
    assert open_checkpoint(tmp_path)["a"].open().tolist() == [1, 1]


def test_a_directory_without_weights_says_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} .*\bno weights\b.*{re.escape(SINGLE_FILE)}"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*pickle.*save_pretrained"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'missing'))} .*\bdirectory\b"):
        open_checkpoint(tmp_path / "missing")


def test_files_without_an_index_are_refused_unless_there_is_one(tmp_path):
    sharded(tmp_path, {})
    os.remove(tmp_path / INDEX_FILE)
    with pytest.raises(ValueError, match=rf"\b2 safetensors files\b.*{re.escape(INDEX_FILE)}"):
        open_checkpoint(tmp_path)
    os.remove(tmp_path / "two.safetensors")
    assert open_checkpoint(tmp_path).keys() == {"a"}


def test_files_are_filled_up_to_the_limit_and_indexed(tmp_path):
    tensors = {f"t{i}": np.full(size, i, np.float32) for i, size in enumerate([4, 4, 100, 2, 2, 4])}
    files = plan_files(planned(tensors), max_shard_size=32)
    names = [[tensor.name for tensor in file] for file in files.values()]
    assert names == [["t0", "t1"], ["t2"], ["t3", "t4", "t5"]]
    assert list(files) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, file in files.items():
        write_file(tmp_path / name, file)
    write_index(tmp_path, files)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    stored = open_checkpoint(tmp_path)
    assert all(stored[name].open().tobytes() == value.tobytes() for name, value in tensors.items())


def test_a_tensor_other_than_planned_is_refused(tmp_path):
    wrong = PlannedTensor("a", (3,), np.dtype(np.float32), lambda: np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"^a .*float32 \(4,\).*float32 \(3,\)"):
        write_file(tmp_path / "x.safetensors", [wrong])
