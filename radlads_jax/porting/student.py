"""Stage 0: a student made of its teacher's weights and of new ones (RADLADS section 2, "weight transfer")."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.table import Table

from radlads_jax.models.config import ModelConfig
from radlads_jax.models.decoder import init_params
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.placement import shardings
from radlads_jax.models.tree import Params, in_mixer, merge_params, path_leaves, split_params, stack_of

_COPIED_PROJECTIONS = ("q", "k", "v", "o", "q_norm", "k_norm")
_EARLIER = "earlier run"
# Drawn anew by fresh_qkvo, as far as a mixer has them: qkv are three of them in one matrix.
_REFRESHED = ("q", "k", "v", "qkv", "o")


def init_mixers(
    cfg: ModelConfig, teacher: Params, seed: int, *, fresh_qkvo: bool = False, mesh: Mesh | None = None
) -> Params:
    """{"stacks": {i: {"mixer": ...}}} of the stacks whose mixers are not the teacher's, in cfg.param_dtype.

    q, k, v, o, their biases and norms are the teacher's (whose stacks are cut at the student's boundaries); with
    fresh_qkvo q, k, v and o are uniform in +-0.5 D^-1/2 and o is zero, the paper's ablation. A mixer with a k and v for
    every query head gets its kv head's copy, one of other sizes what it adopts (MixerSpec.adopt). All else is new, a
    function of the seed alone, and lies on `mesh` as the copies of a teacher on the same mesh do. Softmax layers that
    have other things than the teacher's begin with all of its weights in any case.
    """
    new = _init_changed(cfg, mesh)(seed)
    for i, stack in new["stacks"].items():
        is_fresh = fresh_qkvo and cfg.is_converted(i)
        # A copy even where the dtype is the same: training donates the student's buffers, never the teacher's.
        for name, own in ({} if is_fresh else _inherited(cfg, i, teacher["stacks"][i], stack["mixer"])).items():
            stack["mixer"][name] = jax.tree.map(functools.partial(_copied, cfg), own, stack["mixer"][name])
        if is_fresh:
            _refresh(cfg, stack["mixer"], jax.random.fold_in(jax.random.key(seed), i), mesh)
    return new


def _inherited(cfg: ModelConfig, stack: int, layers: Params, mixer: Params) -> Params:
    """What of a stack's mixer is the teacher's attention's, or made of its layers, by name.

    Only what the mixer has: one without biases leaves the teacher's out.
    """
    attention, adopted = layers["mixer"], MIXERS[cfg.stacks[stack][0]].adopt(cfg, layers)
    by_name = [n for n in _COPIED_PROJECTIONS if n in attention and n in mixer and n not in adopted]
    return {name: {leaf: attention[name][leaf] for leaf in mixer[name]} for name in by_name} | adopted


def _copied(cfg: ModelConfig, x: jax.Array, new: jax.Array) -> jax.Array:
    """The teacher's x in the place of a new parameter, which may have its heads several times."""
    if x.shape == new.shape:
        copy = jnp.array(x, cfg.param_dtype)
        return copy if copy.sharding == new.sharding else jax.device_put(copy, new.sharding)
    by_head = x.reshape(*x.shape[:-1], -1, cfg.head_dim)
    cloned = jnp.repeat(by_head, new.shape[-1] // x.shape[-1], axis=-2).reshape(new.shape)
    return jax.device_put(cloned.astype(cfg.param_dtype), new.sharding)


@functools.cache
def _init_changed(cfg: ModelConfig, mesh: Mesh | None) -> Callable[[int], Params]:
    """seed -> the mixers that are not the teacher's; under jit, so that what is not returned is not computed."""

    def init(seed: jax.Array) -> Params:
        stacks = init_params(cfg, jax.random.key(seed))["stacks"]
        return {"stacks": {i: {"mixer": stacks[i]["mixer"]} for i in range(len(cfg.stacks)) if cfg.is_changed(i)}}

    return jax.jit(init, out_shardings=shardings(mesh, jax.eval_shape(init, 0), cfg))


def _refresh(cfg: ModelConfig, mixer: Params, key: jax.Array, mesh: Mesh | None) -> None:
    bound = 0.5 * cfg.hidden_size**-0.5
    names = [name for name in _REFRESHED if name in mixer]
    for name, name_key in zip(names, jax.random.split(key, len(names)), strict=True):
        kernel = mixer[name]["kernel"]
        mixer[name] = jax.tree.map(jnp.zeros_like, mixer[name])
        if name != "o":
            uniform = functools.partial(jax.random.uniform, shape=kernel.shape, dtype=kernel.dtype)
            born = uniform if mesh is None else jax.jit(uniform, out_shardings=kernel.sharding)
            mixer[name]["kernel"] = born(name_key, minval=-bound, maxval=bound)


def whole_student(cfg: ModelConfig, base: Params, mixers: Params) -> Params:
    """The student's full tree: `base`, a teacher's in the student's dtype, with these mixers and a head of its own."""
    kept, _ = split_params(base, lambda path: not _in_changed_mixer(cfg, path))
    student = merge_params(kept, mixers)
    if "head" not in student and not cfg.tie_embeddings:
        student["head"] = {"kernel": base["embed"]["embedding"].T}
    return student


def aligned_alone(cfg: ModelConfig, mixers: Params) -> Params:
    """Of what `init_mixers` gives, the mixers that stage 1 brings near to their attention layers."""
    return {"stacks": {i: stack for i, stack in mixers["stacks"].items() if cfg.is_aligned(i)}}


def _in_changed_mixer(cfg: ModelConfig, path: str) -> bool:
    stack = stack_of(path)
    return stack is not None and in_mixer(path) and cfg.is_changed(stack)


def _attention_paths(cfg: ModelConfig, student: Params, teacher: Params) -> set[str]:
    """The paths of what mixers that are not the teacher's have of its attention."""
    paths: set[str] = set()
    for i, stack in student["stacks"].items():
        if cfg.is_changed(i) and "mixer" in stack:
            of_stack = functools.partial(_inherited, cfg, i)
            inherited = jax.eval_shape(of_stack, teacher["stacks"][i], stack["mixer"])
            paths |= {f"stacks/{i}/mixer/{path}" for path in path_leaves(inherited)}
    return paths


def _adopts_queries_alone(cfg: ModelConfig, student: Params) -> bool:
    """Whether the teacher's heads have gates, for which a converted layer's mixer has no place."""
    return cfg.output_gate and any(
        cfg.is_converted(i) and "q" not in stack["mixer"] for i, stack in student["stacks"].items()
    )


def transfer_table(
    cfg: ModelConfig, student: Params, teacher: Params, *, fresh_qkvo: bool = False, earlier: bool = False
) -> Table:
    """A line per parameter of the student: shape, and whether it is the teacher's, new, or an earlier run's."""
    teacher_paths, of_attention = path_leaves(teacher), _attention_paths(cfg, student, teacher)
    table = Table(title="Stage 0: what the student starts from", title_justify="left")
    for column in ("parameter", "shape", "from"):
        table.add_column(column)
    counts = dict.fromkeys(("teacher", "new", _EARLIER), 0)
    for path, leaf in path_leaves(student).items():
        in_changed = _in_changed_mixer(cfg, path)
        in_converted = in_changed and cfg.is_converted(int(path.split("/")[1]))
        if in_changed:
            from_teacher = path in of_attention and not (fresh_qkvo and in_converted)
        else:
            from_teacher = path in teacher_paths
        source = "teacher" if from_teacher or path == "head/kernel" else "new"
        source = _EARLIER if earlier and in_converted else source
        counts[source] += leaf.size
        of_embedding = " (embedding)" if path == "head/kernel" and not from_teacher else ""
        table.add_row(path, " x ".join(map(str, leaf.shape)), source + of_embedding)
    dropped = sorted(
        {
            "/".join(path.split("/")[3:])
            for path in teacher_paths.keys() - path_leaves(student).keys()
            # Matrices that are not there by their names are part of what the mixer adopts.
            if _in_changed_mixer(cfg, path) and not path.endswith("kernel")
        }
        | ({"the heads' gates"} if _adopts_queries_alone(cfg, student) else set())
    )
    left_out = f"; of the teacher's attention left out: {', '.join(dropped)}" if dropped and not fresh_qkvo else ""
    of_earlier = f", {counts[_EARLIER]:,} of an earlier run" if earlier else ""
    table.caption = f"{counts['teacher']:,} values copied, {counts['new']:,} new{of_earlier}{left_out}"
    return table
