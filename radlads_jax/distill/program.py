"""A stage's training step as one compiled program: what it trains, what it reads, and where all of it lies."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from radlads_jax.config import RunConfig, StageConfig, Teacher
from radlads_jax.distill import mesh as mesh_lib
from radlads_jax.distill.losses import LossSums
from radlads_jax.distill.optim import make_optimizer
from radlads_jax.distill.stages import STAGES, Stage
from radlads_jax.distill.step import make_train_step
from radlads_jax.distill.train_state import TrainState
from radlads_jax.models import placement, sharding
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.decoder import abstract_params
from radlads_jax.models.tree import Params, split_params

# What the compiler is asked for beside its defaults, by the kind of chip.
COMPILER_OPTIONS: dict[str, dict[str, str]] = {
    # A v5p: weights are gathered in steps beside matrix products, as MaxText asks for.
    "TPU v5": {
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
        "xla_enable_async_all_gather": "true",
    },
    "TPU v6 lite": {
        # The sparse cores gather and scatter weights beside the matrix units, along two axes of the torus too; several
        # transfers may wait there while others run.
        "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
        "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
        "xla_tpu_enable_sparse_core_offload_queuing_in_lhs": "true",
        # One operation may take half of the 128 MiB of VMEM: larger tiles of a matrix product.
        "xla_tpu_scoped_vmem_limit_kib": "65536",
    },
}
_BATCH_DTYPES = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32, "loss_mask": jnp.float32}
_STORED_DTYPES = {"teacher_indices": jnp.int32, "teacher_log_probs": jnp.float32}


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage of a run: its name, the models it is about, and what it is spread over (None: one device)."""

    run: RunConfig
    name: str
    student: ModelConfig
    teacher: ModelConfig
    mesh: sharding.AnyMesh | None = None

    @property
    def stage(self) -> Stage:
        return STAGES[self.name]

    @property
    def recipe(self) -> StageConfig:
        return self.run.stage(self.name)

    @property
    def reads_logits(self) -> bool:
        """Whether the teacher's stored logits stand in its place."""
        return bool(self.run.teacher.logits) and self.stage.stored_loss_fn is not None

    @property
    def softening(self) -> dict[str, Any]:
        """Of the options of a KL to the live teacher, those that are not as they are by default."""
        if not self.stage.softens or self.reads_logits:
            return {}
        asked, default = self.run.teacher, Teacher()
        values = {name: getattr(asked, name) for name in ("temperature", "top_k")}
        return {name: value for name, value in values.items() if value != getattr(default, name)}

    @property
    def loss(self) -> str:
        """What the loss is, in words."""
        said = {"temperature": "at temperature {:g}", "top_k": "of its {:,} likeliest tokens and the rest"}
        told = {"top_k": self.run.teacher.stored_top_k} if self.reads_logits else self.softening
        return " ".join([self.stage.loss, *(said[name].format(value) for name, value in told.items())])

    @property
    def needs_weights(self) -> bool:
        """Whether the teacher itself is run."""
        return self.stage.needs_teacher and not self.reads_logits

    def on_one_device(self) -> "StagePlan":
        return dataclasses.replace(self, mesh=None)

    def trains(self, path: str) -> bool:
        """Whether the stage trains the parameter of a path."""
        return trains(self.run, self.student, self.name, path)


def trains(run: RunConfig, student: ModelConfig, name: str, path: str) -> bool:
    """Whether the run's stage of this name trains the parameter of a path."""
    frozen = run.stage(name).freeze
    return STAGES[name].trainable(path, student) and not any(re.search(pattern, path) for pattern in frozen)


def abstract_student(plan: StagePlan) -> tuple[Params, Params]:
    """(trained, frozen) parameters of a stage, as shapes with their shardings; what it does not read is left out."""
    trained, frozen = split_params(abstract_params(plan.student), plan.trains)
    if not plan.stage.whole_student:
        frozen = split_params(frozen, lambda path: plan.stage.trainable(path, plan.student))[0]
    return placement.abstract(plan.mesh, trained, plan.student), placement.abstract(plan.mesh, frozen, plan.student)


