"""What another mixer in some of a teacher's layers costs it: KL on text, and the likelihood of answers far back.

Forward passes only, of two compiled programs, whatever the layers (models/swapped.py); a pass that differs from
another in one layer begins there.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.linear_loss import linear_kl
from pallas_kernels.sharded import constrain
from radlads_jax.data.packing import whole_batches
from radlads_jax.evaluation.probes import Example
from radlads_jax.models import ModelConfig, bind, sharding
from radlads_jax.models.swapped import Inputs, hidden_from, layer_inputs
from radlads_jax.models.tree import Params

Batch = Mapping[str, np.ndarray]


class Measured(NamedTuple):
    """kl: nats a token of every text row; nll: nats a token of every prompt's answer; right: whether each of its tokens
    is the most likely one after the right ones."""

    kl: Float[np.ndarray, " R"]
    nll: Float[np.ndarray, " P"]
    right: Float[np.ndarray, " P"]


class Rows(NamedTuple):
    """Batches of one shape. prompts: with "at" (the token before each of the answer's), "answer", "counted"."""

    texts: Sequence[Batch]
    prompts: Sequence[Batch]
    num_texts: int
    num_prompts: int


def text_rows(rows: Sequence[Batch], count: int, batch_size: int, length: int) -> tuple[list[Batch], int]:
    """The first `count` rows (arrays [B, T] of tokens, segment_ids, positions) that are not all padding.

    Cut, or padded, to one length, in whole batches; and how many they are.
    """
    names = ("tokens", "segment_ids", "positions")
    joined = {name: np.concatenate([batch[name] for batch in rows])[:, :length] for name in names}
    kept = np.flatnonzero((joined["segment_ids"] > 0).any(axis=1))[:count]
    return _batches({name: _wide(values[kept], length) for name, values in joined.items()}, batch_size)


def prompt_rows(examples: Sequence[Example], batch_size: int, length: int) -> tuple[list[Batch], int]:
    """Prompts with their answers as rows of one length."""
    longest = max(len(e.ids) - e.start for e in examples)
    tokens = np.stack([_padded(e.ids, length) for e in examples])
    real = np.arange(length) < np.asarray([[len(e.ids)] for e in examples])
    rows = {
        "tokens": tokens,
        "segment_ids": real.astype(np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        "at": np.stack([_padded(range(e.start - 1, len(e.ids) - 1), longest) for e in examples]),
        "answer": np.stack([_padded(e.ids[e.start :], longest) for e in examples]),
        "counted": np.stack([_padded([1] * (len(e.ids) - e.start), longest) for e in examples]),
    }
    return _batches(rows, batch_size)


def _padded(values: Sequence[int], length: int) -> np.ndarray:
    return np.pad(np.asarray(values, np.int32), (0, length - len(values)))


def _wide(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, length - values.shape[1]))).astype(np.int32)


def _batches(rows: Mapping[str, np.ndarray], size: int) -> tuple[list[Batch], int]:
    """In whole batches, and how many rows are in them without those that fill up the last one."""
    count = len(rows["tokens"])
    batches = whole_batches(count, size)
    return [{name: values[numbers] for name, values in rows.items()} for numbers in batches], count


class Student(NamedTuple):
    """Whose mixers stand in the teacher's layers (models/swapped.py); the parameters of windows are the teacher's."""

    cfg: ModelConfig
    params: Params


