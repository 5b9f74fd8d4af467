"""KL to the teacher where the model is used: on what the teacher itself says after a prompt, beside that on text.

    KL = sum_t KL(teacher(. | prompt, y_<t) || model(. | prompt, y_<t)) / tokens

y is the text's own continuation ("text"), or the teacher's, greedy or drawn ("completions"); nothing of the prompt is
counted. Intervals are of 95%, by a bootstrap over the prompts.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_loss import linear_stats
from radlads_jax.data.packing import whole_batches
from radlads_jax.decoding.generation import generate
from radlads_jax.decoding.loaded import Model
from radlads_jax.decoding.sampling import Sampling
from radlads_jax.evaluation import probes
from radlads_jax.models import ModelConfig, bind
from radlads_jax.models.tree import Params
from radlads_jax.system import storage

_DRAWS = 1000
_INTERVAL = (2.5, 97.5)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """So many prompts of prompt_tokens each, continued by new_tokens at most. temperature: 0 for the likeliest."""

    prompts: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 8

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens


class _Rows(NamedTuple):
    """Prompts and what follows them; counted [N, M] marks what is there of the M tokens behind the prompt."""

    tokens: Int[np.ndarray, "N T"]
    counted: Float[np.ndarray, "N M"]


class Reference(NamedTuple):
    """What is kept of the teacher when it leaves memory: its last hidden states and its head.

    rows, hidden: by the name of what they are of, "text" and "completions"; layout: how the head's matrix lies.
    """

    sizes: Sizes
    rows: Mapping[str, _Rows]
    hidden: Mapping[str, Float[np.ndarray, "N M D"]]
    kernel: Float[np.ndarray, "_ _"]
    layout: str


def check_sizes(sizes: Sizes, teacher: ModelConfig, student: ModelConfig) -> None:
    """Raises ValueError for prompts that do not fit the teacher, and a student of another vocabulary."""
    if sizes.tokens > teacher.max_position_embeddings:
        raise ValueError(
            f"--completions reads rows of {sizes.tokens} tokens, {sizes.prompt_tokens} of them a prompt, and the "
            f"teacher reads {teacher.max_position_embeddings:,}; expected rows no longer than that. Take a teacher "
            "with a longer context, or leave --completions out."
        )
    if teacher.vocab_size != student.vocab_size:
        raise ValueError(
            f"--completions compares the probabilities of all tokens, and --teacher has {teacher.vocab_size:,} of "
            f"them and --model {student.vocab_size:,}; expected the same. Give the student's own teacher, or leave "
            "--completions out."
        )


def text_rows(tokenizer: Any, sizes: Sizes, text_file: storage.AnyPath | None = None) -> Int[np.ndarray, "N T"]:
    """Prompts with what follows them in the file's text, or in made-up tales; `tokenizer` is the teacher's.

    Raises ValueError for a file with too little text, or that is not UTF-8.
    """
    text, length = probes.Text(tokenizer, sizes.seed), sizes.prompts * sizes.tokens
    if text_file is not None and (there := len(text.of_file(text_file))) < length:
        raise ValueError(
            f"--probe_text {text_file} holds {there:,} tokens; expected {length:,}, for {sizes.prompts} prompts and "
            "what follows them. Give a longer text, or lower --completions."
        )
    return probes.rows_of_text(text, sizes.prompts, sizes.tokens, text_file)


def reference(teacher: Model, sizes: Sizes, text_file: storage.AnyPath | None = None) -> Reference:
    """The teacher's continuations of prompts out of the file, or of made-up tales, and its hidden states on both.

    Raises ValueError as `text_rows`, and where the teacher ends all of its answers at once.
    """
    tokens = text_rows(teacher.tokenizer, sizes, text_file)
    whole = np.ones((sizes.prompts, sizes.new_tokens), np.float32)
    rows = {"text": _Rows(tokens, whole), "completions": _continued(teacher, sizes, tokens)}
    hidden = {name: _hidden_states(teacher, of, sizes) for name, of in rows.items()}
    kernel, layout = bind(teacher.cfg, teacher.params).head_kernel()
    return Reference(sizes, rows, hidden, np.asarray(kernel), layout)


def _continued(teacher: Model, sizes: Sizes, tokens: Int[np.ndarray, "N T"]) -> _Rows:
    """The rows with the teacher's own continuation behind their prompts."""
    rows, counted = tokens.copy(), np.zeros((len(tokens), sizes.new_tokens), np.float32)
    rows[:, sizes.prompt_tokens :] = 0
    for numbers in whole_batches(len(tokens), sizes.batch_size):
        prompts = tokens[numbers, : sizes.prompt_tokens].tolist()
        made: list[list[int]] = [[] for _ in prompts]
        sampling = Sampling(sizes.temperature)
        options: dict[str, Any] = {"sampling": sampling, "seed": sizes.seed, "numbers": numbers.tolist()}
        for step in generate(teacher, prompts, max_tokens=sizes.new_tokens, **options):
            made = [row + new for row, new in zip(made, step.tokens, strict=True)]
        for number, new in zip(numbers, made, strict=True):
            rows[number, sizes.prompt_tokens : sizes.prompt_tokens + len(new)] = new
            counted[number, : len(new)] = 1
    if not counted.any():
        raise ValueError(
            f"the teacher ends each of its {len(tokens)} continuations at once, so that nothing of --completions is "
            "left to compare; expected text that it goes on with. Give another --probe_text."
        )
    return _Rows(rows, counted)


