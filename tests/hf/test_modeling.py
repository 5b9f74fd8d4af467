"""The torch files of an export, as transformers loads them, against the JAX student whose weights they read."""

import ast
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_exports import MODELS, OTHER_SOFTMAX, SOME, Exported, ids, relative_rms

from radlads_jax.models import bind
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hf_export import modelling_files
from radlads_jax.porting.load import load_params
from radlads_jax.porting.save import save_params

torch = pytest.importorskip("torch", reason="compares with torch, which is pinned for Python 3.11 alone")
transformers = pytest.importorskip("transformers")


@functools.cache
def our_logits(exported: Exported) -> np.ndarray:
    """Of the tokens ids(2, 77), float32."""
    return jax_logits(exported, ids(2, 77))


def jax_logits(exported: Exported, tokens: np.ndarray, dtype: str = "float32") -> np.ndarray:
    cfg = dataclasses.replace(exported.cfg, dtype=dtype)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), exported.params)

    def run(params, tokens):
        decoder = bind(cfg, params)
        return decoder.logits(decoder.hidden(tokens)[0])

    return np.asarray(jax.jit(run)(params, jnp.asarray(tokens)), np.float64)


@torch.no_grad()
def torch_logits(model, tokens, **options) -> np.ndarray:
    return model(torch.as_tensor(tokens), **options).logits.double().numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_ours(export, name):
    exported, tokens = export(name), ids(2, 77)
    assert relative_rms(torch_logits(exported.model(), tokens), our_logits(exported)) < 1e-5


@pytest.mark.parametrize("name", ["rwkv6 hybrid", "rwkv7", "window rwkv7"])
def test_logits_in_bfloat16(export, name):
    exported, tokens = export(name), ids(2, 77)
    model = exported.model(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = our_logits(exported)
    ours = relative_rms(jax_logits(exported, tokens, "bfloat16"), expected)
    # As far from float32 as JAX's own bfloat16, within a half.
    assert relative_rms(torch_logits(model, tokens), expected) < 1.5 * ours < 0.1


@pytest.mark.parametrize("chunks", [(1,) * 40, (1, 33, 1, 5), (17, 23)], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_decoding_in_chunks_is_reading_at_once(export, name, chunks):
    model, tokens = export(name).model(), torch.as_tensor(ids(2, 40))
    cache, got = None, []
    for part in tokens.split(chunks, dim=1):
        with torch.no_grad():
            out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        got.append(out.logits)
    assert cache.get_seq_length() == 40
    assert relative_rms(torch.cat(got, 1), torch_logits(model, tokens)) < 5e-6


@pytest.mark.parametrize("name", [*SOME, OTHER_SOFTMAX])
def test_padding_anywhere_changes_nothing(export, name):
    """A row padded left, in the middle or right, read in two calls, gives its real tokens' logits."""
    model, tokens = export(name).model(), ids(1, 20)
    expected = torch_logits(model, tokens)[0]
    mask = np.ones((3, 29), bool)
    mask[0, :9] = mask[1, 5:14] = mask[2, 12:21] = False
    rows = np.full(mask.shape, 7)
    rows[mask] = np.tile(tokens[0], 3)
    with torch.no_grad():
        first = model(torch.as_tensor(rows[:, :21]), attention_mask=torch.as_tensor(mask[:, :21]), use_cache=True)
        cache, whole = first.past_key_values, torch.as_tensor(mask)
        second = model(torch.as_tensor(rows[:, 21:]), attention_mask=whole, past_key_values=cache)
    got = torch.cat([first.logits, second.logits], 1).numpy()
    for row in range(3):
        assert relative_rms(got[row, mask[row]], expected) < 5e-6


@pytest.mark.parametrize("name", SOME)
def test_greedy_text_of_a_padded_batch_is_ours(export, name):
    """Every token that generate() chose has our largest logit after the tokens before it."""
    exported, prompts, new = export(name), [ids(1, n, seed=n)[0] for n in (12, 7, 1)], 8
    rows = torch.as_tensor(np.stack([np.pad(p, (12 - len(p), 0)) for p in prompts]))
    mask = torch.arange(12) >= torch.tensor([[12 - len(p)] for p in prompts])
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = exported.model().generate(rows, attention_mask=mask.long(), **options)[:, 12:].numpy()
    whole = [np.concatenate([p, text]) for p, text in zip(prompts, got, strict=True)]
    # Padded right, which no causal model notices in the tokens before.
    logits = jax_logits(exported, np.stack([np.pad(row, (0, 20 - len(row))) for row in whole]))
    for row, prompt, text in zip(logits, prompts, got, strict=True):
        np.testing.assert_array_equal(row.argmax(-1)[len(prompt) - 1 :][:new], text)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 20}, {"num_beams": 3}], ids=["sampling", "beams"])
