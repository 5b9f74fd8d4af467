"""The mesh of a run: its sizes, the rows that go over it, and what is refused."""

import dataclasses

import pytest

from radlads_jax.config import Mesh, RunConfig, StageConfig, defaults, validate
from radlads_jax.distill import mesh as mesh_lib


def sizes(mesh: Mesh, devices: int, rows: dict[str, int], **options) -> tuple[int, ...]:
    of_axes = mesh_lib.mesh_sizes(mesh, devices, rows, **options)
    return tuple(of_axes[axis] for axis in ("data", "fsdp", "tensor"))


def test_mesh_sizes():
    rows = {"stage1": 32, "stage2": 96}
    assert sizes(Mesh(), 1, rows) == (1, 1, 1)
    assert sizes(Mesh(), 8, rows) == (1, 8, 1)
    assert sizes(Mesh(), 128, rows) == (1, 32, 4)
    assert sizes(Mesh(), 128, rows | {"stage3": 8}) == (1, 8, 16)
    assert sizes(Mesh(data=4), 128, rows) == (4, 8, 4)
    assert sizes(Mesh(tensor=8), 128, rows) == (1, 16, 8)
    assert sizes(Mesh(tensor=2), 128, rows) == (1, 32, 4)
    assert sizes(Mesh(fsdp=2), 8, rows) == (1, 2, 1)
    assert sizes(Mesh(), 8, rows, shared=True) == (1, 1, 1)
    assert sizes(Mesh(tensor=2), 8, rows, shared=True) == (1, 1, 2)


@pytest.mark.parametrize(
    ("mesh", "devices", "words"),
    [
        (Mesh(fsdp=8), 4, "asks for 8 devices"),
        (Mesh(tensor=3), 8, "asks for 3 devices or a multiple"),
        (Mesh(data=16), 8, "asks for 16 devices"),
        (Mesh(fsdp=5), 8, "stage2 has 8"),
        (Mesh(fsdp=16), 16, r"stage2\b.*data x fsdp = 16\b"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, devices, words):
    with pytest.raises(ValueError, match=words):
        mesh_lib.mesh_sizes(mesh, devices, {"stage2": 8})


def test_a_context_axis_that_does_not_divide_the_rows_is_refused():
    config = defaults()
    config.teacher.path, config.data.source, config.mesh.context = "x", "synthetic", 3
    with pytest.raises(ValueError, match=r"stage1\.seq_len.*mesh\.context.*\b3\b"):
        validate(config)


@pytest.mark.parametrize(
    ("accumulate", "mesh", "parts"),
    [(4, Mesh(data=2, fsdp=4, tensor=4), 4), (0, Mesh(data=2, fsdp=16, tensor=4), 3), (0, Mesh(fsdp=1), 96)],
)
def test_a_batch_is_cut_as_told_or_into_one_row_for_every_group(accumulate, mesh, parts):
    recipe = StageConfig(tokens=10**6, batch_size=96, accumulate=accumulate)
    run = dataclasses.replace(RunConfig(), mesh=mesh, stages=("stage2",), stage2=recipe)
    placed = mesh_lib.make_abstract_mesh(run, mesh.data * mesh.fsdp * mesh.tensor)
    assert mesh_lib.batch_parts(recipe, placed) == parts
