"""The window of the torch files: against a dense masked softmax, against JAX past its edge, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_exports import ids, relative_rms

from radlads_jax.models import bind

torch = pytest.importorskip("torch", reason="compares with torch, which is pinned for Python 3.11 alone")
pytest.importorskip("transformers")


def windowed(sinks: int, window: int):
    from radlads_jax.hf.configuration_windowqwen2 import WindowQwen2Config

    return WindowQwen2Config(attention_sinks=sinks, attention_window=window, rope_theta=1e4)


def attend(config, q, k, v, real, starts, state):
    from radlads_jax.hf.modeling_windowqwen2 import Context, window_attention

    return window_attention(config, q, k, v, Context(q, q, real, None, starts), state)


def sequences(length: int):
    """q, k, v of two kv heads; which tokens are real, of a row that begins with padding too; where documents begin."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, length, heads, 8, generator=draw) for heads in (4, 2, 2))
    real, chance = torch.rand(2, 3, length, generator=draw)
    real = real > 0.2
    real[2, :3] = False
    # The first row is one document. They begin at real tokens alone.
    starts = real & (chance < 0.04) & (torch.arange(3) > 0)[:, None]
    return q, k, v, real, starts


def dense(q, k, v, real, starts, sinks: int, window: int):
    """softmax(q k^T K^-1/2) v in float64, over pairs that are listed one by one; zero for padding."""
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.zeros_like(q)
    for b in range(len(q)):
        document: list[int] = []
        for t in range(q.shape[1]):
            if not real[b, t]:
                continue
            document = [t] if starts[b, t] else [*document, t]
            seen = sorted({*document[:sinks], *document[-window:]})
            key, value = (x[b, seen].repeat_interleave(2, 1) for x in (k, v))
            scores = torch.einsum("hk,shk->hs", q[b, t], key) * q.shape[-1] ** -0.5
            out[b, t] = torch.einsum("hs,shk->hk", scores.softmax(1), value)
    return out


# Of more than two blocks, and whatever of sinks and window is the larger.
@pytest.mark.parametrize(("sinks", "window", "length"), [(3, 20, 290), (6, 2, 60), (0, 7, 60), (2, 1, 60), (0, 1, 9)])
def test_it_is_a_dense_masked_softmax_and_so_are_its_gradients(sinks, window, length):
    *tensors, real, starts = sequences(length)
    leaves = [[x.clone().requires_grad_() for x in tensors] for _ in range(2)]
    got, _ = attend(windowed(sinks, window), *leaves[0], real, starts, {})
    expected = dense(*leaves[1], real, starts, sinks, window)
    assert torch.isfinite(got).all()
    got = got * real[..., None, None]
    assert relative_rms(got.detach(), expected.detach()) < 1e-6
    for out in (got, expected):
        out.sin().sum().backward()
    for mine, theirs in zip(*leaves, strict=True):
        # Of a single key the softmax is 1, and nothing comes back to q.
        assert relative_rms(1 + mine.grad, 1 + theirs.grad) < 1e-6


@pytest.mark.parametrize(("sinks", "window"), [(3, 20), (6, 2), (0, 1)])
def test_in_pieces_it_is_the_same_and_keeps_no_more_than_is_in_sight(sinks, window):
    *tensors, real, starts = sequences(170)
    config, state, outs = windowed(sinks, window), {}, []
    whole, last = attend(config, *tensors, real, starts, {})
    for part in zip(*(x.split((1, 1, 130, 1, 5, *[1] * 32), 1) for x in (*tensors, real, starts)), strict=True):
        out, state = attend(config, *part, state)
        outs.append(out)
        assert state["k"].shape[1] == state["places"].shape[1] <= sinks + window - 1
    difference = (torch.cat(outs, 1) - whole)[real]
    assert difference.abs().max() < 1e-5 and state["k"].shape == (3, sinks + window - 1, 2, 8)
    for name in ("places", "seen"):
        np.testing.assert_array_equal(state[name], last[name])
    has_place = last["places"] >= 0
    np.testing.assert_array_equal(state["k"][has_place], last["k"][has_place])
    np.testing.assert_array_equal(state["v"][has_place], last["v"][has_place])


def test_scores_are_taken_block_by_block(monkeypatch):
    attention, shapes = torch.nn.functional.scaled_dot_product_attention, []

    def recorded(*args, attn_mask, **options):
        # Every query sees something, padding itself: of nothing some softmaxes make no number.
        assert attn_mask.any(-1).all()
        shapes.append(attn_mask.shape[-2:])
        return attention(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    attend(windowed(4, 64), *sequences(300), {})
    assert shapes == [(128, 128), (128, 128 + 67), (44, 44 + 67)]


@torch.no_grad()
def test_past_the_window_it_is_ours(export):
    """4 and 64 keys: packed rows read at once and, of the last document, token by token."""
    exported, tokens = export("window rwkv7"), ids(2, 300)
    model = exported.model()
    begins = np.zeros(tokens.shape, bool)
    begins[0, [3, 90, 190]] = begins[1, 140] = True
    segments, numbers = 1 + begins.cumsum(1), np.arange(300)
    positions = numbers - np.maximum.accumulate(np.where(begins, numbers, 0), 1)

    def run(params):
        decoder = bind(exported.cfg, params)
        rows = (jnp.asarray(x) for x in (tokens, segments, positions))
        return decoder.logits(decoder.hidden(next(rows), segment_ids=next(rows), positions=next(rows))[0])

    expected = jax.jit(run)(exported.params)
    rows, at = torch.as_tensor(tokens), torch.as_tensor(positions)
    assert relative_rms(model(rows, position_ids=at).logits, expected) < 1e-5
    out = model(rows[:, :280], position_ids=at[:, :280], use_cache=True)
    got = [model(rows[:, i : i + 1], past_key_values=out.past_key_values).logits for i in range(280, 300)]
    assert relative_rms(torch.cat([out.logits, *got], 1), expected) < 1e-5
    kept = out.past_key_values.layers[0].state
    assert kept["seen"].tolist() == [110, 160] and kept["k"].shape == (2, 67, 2, 8)
