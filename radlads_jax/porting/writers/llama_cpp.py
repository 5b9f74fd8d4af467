"""llama.cpp's rwkv6qwen2: Hugging Face's directory of a RAD-RWKV6 student, which its converter reads."""

from radlads_jax.models.config import SOFTMAX, ModelConfig
from radlads_jax.porting.hf_export import modelling_files
from radlads_jax.porting.writers.fetching import planned_tensors
from radlads_jax.porting.writers.huggingface import config_with_code
from radlads_jax.porting.writers.writer import Writer
from radlads_jax.system.json_files import read_json
from radlads_jax.system.storage import AnyPath


def _obstacles(cfg: ModelConfig) -> list[str]:
    """What of a model llama.cpp's architecture rwkv6qwen2 cannot hold, or would compute otherwise."""
    if cfg.recurrent_mixer != "rad_rwkv6":
        return [f"the mixer {cfg.recurrent_mixer or SOFTMAX} (only rad_rwkv6 has one)"]
    mixer = cfg.mixer
    softmax = list(cfg.softmax_layers)
    obstacles = {
        f"softmax layers {softmax}": bool(softmax),
        "RoPE (student.use_rope)": mixer.use_rope,
        "no token shift (student.token_shift)": not mixer.token_shift,
        f"the gate {mixer.gate!r} (student.gate; full is needed)": mixer.gate != "full",
        "GroupNorm (student.group_norm)": mixer.group_norm,
        "no state balancing (student.balance_state)": not mixer.balance_state,
        "a tied head (write it with --untie)": cfg.tie_embeddings,
        "norms of q and k (student.qk_norm)": cfg.qk_norm or mixer.qk_norm,
        "a bias of o": cfg.o_bias,
        f"heads of {cfg.num_heads} x {cfg.head_dim} in a width of {cfg.hidden_size}": cfg.num_heads * cfg.head_dim
        != cfg.hidden_size,
    }
    return [name for name, present in obstacles.items() if present]


def _tokenizer_obstacles(directory: AnyPath) -> list[str]:
    """Why llama.cpp's converter cannot read the tokenizer: it wants a sentencepiece model or byte-level BPE."""
    if (directory / "tokenizer.model").is_file():
        return []
    file = directory / "tokenizer.json"
    if not file.is_file():
        return ["no tokenizer (tokenizer.model or tokenizer.json)"]
    kind = (read_json(file).get("model") or {}).get("type")
    return [] if kind == "BPE" else [f"a tokenizer of type {kind}"]


WRITER = Writer(
    "llama.cpp",
    planned_tensors,
    config_with_code,
    modelling_files,
    obstacles=lambda cfg, directory: _obstacles(cfg) + (_tokenizer_obstacles(directory) if directory else []),
    expected="a RAD-RWKV6 student with the paper's switches and a head of its own",
)