def test_generate_gives_the_same_with_and_without_a_state(export, name, options):
    """Without one every step reads the whole row again; beams exercise the reordering of states."""
    model, prompt = export(name).model(), torch.as_tensor(ids(2, 6))
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache, max_new_tokens=9, **options
            )
        )
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert results[0].shape[1] > 6


@pytest.mark.parametrize("name", SOME)
def test_generate_continues_from_a_returned_state(export, name):
    model, prompt = export(name).model(), torch.as_tensor(ids(1, 6))
    options = {"do_sample": False, "eos_token_id": None}
    whole = model.generate(prompt, max_new_tokens=8, **options)
    first = model.generate(prompt, max_new_tokens=3, return_dict_in_generate=True, **options)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **options)
    torch.testing.assert_close(rest, whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", SOME)
def test_saved_by_transformers_and_read_again(export, name, tmp_path):
    exported, tokens = export(name), ids(1, 30)
    model = exported.model()
    model.save_pretrained(tmp_path / "saved")
    copied = {path.name for path in exported.directory.glob("*.py")}
    assert copied == {path.name for path in modelling_files(exported.cfg)} and len(copied) >= 6
    assert copied <= {path.name for path in (tmp_path / "saved").iterdir()}
    again = Exported(tmp_path / "saved", exported.cfg, {}).model()
    np.testing.assert_array_equal(torch_logits(again, tokens), torch_logits(model, tokens))
    assert model_config_from_hf(read_config(tmp_path / "saved")) == exported.cfg
    params = load_params(tmp_path / "saved", exported.cfg)
    jax.tree.map(np.testing.assert_array_equal, params, exported.params)


@pytest.mark.parametrize("name", SOME)
def test_gradient_checkpointing_gives_the_same_gradients(export, name):
    model, tokens = export(name).model().train(), torch.as_tensor(ids(2, 20))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        out = model(tokens, labels=tokens)
        assert out.past_key_values is None
        out.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for path, gradient in gradients[0].items():
        assert relative_rms(gradients[1][path], gradient) < 1e-6, path


def test_loss_and_kept_logits(export):
    model, tokens = export("rwkv7").model(), torch.as_tensor(ids(2, 20))
    with torch.no_grad():
        out = model(tokens, labels=tokens)
        kept = model(tokens, logits_to_keep=3).logits
    logs = jax.nn.log_softmax(out.logits.double().numpy()[:, :-1])
    expected = -np.take_along_axis(np.asarray(logs), tokens.numpy()[:, 1:, None], -1).mean()
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(kept, out.logits[:, -3:])


def test_hidden_states(export):
    model, tokens = export("rwkv6").model(), torch.as_tensor(ids(1, 9))
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
        base = transformers.AutoModel.from_pretrained(
            export("rwkv6").directory, trust_remote_code=True, dtype=torch.float32
        )
        torch.testing.assert_close(base(tokens).last_hidden_state, out.hidden_states[-1])
        torch.testing.assert_close(model(inputs_embeds=out.hidden_states[0]).logits, out.logits)
    assert len(out.hidden_states) == 4
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)


