"""Which tensor of a Hugging Face checkpoint is which parameter: one table per mixer, read in both directions.

Linear weights are [out, in] on disk and [in, out] here; vectors of the recurrent mixers are [1, 1, d] on disk.
"""

import dataclasses
import itertools
from typing import Any, Literal

from radlads_jax.models.config import ModelConfig

Layout = Literal["same", "transposed", "vector"]
ParamPath = tuple[str | int, ...]

STREAMS = "rkvwg"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a table: a tensor of one layer (or of the model), here and on disk.

    shape: here, without the stack's axis and without the axis that `row` selects.
    row: where several tensors on disk are the rows of one parameter.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    layout: Layout = "same"
    row: int | None = None


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a tensor on disk lives in the parameter tree: tree[path][index], in this layout."""

    path: ParamPath
    index: tuple[int, ...]
    shape: tuple[int, ...]
    layout: Layout

    @property
    def disk_shape(self) -> tuple[int, ...]:
        return {"same": self.shape, "transposed": self.shape[::-1], "vector": (1, 1, *self.shape)}[self.layout]


def disk_tensors(cfg: ModelConfig) -> dict[str, Location]:
    """Every tensor that a checkpoint of this model holds, by its name on disk."""
    tensors = {}
    for entry in _model_entries(cfg):
        tensors[entry.name] = Location(_path(entry.path), (), entry.shape, entry.layout)
    for stack, ((mixer, count), start) in enumerate(zip(cfg.stacks, cfg.stack_starts, strict=True)):
        for layer, entry in itertools.product(range(count), _layer_entries(cfg, mixer)):
            index = (layer,) if entry.row is None else (layer, entry.row)
            location = Location(("stacks", stack, *_path(entry.path)), index, entry.shape, entry.layout)
            tensors[f"model.layers.{start + layer}.{entry.name}"] = location
    return tensors


def param_shapes(cfg: ModelConfig) -> dict[ParamPath, tuple[int, ...]]:
    """The shape of every parameter, layers of a stack on the leading axis."""
    shapes = {_path(entry.path): entry.shape for entry in _model_entries(cfg)}
    for stack, (mixer, count) in enumerate(cfg.stacks):
        for path, rows in itertools.groupby(_layer_entries(cfg, mixer), key=lambda entry: entry.path):
            entries = list(rows)
            axes = (count,) if entries[0].row is None else (count, len(entries))
            shapes["stacks", stack, *_path(path)] = (*axes, *entries[0].shape)
    return shapes


def nest(flat: dict[ParamPath, Any]) -> dict[str, Any]:
    """A nested dict from values by path."""
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def flatten(tree: dict[Any, Any]) -> dict[ParamPath, Any]:
    """The leaves of a nested dict by path."""
    flat: dict[ParamPath, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {(key, *path): leaf for path, leaf in flatten(value).items()}
        else:
            flat[(key,)] = value
    return flat


def shown(path: ParamPath) -> str:
    """A path as it is written in messages and rules: joined with slashes."""
    return "/".join(map(str, path))


def _path(path: str) -> ParamPath:
    return tuple(path.split("/"))


def _model_entries(cfg: ModelConfig) -> list[Entry]:
    entries = [
        Entry("embed/embedding", "model.embed_tokens.weight", (cfg.vocab_size, cfg.hidden_size)),
        Entry("norm/scale", "model.norm.weight", (cfg.hidden_size,)),
    ]
    if not cfg.tie_embeddings:
        entries.append(Entry("head/kernel", "lm_head.weight", (cfg.hidden_size, cfg.vocab_size), "transposed"))
    return entries


def _layer_entries(cfg: ModelConfig, mixer: str) -> list[Entry]:
    width, mlp_width = cfg.hidden_size, cfg.intermediate_size
    inside = [
        dataclasses.replace(entry, path=f"mixer/{entry.path}", name=f"self_attn.{entry.name}")
        for entry in MIXER_TABLES[mixer](cfg)
    ]
    return [
        Entry("input_norm/scale", "input_layernorm.weight", (width,)),
        Entry("post_norm/scale", "post_attention_layernorm.weight", (width,)),
        *_linear("mlp/gate", "mlp.gate_proj", width, mlp_width),
        *_linear("mlp/up", "mlp.up_proj", width, mlp_width),
        *_linear("mlp/down", "mlp.down_proj", mlp_width, width),
        *inside,
    ]


def _attention(cfg: ModelConfig) -> list[Entry]:
    width, heads_width, kv_width = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    entries = [
        *_linear("q", "q_proj", width, heads_width, cfg.qkv_bias),
        *_linear("k", "k_proj", width, kv_width, cfg.qkv_bias),
        *_linear("v", "v_proj", width, kv_width, cfg.qkv_bias),
        *_linear("o", "o_proj", heads_width, width, cfg.o_bias),
    ]
    if cfg.qk_norm:
        entries += [Entry(f"{name}/scale", f"{name}.weight", (cfg.head_dim,)) for name in ("q_norm", "k_norm")]
    return entries


def _rad_rwkv6(cfg: ModelConfig) -> list[Entry]:
    width, size = cfg.hidden_size, cfg.num_heads * cfg.head_dim
    mixer = cfg.mixer
    assert mixer is not None
    entries = _attention(cfg)
    if mixer.token_shift:
        streams = len(STREAMS)
        entries += [
            Entry("shift/mu_x", "time_maa_x", (width,), "vector"),
            *(Entry("shift/mu", f"time_maa_{s}", (width,), "vector", row) for row, s in enumerate(STREAMS)),
            Entry("shift/a", "time_maa_w1", (width, streams * mixer.rank_shift)),
            Entry("shift/b", "time_maa_w2", (streams, mixer.rank_shift, width)),
        ]
    return [
        *entries,
        Entry("decay/base", "time_decay", (size,), "vector"),
        Entry("decay/a", "time_decay_w1", (width, mixer.rank_decay)),
        Entry("decay/b", "time_decay_w2", (mixer.rank_decay, size)),
        *_gate_and_group_norm(cfg),
    ]


def _rad_rwkv7(cfg: ModelConfig) -> list[Entry]:
    width, size = cfg.hidden_size, cfg.num_heads * cfg.head_dim
    mixer = cfg.mixer
    assert mixer is not None
    entries = _attention(cfg)
    for path, letter, rank in (
        ("decay", "w", mixer.rank_decay),
        ("iclr", "a", mixer.rank_iclr),
        ("value", "v", mixer.rank_value),
    ):
        entries += [
            Entry(f"{path}/base", f"{letter}0", (size,), "vector"),
            Entry(f"{path}/a", f"{letter}1", (width, rank)),
            Entry(f"{path}/b", f"{letter}2", (rank, size)),
        ]
    return [
        *entries,
        *_gate_and_group_norm(cfg),
        Entry("k_k", "k_k", (size,), "vector"),
        Entry("k_a", "k_a", (size,), "vector"),
        Entry("r_k", "r_k", (cfg.num_heads, cfg.head_dim)),
    ]


def _gate_and_group_norm(cfg: ModelConfig) -> list[Entry]:
    width, size = cfg.hidden_size, cfg.num_heads * cfg.head_dim
    mixer = cfg.mixer
    assert mixer is not None
    gates = {
        "none": [],
        "full": _linear("gate", "gate", width, size),
        "low_rank": [
            Entry("gate/a", "g1", (width, mixer.rank_gate)),
            Entry("gate/b", "g2", (mixer.rank_gate, size)),
        ],
    }
    group_norm = [Entry("ln_x/scale", "ln_x.weight", (size,)), Entry("ln_x/bias", "ln_x.bias", (size,))]
    return gates[mixer.gate] + (group_norm if mixer.group_norm else [])


def _linear(path: str, name: str, fan_in: int, fan_out: int, bias: bool = False) -> list[Entry]:
    weight = Entry(f"{path}/kernel", f"{name}.weight", (fan_in, fan_out), "transposed")
    return [weight, Entry(f"{path}/bias", f"{name}.bias", (fan_out,))] if bias else [weight]


MIXER_TABLES = {"attention": _attention, "rad_rwkv6": _rad_rwkv6, "rad_rwkv7": _rad_rwkv7}
