"""The mesh of a run: how many devices lie along each axis, and how many parts a batch is computed in."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import Mesh as DeviceMesh

from pallas_kernels.sharded import ROWS
from radlads_jax import config as config_lib
from radlads_jax.models.sharding import AXES, AnyMesh


def mesh_sizes(mesh: config_lib.Mesh, devices: int, rows: Mapping[str, int], *, shared: bool = False) -> dict[str, int]:
    """Devices along each axis of a run with so many devices.

    rows: of every stage, those computed at once. shared: the devices are those of a CPU, of which fsdp = -1 takes one.
    Raises ValueError where the sizes do not go with the devices, or the rows not with the sizes.
    """
    fixed = mesh.data * mesh.tensor * mesh.context
    asked = fixed * max(mesh.fsdp, 1)
    if asked > devices or (mesh.fsdp == -1 and not shared and devices % fixed):
        raise ValueError(
            f"config.mesh asks for {asked} devices{' or a multiple' if mesh.fsdp == -1 else ''} (data x fsdp x tensor "
            f"x context), but there are {devices}; expected no more, and with fsdp = -1 a divisor. Change config.mesh."
        )
    left = mesh.fsdp if mesh.fsdp != -1 else 1 if shared else devices // fixed
    for more in range(1, left + 1) if mesh.fsdp == -1 else [1]:
        fsdp = left // more
        if fsdp * more == left and all(n % (mesh.data * fsdp) == 0 for n in rows.values()):
            return {"data": mesh.data, "fsdp": fsdp, "tensor": more * mesh.tensor, "context": mesh.context}
    shown = ", ".join(f"{name} has {n}" for name, n in rows.items())
    raise ValueError(
        f"the rows computed at once (batch_size / accumulate: {shown}) can not be split over data x fsdp = "
        f"{mesh.data * left} groups of devices; expected a multiple in every stage. Lower config.mesh.data or fsdp and "
        "raise config.mesh.tensor, or change batch_size or accumulate."
    )


def make_mesh(run: config_lib.RunConfig, devices: Any = None) -> DeviceMesh | None:
    """The mesh of a run over `devices` (default: all there are); None where it would have one device."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(run.mesh, len(devices), _rows_at_once(run), shared=devices[0].platform == "cpu")
    shape = tuple(sizes[axis] for axis in AXES)
    count = int(np.prod(shape))
    if count < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"config.mesh takes {count} of the {len(devices)} devices of {jax.process_count()} processes; expected all "
            "of them. Raise config.mesh.fsdp, data, tensor or context, or start fewer processes."
        )
    if count == 1:
        return None
    # Not jax.make_mesh: on chips with a torus of three dimensions it refuses a mesh axis that is a part of one of them.
    placed = mesh_utils.create_device_mesh(shape, devices[:count], allow_split_physical_axes=True)
    return DeviceMesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_abstract_mesh(run: config_lib.RunConfig, devices: int) -> AbstractMesh:
    """The mesh of a run over so many devices of an accelerator, of which none need be there."""
    sizes = mesh_sizes(run.mesh, devices, _rows_at_once(run))
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _rows_at_once(run: config_lib.RunConfig) -> dict[str, int]:
    return {name: recipe.batch_size // max(recipe.accumulate, 1) for name, recipe in run.recipes.items()}


def batch_parts(recipe: config_lib.StageConfig, mesh: AnyMesh | None) -> int:
    """How many parts a batch is computed in. accumulate = 0: so many that a group of devices has one row of each."""
    groups = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)
    return recipe.accumulate or recipe.batch_size // groups
