"""The config.json values that decide the shapes of the paper's teachers, for plans made without a network.

Source: each model's config.json on the Hugging Face hub.
"""

from typing import Any


def _qwen2(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool = False, **more: Any
):
    values = {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
    }
    return values | more


KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen/Qwen2.5-3B-Instruct": _qwen2(2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen2.5-14B-Instruct": _qwen2(5120, 13824, 48, 40, 8, 152064),
    "Qwen/Qwen2.5-32B-Instruct": _qwen2(5120, 27648, 64, 40, 8, 152064),
    "Qwen/Qwen2.5-72B-Instruct": _qwen2(8192, 29568, 80, 64, 8, 152064),
    "Qwen/QwQ-32B": _qwen2(5120, 27648, 64, 40, 8, 152064, max_position_embeddings=131072, rms_norm_eps=1e-5),
    "Qwen/Qwen3-8B": _qwen2(
        4096, 12288, 36, 32, 8, 151936, model_type="qwen3", head_dim=128, max_position_embeddings=40960
    ),
}
