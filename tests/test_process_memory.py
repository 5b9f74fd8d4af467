"""A process does not grow with every checkpoint."""

import gc
import os
import pathlib
import platform
import subprocess
import sys
import tracemalloc
from typing import Any

import jax.numpy as jnp
import pytest
import tensorstore

from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.system import process_memory


def snapshot() -> tracemalloc.Snapshot:
    """Without what the garbage collector has not come to yet, which in a long session of tests is seldom."""
    gc.collect()
    return tracemalloc.take_snapshot()


def test_saving_holds_no_memory(tmp_path: pathlib.Path) -> None:
    """Strings, which no garbage collector counts, beside what it does; the names of directories come and go."""
    process_memory.install()
    state = {f"p{i}": jnp.ones(8) for i in range(40)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        tracemalloc.start()
        for step in range(1, 46):
            checkpoints.save(step, state, data_state={}, meta={}, wait=True)
            if step == 35:
                before = snapshot()
        after = snapshot()
        tracemalloc.stop()
    own = tracemalloc.Filter(False, tracemalloc.__file__)
    differences = after.filter_traces([own]).compare_to(before.filter_traces([own]), "lineno")
    grown = {str(s.traceback): s.count_diff for s in differences}
    assert max(grown.values()) < 10 * 40, {place: count for place, count in grown.items() if count > 100}


@pytest.mark.parametrize(
    "spec",
    [
        {"driver": "file", "path": "/a b/c/"},
        {"driver": "file", "path": "/a/", "file_io_locking": {"mode": "non_atomic"}},
        {"driver": "memory", "path": "x/"},
        "file:///a%20b/",
    ],
    ids=str,
)
def test_tensorstores_specs_are_what_they_were(spec: Any) -> None:
    process_memory.install()
    made = tensorstore.KvStore.Spec(spec)
    assert tensorstore.KvStore.Spec(made.to_json()) == made
    assert made.to_json()["path"] == made.path


@pytest.mark.parametrize(
    ("version", "is_needed"), [("0.1.75", False), ("0.1.76", True), ("0.1.86", True), ("0.1.87", False), ("0.2", False)]
)
def test_only_the_versions_that_need_it_are_changed(version: str, is_needed: bool) -> None:
    assert process_memory.needed(version) == is_needed


COUNT_HEAPS = """
import ctypes, threading
from radlads_jax.system import process_memory
process_memory.install()
libc, begin = ctypes.CDLL(None), threading.Barrier(24)
libc.fopen.restype = ctypes.c_void_p
def allocate():
    begin.wait()
    libc.malloc(64)
    begin.wait()
threads = [threading.Thread(target=allocate) for _ in range(24)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
file = ctypes.c_void_p(libc.fopen(b"heaps.xml", b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts the heaps of glibc")
@pytest.mark.parametrize(("environ", "most"), [({}, process_memory.HEAPS), ({"MALLOC_ARENA_MAX": "7"}, 7)])
def test_threads_share_few_heaps(environ: dict, most: int, tmp_path: pathlib.Path) -> None:
    root = str(pathlib.Path(__file__).parent.parent)
    plain = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    subprocess.run(
        [sys.executable, "-c", COUNT_HEAPS], cwd=tmp_path, env=plain | {"PYTHONPATH": root} | environ, check=True
    )
    assert (tmp_path / "heaps.xml").read_text().count("<heap nr") == most
