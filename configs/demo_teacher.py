"""Makes the demo's teacher: a Qwen2-format model trained from scratch on the project's synthetic language.

python -m radlads_jax.launch --config configs/demo_teacher.py --workdir runs/demo_teacher
"""

from ml_collections import ConfigDict

from radlads_jax.config import defaults
from radlads_jax.recipes import let_documents_follow


def get_config() -> ConfigDict:
    config = defaults()
    config.dtype = "float32"
    config.stages = ("pretrain",)
    config.student.mixer = "attention"
    config.teacher.scratch = ConfigDict(
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 896,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
    )
    config.teacher.look_back = (1, 2, 1)
    config.data.source = "synthetic"
    let_documents_follow(config.data, 100_000)
    config.data.seed = 0
    config.pretrain.tokens = 16_000_000
    config.pretrain.seq_len = 256
    config.pretrain.batch_size = 4
    config.pretrain.lr = config.pretrain.mixer_lr = 2e-3
    config.pretrain.lr_final = config.pretrain.mixer_lr_final = 1e-4
    config.pretrain.remat = "none"
    config.train.answer_tales = 192
    config.export.dtype = "bfloat16"
    return config
