"""The recurrences of the torch files: against a float64 loop, outputs of outside implementations, and their kernels."""

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with torch, which is pinned for Python 3.11 alone")
pytest.importorskip("transformers")


def relative_rms(got, expected) -> float:
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def operators():
    from radlads_jax.hf import modeling_rwkv6qwen2, modeling_rwkv7qwen2

    return {"wkv6": modeling_rwkv6qwen2, "wkv7": modeling_rwkv7qwen2}


def sequences(op: str, length: int, decay: float) -> list:
    """r, log_w, k, v (and a, b), and a state, as the mixers make them; decay: the strongest log decay of a token."""
    rng = torch.Generator().manual_seed(0)
    r, k, v, x = (torch.randn(2, length, 3, 8, generator=rng) for _ in range(4))
    log_w = decay * torch.rand(2, length, 3, 8, generator=rng)
    state = torch.randn(2, 3, 8, 8, generator=rng)
    kk = torch.nn.functional.normalize(k, dim=-1)
    rest = [-kk, kk * torch.sigmoid(x)] if op == "wkv7" else []
    return [r, log_w, k * -torch.expm1(log_w), v, *rest, state]


def token_loop(op: str, r, log_w, k, v, *rest):
    """The recurrence as the equations have it."""
    *ab, state = rest
    outs = []
    for t in range(r.shape[1]):
        new = log_w[:, t].exp()[..., None] * state
        if op == "wkv7":
            a, b = (x[:, t] for x in ab)
            new = new + b[..., None] * torch.einsum("bhk,bhkv->bhv", a, state)[..., None, :]
        state = new + k[:, t, ..., None] * v[:, t, ..., None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state))
    return torch.stack(outs, 1), state


@pytest.mark.parametrize(("op", "decay"), [("wkv6", -5.0), ("wkv6", -0.01), ("wkv7", -0.6065), ("wkv7", -0.01)])
@pytest.mark.parametrize("length", [1, 2, 32, 75])
def test_recurrence_and_its_gradients(op, length, decay):
    arguments = sequences(op, length, decay)
    expected_in = [x.double().requires_grad_() for x in arguments]
    got_in = [x.clone().requires_grad_() for x in arguments]
    expected, got = token_loop(op, *expected_in), getattr(operators()[op], op)(*got_in)
    for mine, theirs in zip(got, expected, strict=True):
        assert relative_rms(mine.detach(), theirs.detach()) < 2e-6
    for outs in (got, expected):
        sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outs).backward()
    for mine, theirs in zip(got_in, expected_in, strict=True):
        assert relative_rms(mine.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
def test_flash_linear_attention_is_called_as_its_kernels_expect(op, monkeypatch):
    """With stand-ins of chunk_gla's and chunk_rwkv7's signatures, and tensors that say they are on a GPU."""

    def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
        assert scale == 1.0 and output_final_state
        return token_loop("wkv6", q, g, k, v, initial_state)

    def chunk_rwkv7(r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False):
        assert scale == 1.0 and output_final_state
        return token_loop("wkv7", r, w, k, v, a, b, initial_state)

    kernel = {"wkv6": chunk_gla, "wkv7": chunk_rwkv7}[op]
    called = []
    module = operators()[op]
    monkeypatch.setattr(module, kernel.__name__, lambda *args, **options: called.append(op) or kernel(*args, **options))
    monkeypatch.setattr(module, "on_gpu", lambda x: True)
    arguments = sequences(op, 20, -0.5)
    for got, expected in zip(getattr(module, op)(*arguments), token_loop(op, *arguments), strict=True):
        assert relative_rms(got, expected) < 1e-6
    assert called == [op]


@pytest.mark.parametrize("name", ["rad_rwkv6", "rad_rwkv7_balanced", "rad_rwkv7_groupnorm"])
def test_mixer_equals_golden(name):
    """Against outputs of outside implementations in float64; some of rad_rwkv6's decays are at the bound."""
    data = np.load(Path(__file__).parent.parent / "data" / f"{name}.npz")
    op = "wkv6" if "rwkv6" in name else "wkv7"
    module, letter = operators()[op], op[-1]
    heads, kv_heads, width = int(data["heads"]), int(data["kv_heads"]), data["x"].shape[1]
    tensors = {k.removeprefix("self_attn."): torch.as_tensor(v) for k, v in data.items() if k.startswith("self_attn.")}
    rank = tensors["time_decay_w1" if op == "wkv6" else "w1"].shape[1]
    ranks = dict.fromkeys(("decay", "iclr", "value_residual_mix", "tokenshift", "gate"), rank)
    config = getattr(module, f"RWKV{letter}Qwen2Config")(
        hidden_size=width,
        head_dim=tensors["q_proj.weight"].shape[0] // heads,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=2,
        rope_theta=float(data.get("rope_theta", 1e4)),
        use_rope=op == "wkv7",
        groupnorm_att="groupnorm" in name,
        **{f"lora_rank_{key}": value for key, value in ranks.items()},
    )
    mixer = getattr(module, f"RWKV{letter}Qwen2Mixer")(config, 1)
    mixer.load_state_dict(tensors)
    x = torch.as_tensor(data["x"], dtype=torch.float32)[None]
    v_first = None
    if "v_first" in data:
        v_first = torch.as_tensor(data["v_first"], dtype=torch.float32).view(1, x.shape[1], heads, -1)
    shared = sys.modules[module.RecurrentMixer.__module__]
    tables = shared.rope_tables(config, torch.arange(x.shape[1])[None])
    with torch.no_grad():
        out, _ = mixer(x, v_first, shared.Context(*tables, None, None), None)
    assert relative_rms(out[0], data["out"]) < 5e-6
