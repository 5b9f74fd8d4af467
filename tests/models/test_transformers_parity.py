"""Teacher logits against transformers' own models, for random small models of every family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radlads_jax.models import bind, init_state
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params

torch = pytest.importorskip("torch", reason="compares with torch, which is pinned for Python 3.11 alone")
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Of value heads two a key head; RoPE on half of a head.
QWEN3_5 = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
CASES = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": False}),
    "qwen3_biased": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama_biased": ("Llama", {"attention_bias": True}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear_rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "qwen3_5": ("Qwen3_5Text", QWEN3_5),
    "mistral": ("Mistral", {"sliding_window": None}),
}


@pytest.fixture(params=CASES, scope="module")
def reference(request, tmp_path_factory):
    """(directory, tokens, transformers' float32 logits)."""
    name, overrides = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SMALL | overrides))
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases: away from their neutral values
                parameter.add_(0.3 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    tokens = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, 150))
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.double().numpy()
    return directory, tokens, logits


def our_logits(directory, tokens, dtype: str) -> np.ndarray:
    cfg = dataclasses.replace(model_config_from_hf(read_config(directory)), dtype=dtype)
    params = load_params(directory, cfg, dtype=dtype)
    decoder = bind(cfg, params)
    hidden, _ = jax.jit(lambda t: decoder.hidden(t))(jnp.asarray(tokens))
    return np.asarray(decoder.logits(hidden), np.float64)


def relative_rms(got, expected) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_logits(reference, dtype, tolerance):
    directory, tokens, expected = reference
    if dtype == "bfloat16" and "linear_attention" in read_config(directory).get("layer_types", []):
        tolerance = 4.3e-2  # transformers' own bfloat16 is 4.3e-2 away from its float32 here
    assert relative_rms(our_logits(directory, tokens, dtype), expected) < tolerance


def test_a_hybrid_decodes_as_transformers_reads_whole(reference):
    directory, tokens, expected = reference
    cfg = model_config_from_hf(read_config(directory))
    if cfg.recurrent_mixer is None:
        pytest.skip("softmax layers alone: test_decoder")
    decoder, state, parts = bind(cfg, load_params(directory, cfg)), init_state(cfg, 2, 150), []
    step = jax.jit(lambda chunk, state: decoder.hidden(chunk, state=state))
    for chunk in np.split(jnp.asarray(tokens), [147, 148, 149], axis=1):
        hidden, state = step(chunk, state)
        parts.append(decoder.logits(hidden))
    assert relative_rms(np.concatenate(parts, axis=1), expected) < 1e-5
