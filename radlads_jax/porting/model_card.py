"""The model card (README.md) of an exported student: what it is, how to use it, where it comes from, how near it is."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from radlads_jax.models.config import SOFTMAX, KeptAttention, ModelConfig
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.state import mixer_state
from radlads_jax.porting.hub import HUB_ID
from radlads_jax.system.space import shown_bytes

# By this tag of its card an export is known on the hub.
OWN_TAG = "radlads"
_SCORES = "## Scores"
_USE_SECTION = re.compile(r"^## Use\n.*?(?=\n+^## |\n*\Z)", re.MULTILINE | re.DOTALL)
_USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

The modelling files here need transformers 5 and torch alone; where flash-linear-attention and a CUDA device are there,
its kernels run the recurrence over prompts in half precision. They are under the Apache License 2.0."""


def write_model_card(
    cfg: ModelConfig,
    *,
    run: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    use: str = "",
) -> str:
    """Markdown with the hub's YAML header.

    run: a run's settings as nested dicts, as its config.json holds them, for base model, data and recipe. summary: what
    its summary.json holds, for the scores and, of every stage, what it trained and the tokens that it really read. What
    is not given is left out. use: the section on how to use it; default: with the files' own code.
    """
    base = _place((run or {}).get("teacher", {}).get("path", ""))
    sections = [_header(cfg, base), _description(cfg, base), use or _USE]
    if run is not None:
        sections.append(_recipe(run, summary))
    if summary is not None:
        sections.append(_scores(summary))
    return "\n\n".join(sections) + "\n"


def with_use(card: str, use: str) -> str:
    """The card with its section on how to use the model exchanged; as it is where it has none."""
    return _USE_SECTION.sub(lambda _: use or _USE, card)


def scored_with_own_head(card: str) -> str:
    """The card of a student whose head is left out, with its scores said to be of that head."""
    said = f"{_SCORES}\n\nOf the student with its own head, in whose place this export has the embedding."
    return card.replace(f"{_SCORES}\n", f"{said}\n", 1)


def named(card: str, name: str) -> str:
    """The card with the model's name on the hub in place of PATH, in its section on how to use the model."""
    return _USE_SECTION.sub(lambda section: re.sub(r"\bPATH\b", lambda _: name, section[0]), card)


def tags(card: str) -> set[str]:
    """The tags in the card's header."""
    header = re.match(r"---\n(.*?)^---$", card, re.MULTILINE | re.DOTALL)
    listed = re.search(r"^tags:\n((?:- .*\n)*)", header[1], re.MULTILINE) if header else None
    return {line.removeprefix("- ") for line in listed[1].splitlines()} if listed else set()


def _place(name: str) -> str:
    """An id of the hub as it is; of a path of somebody's disk or bucket, which a card says to all, the last part."""
    is_id = HUB_ID.fullmatch(name) and not Path(name).exists()
    return name if is_id else name.rstrip("/").rpartition("/")[2]


def _header(cfg: ModelConfig, base: str) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    # The hub reads it as an id.
    if HUB_ID.fullmatch(base):
        lines.append(f"base_model: {base}")
    kinds = ["- rwkv"] if "rwkv" in (cfg.recurrent_mixer or "") else []
    return "\n".join([*lines, "tags:", "- linear-attention", *kinds, f"- {OWN_TAG}", "---"])


def _description(cfg: ModelConfig, base: str) -> str:
    assert cfg.recurrent_mixer is not None
    spec = MIXERS[cfg.recurrent_mixer]
    softmax = cfg.softmax_layers
    in_bfloat16 = dataclasses.replace(cfg, dtype="bfloat16")
    per_token = _state_bytes(in_bfloat16, SOFTMAX)
    state = (cfg.num_layers - len(softmax)) * _state_bytes(in_bfloat16, spec.name)
    facts = {
        "layers": f"{cfg.num_layers}" + (f", of which {_numbers(softmax)} softmax attention" if softmax else ""),
        **({"layers converted, beside the teacher's own": _listed(cfg.converted_layers)} if cfg.copied else {}),
        "width, heads, kv heads, head size": f"{cfg.hidden_size}, {cfg.num_heads}, {cfg.num_kv_heads}, {cfg.head_dim}",
        **spec.facts(cfg),
        **({"softmax layers": "; ".join(kept_said(cfg.kept_attention))} if cfg.kept_attention else {}),
        "state of a sequence": f"{shown_bytes(state)}, whatever its length"
        + (f", and {shown_bytes(len(softmax) * per_token)} a token in softmax layers" if softmax else ""),
        "where its teacher keeps": f"{shown_bytes(cfg.num_layers * per_token)} a token (keys and values in bfloat16)",
    }
    of_base = f" of {base}" if base else ""
    return "\n".join(
        [
            f"# {spec.title} student{of_base}",
            "",
            f"A {cfg.family} language model whose softmax attention was converted to {spec.title}, whose state has a",
            "constant size, by distillation as in RADLADS",
            "([arXiv 2505.03005](https://arxiv.org/abs/2505.03005)), with radlads_jax.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items()),
        ]
    )


