"""The model card (README.md) of an exported student: what it is, how to use it, where it comes from, how near it is."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radlads_jax.models.config import ModelConfig

_TITLES = {"rad_rwkv6": "RAD-RWKV6", "rad_rwkv7": "RAD-RWKV7"}
_TRAINED = {
    "pretrain": "everything, next-token cross-entropy",
    "stage1": "the mixers, distance to their attention layers' outputs",
    "stage2": "everything, KL to the teacher",
    "stage2a": "everything, KL to the teacher",
    "stage3": "everything, next-token cross-entropy",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
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
prompts in half precision run through its kernels. They are under the Apache License 2.0."""


def write_model_card(
    cfg: ModelConfig, *, run: Mapping[str, Any] | None = None, summary: Mapping[str, Any] | None = None
) -> str:
    """Markdown with the hub's YAML header.

    run: a run's settings as nested dicts, as its config.json holds them, for base model, data and recipe. summary: what
    its summary.json holds, for the scores and the tokens that were really read. What is not given is left out.
    """
    base = (run or {}).get("teacher", {}).get("path", "")
    sections = [_header(base), _description(cfg, base), _USE]
    if run is not None:
        sections.append(_recipe(run, summary))
    if summary is not None:
        sections.append(_scores(summary))
    return "\n\n".join(sections) + "\n"


def _header(base: str) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    # The hub reads it as an id: a directory of somebody's disk is none.
    if _HUB_ID.fullmatch(base) and not Path(base).exists():
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "tags:", "- linear-attention", "- rwkv", "- radlads", "---"])


def _description(cfg: ModelConfig, base: str) -> str:
    mixer = cfg.mixer
    assert cfg.recurrent_mixer is not None and mixer is not None
    title = _TITLES[cfg.recurrent_mixer]
    softmax = [i for i, name in enumerate(cfg.layer_mixers) if name == "attention"]
    recurrent = cfg.num_layers - len(softmax)
    per_token = 2 * 2 * cfg.num_kv_heads * cfg.head_dim
    state = 4 * recurrent * cfg.num_heads * cfg.head_dim**2
    if mixer.token_shift:
        state += 2 * recurrent * cfg.hidden_size
    bound = "state balancing" if mixer.balance_state else "GroupNorm" if mixer.group_norm else "nothing"
    facts = {
        "layers": f"{cfg.num_layers}" + (f", of which {_numbers(softmax)} softmax attention" if softmax else ""),
        "width, heads, kv heads, head size": f"{cfg.hidden_size}, {cfg.num_heads}, {cfg.num_kv_heads}, {cfg.head_dim}",
        "RoPE in the recurrent layers": "yes" if mixer.use_rope else "no",
        "gate": mixer.gate.replace("_", " "),
        "output bounded by": bound,
        "token shift": "yes" if mixer.token_shift else "no",
        "state of a sequence": f"{_bytes(state)}, whatever its length"
        + (f", and {_bytes(len(softmax) * per_token)} a token in softmax layers" if softmax else ""),
        "where its teacher keeps": f"{_bytes(cfg.num_layers * per_token)} a token (keys and values in bfloat16)",
    }
    of_base = f" of {base}" if base else ""
    return "\n".join(
        [
            f"# {title} student{of_base}",
            "",
            f"A {cfg.family} language model whose softmax attention was converted to {title}, a recurrence with a",
            "state of constant size, by distillation as in RADLADS",
            "([arXiv 2505.03005](https://arxiv.org/abs/2505.03005)), with radlads_jax.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items()),
        ]
    )


def _recipe(run: Mapping[str, Any], summary: Mapping[str, Any] | None) -> str:
    read = {line["name"]: line["tokens"] for line in (summary or {}).get("stages", ())}
    data = run["data"]
    text = data.get("path") or data.get("source", "")
    lines = [
        "## Recipe",
        "",
        f"Text: {text}. Compute dtype: {run['dtype']}; seed {run['seed']}.",
        "",
        "| stage | trains | tokens | rows of | rows a step | learning rate, mixers' |",
        "|---|---|---|---|---|---|",
    ]
    for name in run["stages"]:
        stage = run[name]
        rates = (f"{stage[key]:g} to {stage[f'{key}_final']:g}" for key in ("lr", "mixer_lr"))
        tokens = read.get(name, stage["tokens"])
        sizes = f"{stage['seq_len']:,} | {stage['batch_size']:,}"
        lines.append(f"| {name} | {_TRAINED.get(name, '')} | {tokens:,} | {sizes} | {', '.join(rates)} |")
    return "\n".join(lines)


def _scores(summary: Mapping[str, Any]) -> str:
    lines = [
        "## Scores",
        "",
        f"Means per token over {summary['tokens']:,} held-out tokens, in the units of natural logarithms.",
        "",
        "| | loss | top-1 | KL to the teacher | same top-1 as the teacher |",
        "|---|---|---|---|---|",
    ]
    for name in ("teacher", "student"):
        if name in summary:
            scores = summary[name]
            near = f"{scores['kl']:.4f} | {scores['agreement']:.2%}" if "kl" in scores else "|"
            lines.append(f"| {name} | {scores['loss']:.4f} | {scores['top1']:.2%} | {near} |")
    if summary.get("relative_top1"):
        lines += ["", f"Top-1 relative to the teacher's: {summary['relative_top1']:.2%}."]
    return "\n".join(lines)


def _numbers(layers: list[int]) -> str:
    return f"number {layers[0]} is" if len(layers) == 1 else f"numbers {', '.join(map(str, layers))} are"


def _bytes(count: int) -> str:
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"
