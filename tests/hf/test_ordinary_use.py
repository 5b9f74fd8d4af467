"""Exports as transformers' other parts use models: Trainer, autocast, rows packed with several documents."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hf_exports import OTHER_SOFTMAX, SOME, ids, relative_rms

torch = pytest.importorskip("torch", reason="compares with torch, which is pinned for Python 3.11 alone")
transformers = pytest.importorskip("transformers")

FILES = Path(__file__).parents[2] / "radlads_jax" / "hf"
DOCUMENTS = (1, 33, 2, 16, 48, 5)


@torch.no_grad()
def logits_of(model, tokens, **options) -> np.ndarray:
    return model(torch.as_tensor(tokens), **options).logits.double().numpy()


def files_of(model) -> types.ModuleType:
    """The module that a model's class is from."""
    return sys.modules[type(model).__module__]


def packed(count: int = 1, seed: int = 0) -> tuple[list[np.ndarray], torch.Tensor, torch.Tensor]:
    """Documents, and `count` rows of all of them, in another order each, with positions that restart."""
    documents = [ids(n, seed=seed + n) for n in DOCUMENTS]
    orders = [np.roll(np.arange(len(documents)), shift) for shift in range(count)]
    rows = np.stack([np.concatenate([documents[i] for i in order]) for order in orders])
    positions = np.stack([np.concatenate([np.arange(len(documents[i])) for i in order]) for order in orders])
    return documents, torch.as_tensor(rows), torch.as_tensor(positions)


@pytest.mark.parametrize("name", ["rwkv6 hybrid", "rwkv7"])
def test_what_trainer_gathers_are_the_logits_alone(export, name):
    """Trainer.prediction_step (evaluate, predict) adds a list to the keys that it leaves out, and gathers the rest."""
    model, tokens = export(name).model(), torch.as_tensor(ids(2, 20))
    with torch.no_grad():
        out = model(tokens, labels=tokens)
    left_out = model.config.keys_to_ignore_at_inference + ["loss"]  # noqa: RUF005 (as it is written there)
    (logits,) = (value for key, value in out.items() if key not in left_out)
    np.testing.assert_array_equal(logits.numpy(), logits_of(model, tokens))


def test_states_have_the_methods_of_every_transformers_5(export):
    """Those that its cache layers' base class declares abstract, of 5.0 to 5.12 and since."""
    layer = sys.modules[
        type(export("rwkv7").model().model.layers[0].self_attn).__module__.replace(
            "modeling_rwkv7qwen2", "cache_student"
        )
    ].RecurrentLayer()
    assert layer.get_max_cache_shape() == layer.get_max_length() == -1
    assert layer.get_mask_sizes(7) == (7, 0) and layer.get_seq_length() == 0


def test_a_state_under_its_newer_name(export):
    """generate() of transformers 5.24 and later calls it cache."""
    model, tokens = export("rwkv7 hybrid, last").model(), torch.as_tensor(ids(2, 12))
    with torch.no_grad():
        state = model(tokens[:, :9], use_cache=True).past_key_values
        rest = model(tokens[:, 9:], attention_mask=torch.ones_like(tokens), cache=state).logits
    assert relative_rms(rest, logits_of(model, tokens)[:, 9:]) < 5e-6


@pytest.mark.parametrize("version", ["4.57.6", "4.36.0"])
def test_transformers_4_is_told_which_version_is_needed(version, monkeypatch):
    old = types.ModuleType("transformers")
    old.__version__ = version
    monkeypatch.setitem(sys.modules, "transformers", old)
    spec = importlib.util.spec_from_file_location("configuration_student", FILES / "configuration_student.py")
    with pytest.raises(ImportError, match=rf"transformers 5\.0 or newer; got {version}") as raised:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("rwkv6", torch.float16),
        ("rwkv6 unbounded", torch.bfloat16),
        ("rwkv7", torch.float16),
        ("rwkv7 hybrid, last", torch.bfloat16),
        ("window rwkv7", torch.bfloat16),
    ],
)
def test_losses_and_gradients_under_autocast(export, name, dtype):
    model, tokens = export(name).model(), torch.as_tensor(ids(1, 256))
    with torch.no_grad():
        expected = model(tokens, labels=tokens).loss.item()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=2e-2)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["rwkv6", "rwkv7"])
def test_the_recurrence_is_the_same_under_autocast(export, name):
    """Of the same numbers, in chunks and in one step, bit by bit; the state stays float32."""
    run = getattr(files_of(export(name).model()), f"wkv{name[-1]}")
    draw = torch.Generator().manual_seed(0)
    for length in (1, 40):
        count = 4 if name == "rwkv6" else 6
        tensors = [torch.randn(2, length, 4, 8, generator=draw) for _ in range(count)]
        tensors[1] = -0.6 * torch.rand(2, length, 4, 8, generator=draw)
        state = torch.randn(2, 4, 8, 8, generator=draw)
        expected = run(*tensors, state)
        with torch.autocast("cpu", dtype=torch.float16):
            got = run(*tensors, state)
        assert got[0].dtype == got[1].dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", SOME)
def test_packed_documents_do_not_know_each_other(export, name):
    model = export(name).model()
    documents, rows, positions = packed(2)
    got = logits_of(model, rows, position_ids=positions)
    expected = [logits_of(model, document[None])[0] for document in documents]
    for row, shift in zip(got, range(2), strict=True):
        order = np.roll(np.arange(len(documents)), shift)
        assert relative_rms(row, np.concatenate([expected[i] for i in order])) < 5e-6


