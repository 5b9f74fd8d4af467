"""Which of a teacher's layers stay softmax attention: those without which answers are lost, by forward passes alone.

    score_i = z(change of KL on text) + 2 z(change of the answers' NLL)               z over the layers in question

The first half of N by single swaps, a student's mixer in one layer at a time; the last half greedily, its mixers
everywhere but in the layers that are kept, by what keeping one more gives back. Layers within two standard errors
(bootstrap over prompts and rows) of the best tie: the one that leaves the kept ones more evenly spaced is taken. The
mixer is `window`, so that nothing has to be trained, or that of a student whose every layer stage 1 has aligned.
Prompts that the teacher itself can not answer do not count (floor.py). Source: HALO (arXiv 2601.22156), with a
synthetic recall loss for its tasks.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int
from rich.table import Table
from rich.text import Text

from radlads_jax.evaluation import floor, probes
from radlads_jax.evaluation.swaps import Batch, Measured, Rows, Student, Swaps, prompt_rows, text_rows
from radlads_jax.models import ModelConfig
from radlads_jax.models.mixers import mixer_titles
from radlads_jax.models.tree import Params
from radlads_jax.models.window import SPEC as WINDOW
from radlads_jax.models.window import WindowOptions, with_windows
from radlads_jax.system import storage
from radlads_jax.system.terminal import progress_bar

KINDS = ("passkey", "multi_key", "recall")
TOKENS = 512
# Weight of the answers beside that of text.
_RECALL = 2.0
_DRAWS = 1000
_TIE = 2.0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is read: so many prompts of each kind and rows of text, of `tokens` tokens each, drawn by `seed`."""

    prompts: int = 16
    texts: int = 8
    tokens: int = TOKENS
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self):
        for name in ("prompts", "texts", "tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1. Change --{name}.")


class _Pick(NamedTuple):
    """One step's choice. tied: the layers that were as good, the chosen one among them."""

    layer: int
    score: float
    tied: list[int]


def prompts(tokenizer: Any, sizes: Sizes, kinds: Sequence[str]) -> list[probes.Example]:
    """sizes.prompts of each kind (a name of probes.PROBES), kind after kind.

    Raises ValueError for a length in which one has no room.
    """
    text = probes.Text(tokenizer, sizes.seed)
    try:
        examples = [probes.PROBES[kind](text, sizes.tokens) for kind in kinds for _ in range(sizes.prompts)]
        longest = max(len(example.ids) for example in examples)
    except ValueError as error:
        raise _no_room(sizes.tokens, kinds) from error
    if longest > sizes.tokens:
        raise _no_room(sizes.tokens, kinds)
    return examples


def text_batch(tokenizer: Any, sizes: Sizes, file: storage.AnyPath | None) -> Batch:
    """Rows of one piece of the file's text, from a place that the seed draws, or of made-up tales.

    Raises ValueError for a file with too little text, or that is not UTF-8.
    """
    text, length = probes.Text(tokenizer, sizes.seed), sizes.texts * sizes.tokens
    if file is not None and len(text.of_file(file)) < length:
        raise ValueError(
            f"--data {file} holds too little text for {sizes.texts} rows of {sizes.tokens} tokens; expected {length:,} "
            "tokens. Give a longer text, or lower --texts or --tokens."
        )
    rows = probes.rows_of_text(text, sizes.texts, sizes.tokens, file)
    positions = np.broadcast_to(np.arange(sizes.tokens, dtype=np.int32), rows.shape)
    return {"tokens": rows, "segment_ids": np.ones_like(rows), "positions": positions}


def _no_room(tokens: int, kinds: Sequence[str]) -> ValueError:
    return ValueError(
        f"softmax layers are chosen by prompts of {tokens} tokens, in which {', '.join(kinds)} have no room with this "
        f"tokenizer; expected more, usually {TOKENS}. Raise choose's --tokens, take a teacher with a longer context, "
        "or name the layers (config.student.attention_layers)."
    )


