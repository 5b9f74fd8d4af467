"""Sliding-window attention with sinks: the teacher's attention that sees a segment's first keys and the latest ones.

    out_t = W_o sum_j softmax_j(q_t k_j^T K^-1/2) v_j        over j <= t with t - j < window or j < sinks

t and j count from the start of the segment; one softmax over both kinds, in which a key that is both stands once.
Every parameter is the teacher's, RoPE is at the tokens' own positions, so that it needs no training: put in the place
of a student's mixers it is the control that a conversion has to beat. Its decoding state has a constant size: the
segment's first keys and values, the latest ones, oldest first, and the number of tokens of the segment.
Source: Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453), without its shifted positions.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.sharded import ROWS, WHOLE_HEADS, parts, per_shard
from radlads_jax.models.attention import Attention, Context, projection_tensors
from radlads_jax.models.config import SOFTMAX, KeptAttention, ModelConfig
from radlads_jax.models.layers import repeat_kv
from radlads_jax.models.spec import MixerSpec, PublishedFormat, StateArray, torch_files

# Queries that are scored at once: each block keeps its state for the backward pass, and each query of it meets the
# whole block's keys beside its window.
_BLOCKS = (128, 512)


@dataclasses.dataclass(frozen=True)
class WindowOptions:
    """sinks: keys at a segment's start that all of it sees. window: the latest keys, the token's own among them."""

    sinks: int = 4
    window: int = 64

    def __post_init__(self):
        for name, least in (("sinks", 0), ("window", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"config.student.options.{name} is {getattr(self, name)}; expected at least {least} for a mixer "
                    "with a window."
                )

    @classmethod
    def for_width(cls, hidden_size: int) -> "WindowOptions":
        """The same for every width."""
        del hidden_size
        return cls()


class _Kept(NamedTuple):
    """What is known of the segment so far; of its keys and values, those of places below `seen` or so near are real.

    Of the latest ones the last is the newest; those that are sinks too are not used.
    """

    sink_k: Float[Array, "B S G K"]
    sink_v: Float[Array, "B S G K"]
    k: Float[Array, "B W G K"]
    v: Float[Array, "B W G K"]
    seen: Int[Array, " B"]


class Window(Attention):
    """The mixer: softmax attention's parameters, and its heads' gates where the family has them."""

    def __init__(self, cfg: ModelConfig, layer_id: Int[Array, ""], *, rngs: nnx.Rngs):
        super().__init__(cfg, layer_id, rngs=rngs, kept=KeptAttention())

    def __call__(self, x: Float[Array, "B T D"], context: Context, layer_id, state):
        """-> (out [B, T, D], state {"sink_k", "sink_v", "k", "v", "seen"})."""
        del layer_id
        q, k, v, gate = self.projected(x, context)
        out, state = window_attention(self.cfg.mixer, q, k, v, context, state)
        out = out if gate is None else out * jax.nn.sigmoid(gate)
        return self.o(out.reshape(*x.shape[:2], -1)), state


def window_attention(
    options: WindowOptions,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    context: Context,
    state: dict[str, Array] | None,
) -> tuple[Float[Array, "B T H K"], dict[str, Array] | None]:
    """softmax(q k^T K^-1/2) v over the keys in sight, and the state as `window_state` has it."""
    starts = jnp.zeros(q.shape[:2], bool) if context.starts is None else context.starts
    if state is not None:
        kept = _Kept(**state)
        out, kept = _attend(q, k.astype(kept.k.dtype), v.astype(kept.v.dtype), starts, kept)
        return out, kept._asdict()
    if k.shape[2] % parts(WHOLE_HEADS, q.shape[2]):
        k, v = repeat_kv(k, q.shape[2]), repeat_kv(v, q.shape[2])
    run = functools.partial(_attend_from_nothing, options)
    return per_shard(run, ("sequence", "sequence", "sequence", "rows"), "sequence")(q, k, v, starts), None


def _attend_from_nothing(options: WindowOptions, q: Array, k: Array, v: Array, starts: Array) -> Array:
    batch, _, *heads = k.shape
    first, latest = (jnp.zeros((batch, n, *heads), k.dtype) for n in (options.sinks, options.window))
    return _attend(q, k, v, starts, _Kept(first, first, latest, latest, jnp.zeros((batch,), jnp.int32)))[0]


def _attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    starts: Bool[Array, "B T"],
    kept: _Kept,
) -> tuple[Float[Array, "B T H K"], _Kept]:
    """The outputs, and what is kept after the last token; block after block, so that the cost is linear in T."""
    total = q.shape[1]
    size = min(max(kept.k.shape[1], _BLOCKS[0]), _BLOCKS[1])
    if total <= size:
        return _block(kept, (q, k, v, starts))
    whole = total // size * size

    def in_blocks(x: Array) -> Array:
        return x[:, :whole].reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    def body(kept: _Kept, inputs: tuple[Array, ...]) -> tuple[_Kept, Array]:
        out, kept = _block(kept, inputs)
        return kept, out

    # The scores of a block are computed anew for its backward pass.
    kept, outs = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), kept, tuple(map(in_blocks, (q, k, v, starts))))
    outs = outs.swapaxes(0, 1).reshape(q.shape[0], whole, *q.shape[2:])
    if whole < total:
        last, kept = _block(kept, (q[:, whole:], k[:, whole:], v[:, whole:], starts[:, whole:]))
        outs = jnp.concatenate([outs, last], axis=1)
    return outs, kept


def _block(kept: _Kept, inputs: tuple[Array, ...]) -> tuple[Float[Array, "B T H K"], _Kept]:
    """One block of queries against what is kept and the block's own keys."""
    q, k, v, starts = inputs
    seen_k = jnp.concatenate([kept.sink_k, kept.k, k], axis=1)
    seen_v = jnp.concatenate([kept.sink_v, kept.v, v], axis=1)
    places = _places(starts, kept.seen)
    out = _softmax(q, seen_k, seen_v, _visible(kept, starts, places))
    sinks, window = kept.sink_k.shape[1], kept.k.shape[1]
    return out, _Kept(
        _first(kept.sink_k, k, starts, kept.seen),
        _first(kept.sink_v, v, starts, kept.seen),
        seen_k[:, sinks:][:, -window:],
        seen_v[:, sinks:][:, -window:],
        places[:, -1] + 1,
    )