def test_what_transformers_packs_is_told_apart(export):
    """DataCollatorWithFlattening, which Trainer and TRL take for padding-free rows."""
    model, documents = export("rwkv6 hybrid").model(), [ids(n, seed=n).tolist() for n in (9, 21, 4)]
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": document} for document in documents])
    with torch.no_grad():
        out = model(**batch)
        losses = [model(torch.tensor([d]), labels=torch.tensor([d])).loss.item() * (len(d) - 1) for d in documents]
    expected = np.concatenate([logits_of(model, [document])[0] for document in documents])
    assert relative_rms(out.logits[0], expected) < 5e-6
    assert out.loss.item() == pytest.approx(sum(losses) / (sum(map(len, documents)) - 3), rel=1e-5)


@pytest.mark.parametrize("chunks", [(40, 65), (35, 1, 1, 68)], ids=str)
@pytest.mark.parametrize("name", [*SOME, OTHER_SOFTMAX])
def test_packed_rows_in_chunks_are_packed_rows_at_once(export, name, chunks):
    """Documents that end where a chunk does, go on in the next, or are a chunk of one token."""
    model, (_, rows, positions) = export(name).model(), packed()
    cache, got = None, []
    for part, at in zip(rows.split(chunks, 1), positions.split(chunks, 1), strict=True):
        with torch.no_grad():
            out = model(part, position_ids=at, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        got.append(out.logits)
    assert relative_rms(torch.cat(got, 1), logits_of(model, rows, position_ids=positions)) < 5e-6


@pytest.mark.parametrize("name", ["rwkv7 hybrid, last", "window rwkv7 hybrid"])
def test_the_last_document_of_every_row_goes_on(export, name):
    """Rows whose last documents begin at different tokens, their states put in another order, as beams are."""
    model = export(name).model()
    documents, rows, positions = packed(2)
    with torch.no_grad():
        cache = model(rows, position_ids=positions, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 0, 1]))
        last = [documents[i] for i in (len(documents) - 2, len(documents) - 1, len(documents) - 2)]
        more, at = torch.as_tensor(ids(3, 2)), torch.tensor([[len(d), len(d) + 1] for d in last])
        got = [model(more[:, i : i + 1], position_ids=at[:, i : i + 1], past_key_values=cache).logits for i in (0, 1)]
    for row, document, tokens in zip(torch.cat(got, 1), last, more, strict=True):
        whole = logits_of(model, np.concatenate([document, tokens])[None])[0]
        assert relative_rms(row, whole[-2:]) < 5e-6


def test_positions_of_padded_rows_start_no_document(export):
    """As generate() gives them: counted over real tokens, and anything where there is none."""
    model, tokens = export("rwkv6 hybrid").model(), ids(1, 20)
    mask = np.ones((3, 29), np.int64)
    mask[0, :9] = mask[1, 5:14] = mask[2, 20:] = 0
    rows = np.full(mask.shape, 7)
    rows[mask == 1] = np.tile(tokens[0], 3)
    positions = np.where(mask == 1, mask.cumsum(1) - 1, 1)
    options = {"attention_mask": torch.as_tensor(mask), "position_ids": torch.as_tensor(positions)}
    got, expected = logits_of(model, rows, **options), logits_of(model, tokens)[0]
    for row, real in zip(got, mask == 1, strict=True):
        assert relative_rms(row[real], expected) < 5e-6


@pytest.mark.parametrize("name", ["rwkv6", "rwkv7"])
@pytest.mark.parametrize("dtype", [torch.float16, None], ids=str)
def test_kernels_get_one_dtype_and_the_documents(export, name, dtype, monkeypatch):
    """flash-linear-attention's interface, played by our own recurrence; None: a whole model in bfloat16."""
    model = export(name).model(dtype=torch.float32 if dtype else torch.bfloat16)
    files, (_, rows, positions) = files_of(model), packed(2)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype or torch.float32, enabled=dtype is not None):
        expected = model(rows, position_ids=positions).logits.float()
    chunked, seen = getattr(files, f"wkv{name[-1]}_chunked"), set()

    def kernel(r, *others, scale, initial_state, output_final_state, cu_seqlens=None):
        # The log decays are k's or v's neighbours: after r in RWKV-7, last in GLA.
        decays = others[0] if name == "rwkv7" else others[-1]
        seen.update(x.dtype for x in (r, *others) if x is not decays)
        assert scale == 1.0 and output_final_state and decays.dtype == initial_state.dtype == torch.float32
        tensors = (r, *others) if name == "rwkv7" else (r, others[2], others[0], others[1])
        if cu_seqlens is None:
            return chunked(*tensors, initial_state)
        assert r.shape[0] == 1 and len(initial_state) == len(cu_seqlens) - 1
        pairs = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        parts = [
            chunked(*(x[:, begin:end] for x in tensors), initial_state[i : i + 1])
            for i, (begin, end) in enumerate(pairs)
        ]
        return torch.cat([out for out, _ in parts], 1), torch.cat([state for _, state in parts])

    monkeypatch.setattr(files, "chunk_gla" if name == "rwkv6" else "chunk_rwkv7", kernel)
    monkeypatch.setattr(files, "on_gpu", lambda x: x.dtype != torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype or torch.float32, enabled=dtype is not None):
        got = model(rows, position_ids=positions).logits.float()
    assert seen == {dtype or torch.bfloat16}
    assert relative_rms(got, expected) < 1e-5