def choose_layers(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Any,
    texts: Sequence[Batch],
    keep: int,
    *,
    student: Student | None = None,
    sizes: Sizes | None = None,
    mesh: Mesh | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """The `keep` layers of a softmax teacher that a student keeps, and the figures that choice.json holds.

    student: whose mixers stand in the others, `windows` of the usual size by default. texts: batches of rows, arrays
    [B, T], the same in every process; the first sizes.texts rows are read. The same seed chooses the same layers.
    Raises ValueError for a number of layers that leaves none to choose or to convert.
    """
    if not 1 <= keep < cfg.num_layers:
        raise ValueError(
            f"{keep} softmax layers are to be chosen of {cfg.num_layers}; expected 1 to {cfg.num_layers - 1}. Change "
            "auto:N of config.student.attention_layers, or --keep."
        )
    student, sizes = student or windows(cfg, params, WindowOptions()), sizes or Sizes()
    examples = prompts(tokenizer, sizes, KINDS)
    rows = _rows(examples, texts, sizes)
    singly = (keep + 1) // 2
    with progress_bar("choosing softmax layers", show=not quiet) as progress:
        task = progress.add_task("", total=_passes(rows, cfg.num_layers, keep, singly))
        swaps = Swaps(cfg, params, rows, student, mesh=mesh, step=lambda: progress.advance(task))
        choice = _choose(swaps, examples, keep, singly, sizes)
        choice["passes"] = int(progress.tasks[0].completed)
    asked = {"kinds": list(KINDS), "of each": sizes.prompts, "tokens": sizes.tokens, "seed": sizes.seed}
    mixer = {"name": student.cfg.recurrent_mixer} | dataclasses.asdict(student.cfg.mixer)
    choice |= {"prompts": asked, "text_rows": rows.num_texts, "mixer": mixer}
    return choice | {"warning": floor.warning(choice)}


def windows(cfg: ModelConfig, params: Params, options: WindowOptions) -> Student:
    """The teacher itself, whose layers see windows of their keys."""
    return Student(with_windows(cfg, options), params)


def choose_for_run(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Any,
    texts: Sequence[Batch],
    keep: int,
    *,
    seed: int,
    batch_size: int,
    **more: Any,
) -> dict[str, Any]:
    """`choose_layers` with the usual sizes, of rows no longer than the teacher reads."""
    tokens = min(TOKENS, cfg.max_position_embeddings)
    sizes = Sizes(tokens=tokens, batch_size=batch_size, seed=seed % 2**32)
    return choose_layers(cfg, params, tokenizer, texts, keep, sizes=sizes, **more)


def _rows(examples: Sequence[probes.Example], texts: Sequence[Batch], sizes: Sizes) -> Rows:
    of_text, num_texts = text_rows(texts, sizes.texts, sizes.batch_size, sizes.tokens)
    of_prompts, num_prompts = prompt_rows(examples, sizes.batch_size, sizes.tokens)
    return Rows(of_text, of_prompts, num_texts, num_prompts)


def _passes(rows: Rows, layers: int, keep: int, singly: int) -> int:
    """Of batches: the teacher's own on text, every layer swapped, then each candidate of each greedy step."""
    greedy = sum(1 + layers - kept for kept in range(singly, keep))
    each = 1 + layers + (greedy or 1) + 1
    return len(rows.texts) + each * (len(rows.texts) + len(rows.prompts))


def _choose(swaps: Swaps, examples: Sequence[probes.Example], keep: int, singly: int, sizes: Sizes) -> dict[str, Any]:
    layers = swaps.cfg.num_layers
    everywhere = range(layers)
    teacher, alone = swaps.flipped(np.zeros(layers, bool), everywhere)
    recall = floor.of_kinds(KINDS, examples, teacher, swaps.cfg.vocab_size)
    draws = _Draws(len(teacher.kl), floor.counted(recall, len(examples)), sizes.prompts, sizes.seed)
    harm = [_difference(swapped, teacher) for swapped in alone]
    scores = draws.scores(harm)
    kept: list[int] = []
    order = []
    for _ in range(singly):
        pick = _best(scores, everywhere, kept, layers)
        kept.append(pick.layer)
        order.append(_step("single", pick))
    left = teacher
    while len(kept) < keep:
        swapped_layers = ~np.isin(np.arange(layers), kept)
        candidates = [i for i in everywhere if i not in kept]
        before, after = swaps.flipped(swapped_layers, candidates)
        pick = _best(draws.scores([_difference(before, swapped) for swapped in after]), candidates, kept, layers)
        left = after[candidates.index(pick.layer)]
        kept.append(pick.layer)
        order.append(_step("greedy", pick) | {"kl": float(left.kl.mean()), "nll": float(left.nll.mean())})
    nowhere, _ = swaps.flipped(np.ones(layers, bool), ())
    if keep == singly:
        left, _ = swaps.flipped(~np.isin(np.arange(layers), kept), ())
    return {
        "layers": sorted(kept),
        "of": layers,
        "order": order,
        "single": [
            {"layer": i, "kl": float(h.kl.mean()), "nll": float(h.nll.mean()), "score": float(scores[0, i])}
            for i, h in enumerate(harm)
        ],
        "recall": recall,
        "teacher": _means(teacher),
        "none kept": _means(nowhere),
        "these kept": _means(left),
    }


def _step(by: str, pick: _Pick) -> dict[str, Any]:
    return {"layer": pick.layer, "by": by, "score": pick.score, "tied": pick.tied}


def _means(measured: Measured) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in measured._asdict().items()}