class Swaps:
    """A softmax teacher's losses with a student's mixers in some of its layers.

    params, and the student's: placed over `mesh`, where there is one; every process has all rows, and computes its part
    of them. step: called after every pass of a batch.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        rows: Rows,
        student: Student,
        *,
        mesh: Mesh | None = None,
        step: Callable[[], None] = lambda: None,
    ):
        self.cfg, self.params, self.rows, self.student, self.mesh, self.step = cfg, params, rows, student, mesh, step
        nowhere = np.zeros(cfg.num_layers, bool)
        self._placed = [[self._on_devices(batch) for batch in kind] for kind in (rows.texts, rows.prompts)]
        self._teacher = [self._pass(_inputs, batch, nowhere).hidden for batch in self._placed[0]]

    def flipped(self, swapped: Bool[np.ndarray, " L"], layers: Sequence[int]) -> tuple[Measured, list[Measured]]:
        """With these layers swapped, and with each of `layers` alone changed, from swapped to its own or otherwise."""
        texts = [self._batch(batch, swapped, layers, i) for i, batch in enumerate(self._placed[0])]
        prompts = [self._batch(batch, swapped, layers, None) for batch in self._placed[1]]
        kl = np.concatenate(texts, axis=1)[:, : self.rows.num_texts]
        nll, right = np.concatenate(prompts, axis=-1)[..., : self.rows.num_prompts].swapaxes(0, 1)
        base, *others = map(Measured, kl, nll, right)
        return base, others

    def _batch(self, batch, swapped, layers, text: int | None) -> Float[np.ndarray, "C *of_row B"]:
        """One batch's losses by row: as the layers are swapped, then with each of `layers` changed."""
        inputs = self._pass(_inputs, batch, swapped)
        losses = [self._losses(inputs.hidden, batch, text)]
        for layer in layers:
            other = swapped.copy()
            other[layer] = ~other[layer]
            losses.append(self._losses(self._pass(_from, batch, other, inputs.layers, np.int32(layer)), batch, text))
        return np.stack(losses)

    def _losses(self, hidden: Array, batch, text: int | None) -> np.ndarray:
        with sharding.traced_over(self.mesh):
            if text is None:
                return jax.device_get(_answers_nll(self.cfg, self.params, hidden, batch))
            return jax.device_get(_rows_kl(self.cfg, self.params, hidden, self._teacher[text], batch))

    def _pass(self, run, batch, swapped: np.ndarray, *more: Any):
        rows = (batch["tokens"], batch["segment_ids"], batch["positions"])
        with sharding.traced_over(self.mesh):
            result = run(self.cfg, self.student.cfg, self.params, self.student.params, swapped, *more, *rows)
        self.step()
        return result

    def _on_devices(self, batch: Batch) -> dict[str, Array]:
        return sharding.place_whole(self.mesh, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _inputs(
    cfg: ModelConfig, of_student: ModelConfig, params: Params, student: Params, swapped: Array, *rows: Array
) -> Inputs:
    return layer_inputs(bind(cfg, params), bind(of_student, student), swapped, *rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _from(cfg: ModelConfig, of_student: ModelConfig, params: Params, student: Params, swapped: Array, *more: Array):
    return hidden_from(bind(cfg, params), bind(of_student, student), swapped, *more)


@functools.partial(jax.jit, static_argnums=0)
def _rows_kl(
    cfg: ModelConfig,
    params: Params,
    hidden: Float[Array, "B T D"],
    teacher: Float[Array, "B T D"],
    batch: Mapping[str, Array],
) -> Float[Array, " B"]:
    kernel, layout = bind(cfg, params).head_kernel()
    kernel = kernel.astype(hidden.dtype)

    def of_row(inputs: tuple[Array, Array, Array]) -> Array:
        own, target, segments = inputs
        counted = (segments > 0).astype(jnp.float32)
        options: dict[str, Any] = {"kernel_layout": layout, "teacher_kernel_layout": layout}
        return linear_kl(own, kernel, target, kernel, counted, **options) / jnp.maximum(counted.sum(), 1)

    # On every device, so that every process can read it.
    return constrain(jax.lax.map(of_row, (hidden, teacher, batch["segment_ids"])))


@functools.partial(jax.jit, static_argnums=0)
def _answers_nll(
    cfg: ModelConfig, params: Params, hidden: Float[Array, "B T D"], batch: Mapping[str, Int[Array, "B _"]]
) -> Float[Array, "2 B"]:
    """Of every row the answer's NLL a token, and 1 where each token of it is the most likely one."""
    asked = jnp.take_along_axis(hidden, batch["at"][..., None], axis=1)
    log_probabilities = jax.nn.log_softmax(bind(cfg, params).logits(asked))
    chosen = jnp.take_along_axis(log_probabilities, batch["answer"][..., None], axis=-1)[..., 0]
    nll = -(chosen * batch["counted"]).sum(1) / batch["counted"].sum(1)
    right = (log_probabilities.argmax(-1) == batch["answer"]) | (batch["counted"] == 0)
    return constrain(jnp.stack([nll, right.all(1).astype(nll.dtype)]))