def _begun(starts: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Where in the block each token's segment began; -1: before it."""
    return jax.lax.cummax(jnp.where(starts, jnp.arange(starts.shape[1]), -1), axis=1)


def _places(starts: Bool[Array, "B T"], count: Int[Array, " B"]) -> Int[Array, "B T"]:
    """Every token's place in its segment, of which `count` tokens came before the block."""
    begun = _begun(starts)
    return jnp.arange(starts.shape[1]) - jnp.where(begun < 0, -count[:, None], begun)


def _visible(kept: _Kept, starts: Bool[Array, "B T"], places: Int[Array, "B T"]) -> Bool[Array, "B T S"]:
    """Which of the sinks, the latest keys and the block's own each query sees."""
    sinks, window, length = kept.sink_k.shape[1], kept.k.shape[1], starts.shape[1]
    count = kept.seen[:, None]
    latest = count + jnp.arange(-window, 0)
    of_sinks = jnp.broadcast_to(jnp.arange(sinks), (starts.shape[0], sinks))
    key_places = jnp.concatenate([of_sinks, latest, places], axis=1)
    # A place below `sinks` among the latest keys is held by the sinks; below 0 there was no token.
    real = jnp.concatenate([of_sinks < count, latest >= sinks, jnp.ones(starts.shape, bool)], axis=1)
    segments = jnp.cumsum(starts, axis=1)
    key_segments = jnp.pad(segments, ((0, 0), (sinks + window, 0)))
    # In a segment places grow from key to key, except from the latest keys to the sinks, which come before them all.
    ordered = jnp.tril(jnp.ones((length, sinks + window + length), bool), sinks + window)
    near = places[:, :, None] - key_places[:, None] < window
    own = segments[:, :, None] == key_segments[:, None]
    return ordered & own & real[:, None] & (near | (key_places < sinks)[:, None])


def _first(old: Float[Array, "B S G K"], new: Float[Array, "B T G K"], starts: Array, count: Array) -> Array:
    """The first keys (or values) of the segment of the block's last token."""
    begun = _begun(starts)[:, -1:]
    slots = jnp.arange(old.shape[1])
    known = (begun < 0) & (slots < count[:, None])
    at = slots + jnp.where(begun < 0, -count[:, None], begun)
    picked = jnp.take_along_axis(new, jnp.clip(at, 0, new.shape[1] - 1)[..., None, None], axis=1)
    return jnp.where(known[..., None, None], old, picked)


def _softmax(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G K"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B T H K"]:
    """softmax(q k^T K^-1/2) v over the keys that the mask leaves; softmax float32."""
    return jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask[:, None])