def abstract_state(plan: StagePlan) -> TrainState:
    """The stage's TrainState as shapes with their shardings."""
    trained, _ = abstract_student(plan)
    shapes = jax.eval_shape(lambda params: TrainState.create(params, _optimizer(plan)), trained)
    return placement.abstract(plan.mesh, shapes, plan.student)


def create_state(plan: StagePlan, params: Params) -> TrainState:
    """The stage's TrainState at its start; `params` is given up, so that the parameters are held once."""
    optimizer = _optimizer(plan)

    def create(params: Params) -> TrainState:
        return TrainState.create(params, optimizer)

    placed = placement.shardings(plan.mesh, jax.eval_shape(create, params), plan.student)
    return jax.jit(create, donate_argnums=0, out_shardings=placed)(params)


def _optimizer(plan: StagePlan) -> optax.GradientTransformation:
    return make_optimizer(plan.recipe, plan.run.optim, plan.student)


def make_step(plan: StagePlan) -> Any:
    """The stage's step(state, frozen, teacher, batch) -> (state, metrics), jitted, state donated.

    Over a mesh everything comes and stays as `sharding` places it; metrics are on every device. It is compiled with the
    COMPILER_OPTIONS of the mesh's devices, or of this process's first.
    """
    student, mesh = plan.student.in_training(), plan.mesh
    assert not isinstance(mesh, AbstractMesh), "a step is compiled for devices"
    stage_loss = plan.stage.stored_loss_fn if plan.reads_logits else plan.stage.loss_fn
    assert stage_loss is not None

    def loss_fn(params: Params, teacher_params: Params | None, batch: dict[str, jax.Array]) -> LossSums:
        return stage_loss(
            student,
            plan.teacher,
            params,
            teacher_params,
            batch,
            remat=plan.recipe.remat,
            slice_tokens=plan.run.train.slice_tokens or None,
            **plan.softening,
        )

    step = make_train_step(
        loss_fn,
        _optimizer(plan),
        accumulate=mesh_lib.batch_parts(plan.recipe, mesh),
        place=functools.partial(placement.constrain_params, cfg=student),
    )
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    options = COMPILER_OPTIONS.get(device.device_kind)
    if mesh is None:
        return jax.jit(step, donate_argnums=0, compiler_options=options)

    def step_over_mesh(*arguments: Any) -> Any:
        with sharding.traced_over(mesh):
            return step(*arguments)

    placed = (placement.shardings(mesh, abstract_state(plan), student), NamedSharding(mesh, PartitionSpec()))
    return jax.jit(step_over_mesh, donate_argnums=0, out_shardings=placed, compiler_options=options)


def abstract_arguments(plan: StagePlan) -> tuple:
    """What `make_step`'s step takes, as shapes with their shardings; the teacher in the dtype it is run in."""
    state, (_, frozen) = abstract_state(plan), abstract_student(plan)
    weights = None
    if plan.needs_weights:
        dtype = plan.run.teacher.dtype
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(plan.teacher))
        weights = placement.abstract(plan.mesh, shapes, plan.teacher)
    assert plan.mesh is not None, "shardings are over a mesh"
    placed = sharding.rows_sharding(plan.mesh, plan.recipe.batch_size)
    shape = (plan.recipe.batch_size, plan.recipe.seq_len)
    batch = {k: jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for k, dtype in _BATCH_DTYPES.items()}
    if plan.reads_logits:
        wide = (*shape, plan.run.teacher.stored_top_k)
        batch |= {k: jax.ShapeDtypeStruct(wide, dtype, sharding=placed) for k, dtype in _STORED_DTYPES.items()}
    return state, frozen, weights, batch