def kept_said(kept: KeptAttention) -> list[str]:
    """What softmax layers have other than the teacher's, in words."""
    scale = f"at inference logits times log(t + {kept.log_scale:g}) / log({kept.log_scale:g}) at place t"
    said = {"no RoPE": not kept.rope, scale: bool(kept.log_scale), "a gate in every head": kept.output_gate}
    return [name for name, present in said.items() if present]


def _recipe(run: Mapping[str, Any], summary: Mapping[str, Any] | None) -> str:
    done = {line["name"]: line for line in (summary or {}).get("stages", ())}
    data = run["data"]
    text = _place(data.get("path", "")) or data.get("source", "")
    if data.get("chats"):
        beside = f", beside {replay:.0%} of rows of the text" if (replay := data.get("replay", 0)) else ""
        text += f"; conversations: {_place(data['chats'])}{beside}"
    lines = [
        "## Recipe",
        "",
        f"Text: {text}. Compute dtype: {run['dtype']}; seed {run['seed']}."
        + _how_chosen(run.get("student", {}))
        + _how_begun(summary or {}),
        "",
        "| stage | trains | tokens | rows of | rows a step | learning rate, mixers' |",
        "|---|---|---|---|---|---|",
    ]
    stages = [(name, run[name], done.get(name, {})) for name in done or run["stages"]]
    if earlier := (summary or {}).get("earlier"):
        line = earlier["line"] | {"tokens": earlier["tokens"]}
        stages.insert(0, ("stage1, of an earlier run", earlier["recipe"], line))
    for name, stage, of_stage in stages:
        # Those of a sweep are not the recipe's.
        taken = stage | of_stage.get("rates", {})
        untold = " (its sweep's middle)" if stage.get("sweep") and "rates" not in of_stage else ""
        rates = (f"{taken[key]:g} to {taken[f'{key}_final']:g}" for key in ("lr", "mixer_lr"))
        tokens = of_stage.get("tokens", stage["tokens"])
        trains = ", ".join(of_stage[key] for key in ("trains", "loss") if key in of_stage)
        sizes = f"{stage['seq_len']:,} | {stage['batch_size']:,}"
        lines.append(f"| {name} | {trains} | {tokens:,} | {sizes} | {', '.join(rates)}{untold} |")
    return "\n".join(lines)


def _how_chosen(student: Mapping[str, Any]) -> str:
    asked = next((str(layer) for layer in student.get("attention_layers", ())), "")
    if not asked.startswith("auto:"):
        return ""
    beside = ", with an earlier run's mixers in the others" if student.get("init_from") else ""
    return (
        f" The softmax layers were chosen by forward passes of the teacher{beside}, on text and recall prompts "
        f"({asked})."
    )


def _how_begun(summary: Mapping[str, Any]) -> str:
    if "earlier" not in summary:
        return ""
    return f" Its mixers began as an earlier run left them (text: {_place(summary['earlier']['text'])})."


def _scores(summary: Mapping[str, Any]) -> str:
    lines = [
        _SCORES,
        "",
        f"Means per token over {summary['tokens']:,} held-out tokens, in the units of natural logarithms.",
        "",
        "| | loss | top-1 | KL to the teacher | same top-1 as the teacher |",
        "|---|---|---|---|---|",
    ]
    for name in ("teacher", "control", "student"):
        if name in summary:
            scores = summary[name]
            near = f"{scores['kl']:.4f} | {scores['agreement']:.2%}" if "kl" in scores else "|"
            lines.append(f"| {name} | {scores['loss']:.4f} | {scores['top1']:.2%} | {near} |")
    if "control" in summary:
        lines += [
            "",
            "Control: the teacher itself, untrained, with a window of keys where the student's layers are converted.",
        ]
    if (relative := summary.get("relative_top1")) is not None:
        lines += ["", f"Top-1 relative to the teacher's: {relative:.2%}."]
    if answers := summary.get("answers"):
        names = [name for name in ("teacher", "control", "student") if name in answers["scores"][0]]
        lines += [
            "",
            f"Answers in {answers['tales']} made-up tales, right to the last token:",
            "",
            f"| | asked | {' | '.join(names)} |",
            f"|---|---|{'---|' * len(names)}",
            *(
                f"| {row['what']} | {row['asked']:,} | {' | '.join(f'{row[name]:.1%}' for name in names)} |"
                for row in answers["scores"]
            ),
        ]
    else:
        lines += [
            "",
            "Scores of next tokens do not show what a model recalls of its context: `python -m radlads_jax.evaluate "
            "--tasks=recall` asks.",
        ]
    return "\n".join(lines)


def _state_bytes(cfg: ModelConfig, mixer: str) -> int:
    """Of one layer and one sequence; of what is kept by position, for one token."""
    arrays = mixer_state(cfg, mixer).values()
    return sum(math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in arrays)


def _numbers(layers: Sequence[int]) -> str:
    return f"number {layers[0]} is" if len(layers) == 1 else f"numbers {_listed(layers)} are"


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