def window_state(cfg: ModelConfig, batch: int, max_length: int) -> dict[str, StateArray]:
    """The keys and values in sight, the same number whatever the length."""
    del max_length
    options = cfg.mixer
    heads, axes = (cfg.num_kv_heads, cfg.head_dim), (ROWS, None, "tensor")
    first = StateArray((batch, options.sinks, *heads), cfg.dtype, axes)
    latest = StateArray((batch, options.window, *heads), cfg.dtype, axes)
    count = StateArray((batch,), jnp.int32, (ROWS,))
    return {"sink_k": first, "sink_v": first, "k": latest, "v": latest, "seen": count}


def window_flops(cfg: ModelConfig, seq_len: int) -> float:
    """Scores and values of the keys in sight, 4 d each; of a short row half of them on average, as of attention's."""
    return 4.0 * min(cfg.mixer.sinks + cfg.mixer.window, seq_len / 2) * cfg.num_heads * cfg.head_dim


def read_sight(keys: Any, hidden_size: int) -> WindowOptions:
    """Of a config.json, a porting.config_keys.ConfigKeys, for a model of any width."""
    del hidden_size
    sinks = keys.integer("attention_sinks", WindowOptions.sinks, low=0)
    return WindowOptions(sinks, keys.integer("attention_window", WindowOptions.window))


def write_sight(options: WindowOptions) -> dict[str, Any]:
    return {"attention_sinks": options.sinks, "attention_window": options.window}


SPEC = MixerSpec(
    name="window",
    title="sliding-window attention",
    module=Window,
    options=WindowOptions,
    tensors=lambda cfg: projection_tensors(cfg, gated=cfg.output_gate),
    state=window_state,
    flops=window_flops,
    # As softmax attention's: what a block keeps for its backward pass is as long as the keys are.
    bytes_per_column=32,
    obstacles=lambda cfg: [],
    published=PublishedFormat(
        "windowqwen2", "WindowQwen2ForCausalLM", read_sight, write_sight, torch_files("windowqwen2")
    ),
    facts=lambda cfg: {"keys in sight": f"the first {cfg.mixer.sinks} and the latest {cfg.mixer.window}"},
)


def with_windows(teacher: ModelConfig, options: WindowOptions) -> ModelConfig:
    """A softmax model, with the same parameters, whose layers all see a window of their keys."""
    stacks = tuple((SPEC.name, layers) for _, layers in teacher.stacks)
    return dataclasses.replace(teacher, stacks=stacks, mixer=options)


def untrained_control(teacher: ModelConfig, student: ModelConfig) -> ModelConfig:
    """The teacher, whose stacks are cut as the student's, with a window of its keys where the student is converted."""
    stacks = tuple((mixer if mixer == SOFTMAX else SPEC.name, layers) for mixer, layers in student.stacks)
    return dataclasses.replace(teacher, stacks=stacks, mixer=SPEC.choose(teacher.hidden_size))