def _difference(a: Measured, b: Measured) -> Measured:
    return Measured(a.kl - b.kl, a.nll - b.nll, a.right - b.right)


class _Draws:
    """Bootstrap draws of text rows, and of prompts within their kinds; the first one is everything as it is.

    counted: which prompts are; without any the text alone makes the scores.
    """

    def __init__(self, num_texts: int, counted: Bool[np.ndarray, " P"], of_kind: int, seed: int):
        rng = np.random.default_rng(seed)
        self.texts = _drawn(rng, num_texts, num_texts)
        self.prompts = _drawn(rng, len(counted), of_kind)[:, counted]

    def scores(self, changes: Sequence[Measured]) -> Float[np.ndarray, "draws C"]:
        """Every candidate's score in every draw."""
        kl, nll = (np.stack([getattr(change, name) for change in changes], axis=1) for name in ("kl", "nll"))
        of_text = _z(kl[self.texts].mean(1))
        return of_text + _RECALL * _z(nll[self.prompts].mean(1)) if self.prompts.size else of_text


def _drawn(rng: np.random.Generator, count: int, together: int) -> Int[np.ndarray, "draws N"]:
    whole = np.arange(count)
    drawn = whole // together * together + rng.integers(0, together, (_DRAWS, count))
    return np.concatenate([whole[None], drawn])


def _z(values: Float[np.ndarray, "draws C"]) -> Float[np.ndarray, "draws C"]:
    """Of each draw over the candidates; 0 where all are the same."""
    spread = values.std(axis=1, keepdims=True)
    return (values - values.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)


def _best(scores: np.ndarray, candidates: Sequence[int], kept: Sequence[int], layers: int) -> _Pick:
    """Of the candidates (a column of the scores each) that are not kept yet: the best, or of those that tie with it the
    one that leaves the kept layers most even; then the better, then the first."""
    places = [place for place, layer in enumerate(candidates) if layer not in kept]
    best = max(places, key=lambda place: scores[0, place])
    behind = scores[:, [best]] - scores[:, places]
    # Where every draw says the same, rounding is no difference.
    tied_with = behind[0] <= np.maximum(_TIE * behind[1:].std(axis=0), 1e-9)
    tied = [place for place, ties in zip(places, tied_with, strict=True) if ties]
    chosen = min(tied, key=lambda place: (unevenness([*kept, candidates[place]], layers), -scores[0, place]))
    return _Pick(candidates[chosen], float(scores[0, chosen]), [candidates[place] for place in tied])


def unevenness(kept: Sequence[int], layers: int) -> int:
    """The sum of squared distances from kept layer to kept layer, the model's two ends among them."""
    return int((np.diff([-1, *sorted(kept), layers]) ** 2).sum())


def table(choice: Mapping[str, Any]) -> Table:
    """Every layer's figures, and how the kept ones were chosen, for a terminal."""
    instead = _instead(choice)
    title = f"{instead[0].upper()}{instead[1:]} in one layer at a time"
    caption = Text(choice["warning"], style="yellow") if choice["warning"] else None
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("layer", "KL", "change of NLL", "score", "kept", "in place of"):
        shown.add_column(column, justify="left" if column in ("kept", "in place of") else "right")
    how = {step["layer"]: (place, step) for place, step in enumerate(choice["order"], 1)}
    for line in choice["single"]:
        place, step = how.get(line["layer"], (0, {}))
        said = f"{place}, {step['by']}" if step else ""
        others = ", ".join(str(i) for i in step.get("tied", ()) if i != line["layer"])
        figures = (f"{line['kl']:.4f}", f"{line['nll']:+.4f}", f"{line['score']:+.2f}")
        shown.add_row(str(line["layer"]), *figures, said, others)
    return shown


def said(choice: Mapping[str, Any]) -> str:
    """The choice in one line."""
    names = {"teacher": "whole teacher", "none kept": "none kept", "these kept": "these"}
    figures = ", ".join(f"{name} {choice[key]['nll']:.3f}" for key, name in names.items())
    layers = ",".join(map(str, choice["layers"]))
    return (
        f"softmax: layers {layers} (of 0 to {choice['of'] - 1}); NLL of the answers with {_instead(choice)} elsewhere: "
        f"{figures}"
    )


def _instead(choice: Mapping[str, Any]) -> str:
    """What stands in the layers that are not kept."""
    mixer = choice["mixer"]
    is_window = mixer["name"] == WINDOW.name
    return f"windows of {mixer['sinks']} + {mixer['window']} keys" if is_window else mixer_titles()[mixer["name"]]