def _hidden_states(model: Model, rows: _Rows, sizes: Sizes) -> Float[np.ndarray, "N M D"]:
    parts = [
        np.asarray(_hidden(model.cfg, sizes.prompt_tokens, model.params, rows.tokens[numbers]))
        for numbers in whole_batches(len(rows.tokens), sizes.batch_size)
    ]
    return np.concatenate(parts)[: len(rows.tokens)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden(cfg: ModelConfig, prompt_tokens: int, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B M D"]:
    """The states that predict what follows the prompt; what stands behind its end changes none before it."""
    hidden, _ = bind(cfg, params).hidden(tokens)
    return hidden[:, prompt_tokens - 1 : -1]


def measure(model: Model, teacher: Reference) -> dict[str, dict[str, Any]]:
    """{"text", "completions": {"tokens", "nll", "teacher_nll", "kl", "interval", "agreement"}}, per counted token.

    interval: of the KL; agreement: the share of tokens at which both find the same one likeliest.
    """
    return {name: _means(_row_sums(model, name, teacher), rows.counted) for name, rows in teacher.rows.items()}


def _row_sums(model: Model, name: str, teacher: Reference) -> dict[str, Float[np.ndarray, " N"]]:
    rows, sizes = teacher.rows[name], teacher.sizes
    kernel = jnp.asarray(teacher.kernel)
    parts = []
    for numbers in whole_batches(len(rows.tokens), sizes.batch_size):
        hidden = _hidden(model.cfg, sizes.prompt_tokens, model.params, rows.tokens[numbers])
        targets = rows.tokens[numbers, sizes.prompt_tokens :]
        compared = (hidden, teacher.hidden[name][numbers], targets, rows.counted[numbers])
        parts.append(jax.device_get(_sums(model.cfg, teacher.layout, model.params, kernel, *compared)))
    return {key: np.concatenate([part[key] for part in parts])[: len(rows.tokens)] for key in parts[0]}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(
    cfg: ModelConfig,
    teacher_layout: str,
    params: Params,
    teacher_kernel: Float[Array, "_ _"],
    hidden: Float[Array, "B M D"],
    teacher_hidden: Float[Array, "B M D2"],
    targets: Int[Array, "B M"],
    counted: Float[Array, "B M"],
) -> dict[str, Float[Array, " B"]]:
    """`linear_stats` of every row."""
    kernel, layout = bind(cfg, params).head_kernel()
    options: dict[str, Any] = {"kernel_layout": layout, "teacher_kernel_layout": teacher_layout}

    def of_row(row: tuple[Array, ...]) -> dict[str, Array]:
        own, other, following, weights = row
        head = teacher_kernel.astype(other.dtype)
        return linear_stats(own, kernel.astype(own.dtype), following, weights, other, head, **options)

    return jax.lax.map(of_row, (hidden, teacher_hidden, targets, counted))


def _means(sums: Mapping[str, Float[np.ndarray, " N"]], counted: Float[np.ndarray, "N M"]) -> dict[str, Any]:
    of_row = counted.sum(1)
    tokens = of_row.sum()
    names = {"nll": "loss", "teacher_nll": "teacher_loss", "kl": "kl", "agreement": "agreement"}
    means: dict[str, Any] = {name: float(sums[key].sum() / tokens) for name, key in names.items()}
    return means | {"tokens": int(tokens), "interval": _interval(sums["kl"], of_row)}


def _interval(kl: Float[np.ndarray, " N"], tokens: Float[np.ndarray, " N"]) -> list[float]:
    """Of the KL a token, over draws of as many prompts; those that the teacher did not go on with count none."""
    kl, tokens = kl[tokens > 0], tokens[tokens > 0]
    drawn = np.random.default_rng(0).integers(0, len(kl), (_DRAWS, len(kl)))
    return [float(x) for x in np.percentile(kl[drawn].sum(1) / tokens[drawn].sum(1), _INTERVAL)]


def table(by_role: Mapping[str, Mapping[str, Mapping[str, Any]]], sizes: Sizes) -> list[str]:
    """The lines of a Markdown table; by_role: what `measure` gives of each model but the teacher."""
    lines = ["| on | model | tokens | NLL | KL to the teacher | agreement |", "|---|---|---:|---:|---:|---:|"]
    for kind in next(iter(by_role.values())):
        of_roles = {role: kinds[kind] for role, kinds in by_role.items()}
        first = next(iter(of_roles.values()))
        lines.append(f"| {kind} | teacher | {first['tokens']:,} | {first['teacher_nll']:.3f} | | |")
        lines += [f"| {kind} | {role} | {_cells(values)} |" for role, values in of_roles.items()]
    how = f"drawn at temperature {sizes.temperature:g}" if sizes.temperature else "its likeliest tokens"
    note = (
        f"After {sizes.prompts} prompts of {sizes.prompt_tokens} tokens, the prompts not counted: on the text that "
        f"follows them, and on what the teacher says after them ({how}, {sizes.new_tokens} at most). KL in nats a "
        "token, with its 95% interval over prompts."
    )
    return [*lines, "", note]


def _cells(values: Mapping[str, Any]) -> str:
    low, high = values["interval"]
    kl = f"{values['kl']:.4f} ({low:.4f} to {high:.4f})"
    return f"{values['tokens']:,} | {values['nll']:.3f} | {kl} | {100 * values['agreement']:.1f}"


def sizes_of(prompts: int, temperature: float, seed: int, batch_size: int) -> Sizes:
    """Raises ValueError for what is no number of prompts or temperature."""
    if prompts < 1 or temperature < 0:
        raise ValueError(
            f"--completions is {prompts} and --completion_temperature {temperature:g}; expected at least 1 prompt and "
            "a temperature of 0 (the likeliest tokens) or more. Change them."
        )
    return Sizes(prompts=prompts, temperature=temperature, seed=seed, batch_size=batch_size)