@pytest.mark.parametrize("name", ["rwkv6", "rwkv7", "window rwkv7"])
def test_fresh_weights_are_stage_0s(export, name):
    """RADLADS section 2's initial values that are not random."""
    config = transformers.AutoConfig.from_pretrained(export(name).directory, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    rising = np.arange(32) / 31
    for depth, layer in zip((0, 0.5, 1), model.model.layers, strict=True):
        own = {key: value.detach().numpy() for key, value in layer.self_attn.named_parameters()}
        if name == "rwkv6":
            expected = {"time_decay": -6 + 5 * rising ** (0.7 + 1.3 * depth), "gate.weight": 0, "time_maa_x": 1}
            expected |= dict.fromkeys(["time_decay_w1", "time_maa_w1", *(f"time_maa_{i}" for i in "rkvwg")], 0)
        else:
            expected = {"w0": -7 + 5 * rising ** (0.85 + depth**0.5) + 0.5, "a0": 0, "v0": 1, "k_k": 0.85, "k_a": 1}
            expected |= dict.fromkeys(["w1", "a1", "v1", "g1"], 0)
        if name == "window rwkv7":
            expected |= {"g2": 0, "share.weight": 0, "share.bias": -4}
        for key, value in expected.items():
            np.testing.assert_allclose(own[key].squeeze(), value, atol=1e-5, err_msg=key)
        assert all(np.isfinite(value).all() for value in own.values())


def test_tied_export(export, tmp_path):
    exported = export("rwkv7")
    save_params(exported.params, exported.cfg, tmp_path / "tied", base_config={}, retie=True)
    model, tokens = Exported(tmp_path / "tied", exported.cfg, {}).model(), torch.as_tensor(ids(1, 20))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # The same hidden states as the untied export's, times the embedding.
    with torch.no_grad():
        hidden = exported.model()(tokens, output_hidden_states=True).hidden_states[-1]
    embedding = torch.tensor(np.asarray(exported.params["embed"]["embedding"]))
    assert relative_rms(torch_logits(model, tokens), hidden @ embedding.T) < 1e-6


def test_tokenizer_chat_template_and_generation_config(export, tokenizer_dir):
    exported = export("rwkv7")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported.directory, trust_remote_code=True)
    original = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    assert tokenizer("This is a tale of")["input_ids"] == original("This is a tale of")["input_ids"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<user>x"
    assert exported.model().generation_config.eos_token_id == 258


@pytest.mark.parametrize("name", ["rwkv6", "rwkv7", "window", "window rwkv7"])
def test_absent_keys_mean_what_they_mean_to_us(export, name):
    """A config.json with the dimensions alone is read as the same model by transformers' class and by porting."""
    directory = export(name).directory
    kind = type(transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True))
    keys = {
        "vocab_size": 300,
        "hidden_size": 1024,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_theta": 5e5,
    }
    full = kind(**keys).to_dict()
    assert full["rope_theta"] == full["rope_parameters"]["rope_theta"] == 5e5
    assert model_config_from_hf(full) == model_config_from_hf({"model_type": kind.model_type, **keys})


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("rwkv7", {"use_tokenshift": True}, "use_tokenshift"),
        ("rwkv7", {"hidden_act": "gelu"}, "gelu"),
        ("rwkv6", {"balance_state": True, "groupnorm_att": True}, "balance_state .*groupnorm_att"),
        ("rwkv6", {"gate_rank_type": 3}, "gate_rank_type 3"),
        ("rwkv6", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "yarn"),
        ("rwkv6", {"attention_layers": [3]}, r"attention_layers \[3\].*\b3 layers\b"),
        ("rwkv6", {"attention_layers": [0], "num_attention_layers": 1}, r"attention_layers \[0\].*\blast 1\b"),
        ("rwkv6", {"use_sliding_window": True}, "use_sliding_window"),
        ("window", {"attention_sinks": -1}, "attention_sinks -1"),
        ("window rwkv7", {"attention_window": 0}, "attention_window 0"),
        ("window rwkv7", {"use_rope": False, "gate_rank_type": 1}, "use_rope false; gate_rank_type 1"),
    ],
)
def test_configurations_that_are_refused(export, name, changes, named):
    config = transformers.AutoConfig.from_pretrained(export(name).directory, trust_remote_code=True)
    with pytest.raises(ValueError, match=named):
        type(config)(**(config.to_dict() | changes))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"past_key_values": transformers.DynamicCache()}, "DynamicCache"),
        ({"attention_mask": torch.zeros(1, 3)}, "attention_mask"),
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, "attention_mask"),
        ({"output_attentions": True}, "output_attentions"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "input_ids"),
    ],
)
def test_calls_that_are_refused(export, options, named):
    with pytest.raises(ValueError, match=named):
        export("rwkv7").model()(torch.zeros(1, 5, dtype=torch.long), **options)


@pytest.mark.parametrize("name", ["rwkv6", "window rwkv7"])
def test_the_files_need_torch_and_transformers_alone(export, name):
    allowed = {"math", "typing", "torch", "transformers", "fla"}
    for path in export(name).directory.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                beside = node.level == 1 and (path.parent / f"{node.module}.py").is_file()
                assert beside or (node.level == 0 and node.module.split(".")[0] in allowed), path
