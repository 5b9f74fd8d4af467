"""Sound files for fuzz_cases.py to damage, and the readers that have to refuse what it made of them."""

import functools
import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from radlads_jax.data import binidx, prepare, sources
from radlads_jax.data.tokenise import Framing, prompt_beginning
from radlads_jax.models import MIXERS, ModelConfig
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hf_export import hf_config_from_model
from radlads_jax.porting.hub import check_tokenizer, load_tokenizer
from radlads_jax.porting.model_tensors import model_tensors
from radlads_jax.porting.names import disk_tensors

WEIGHTS = "model.safetensors"
MODEL = ModelConfig("qwen2", 300, 8, 8, 2, 1, 4, (("attention", 2),), qkv_bias=True, max_position_embeddings=64)
STUDENTS = [MODEL.as_student(name, MIXERS[name].choose(8), (1,)) for name in ("rad_rwkv6", "rad_rwkv7")]
CONFIGS = [hf_config_from_model(cfg, {"eos_token_id": 0}) for cfg in (MODEL, *STUDENTS)]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS.append(CONFIGS[0] | {"model_type": "llama", "rope_scaling": LLAMA3})


@functools.cache
def _tensors() -> dict[str, np.ndarray]:
    return {name: np.zeros(location.disk_shape, np.float32) for name, location in disk_tensors(MODEL).items()}


@functools.cache
def _files(count: int) -> dict[str, bytes]:
    """Weights as `count` files by name, with their index where there are several."""
    tensors = _tensors()
    if count == 1:
        return {WEIGHTS: safetensors.numpy.save(tensors, {"format": "pt"})}
    weight_map = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(tensors)}
    files = {
        file: safetensors.numpy.save({name: tensors[name] for name in tensors if weight_map[name] == file})
        for file in set(weight_map.values())
    }
    return files | {f"{WEIGHTS}.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


def write_model(place: Path, files: int = 1) -> None:
    for name, data in _files(files).items():
        (place / name).write_bytes(data)
    (place / "config.json").write_text(json.dumps(CONFIGS[0]))


@functools.cache
def byte_tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer


def write_tokenizer(place: Path) -> None:
    (place / "tokenizer.json").write_text(byte_tokenizer().to_str())
    config = {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    config |= {
        "added_tokens_decoder": {"258": {"content": "<end>", "special": True}},
        "clean_up_tokenization_spaces": False,
    }
    (place / "tokenizer_config.json").write_text(json.dumps(config))


def token_file_parts(rng: random.Random) -> dict[str, Any]:
    """The fields of a sound token file, those that count as what they count."""
    sizes = np.array([rng.randint(1, 9) for _ in range(rng.randint(2, 9))], np.int64)
    ends = np.cumsum(sizes)
    return {
        "magic": b"MMIDIDX\0\0",
        "version": 1,
        "code": 8,
        "sequences": len(sizes),
        "boundaries": len(sizes) + 1,
        "sizes": sizes,
        "pointers": 2 * (ends - sizes),
        "documents": np.arange(len(sizes) + 1),
        "tokens": np.array([rng.randrange(MODEL.vocab_size) for _ in range(ends[-1])]),
    }


def write_token_file(place: Path, parts: dict[str, Any]) -> None:
    counts = struct.pack("<QBQQ", parts["version"], parts["code"], parts["sequences"], parts["boundaries"])
    arrays = (parts["sizes"].astype("<i4"), parts["pointers"].astype("<i8"), parts["documents"].astype("<i8"))
    (place / "t.idx").write_bytes(parts["magic"] + counts + b"".join(a.tobytes() for a in arrays))
    (place / "t.bin").write_bytes(parts["tokens"].astype("<u2").tobytes())


def write_saved_dataset(place: Path) -> None:
    Dataset.from_dict({"text": [f"row {i}" for i in range(20)]}).save_to_disk(place)


def read_indexed(place: Path, work: Path) -> None:
    """What make_job reads of a teacher."""
    del work
    cfg = model_config_from_hf(read_config(place))
    model_tensors(place, cfg)


def read_weights(place: Path, work: Path) -> None:
    """The same; where it finds nothing wrong in a single file, safetensors itself must agree."""
    read_indexed(place, work)
    loaded = safetensors.numpy.load((place / WEIGHTS).read_bytes())
    assert {name: array.shape for name, array in loaded.items()} == {n: a.shape for n, a in _tensors().items()}


def read_config_only(place: Path, work: Path) -> None:
    """A config that is taken describes a model of finite numbers and sizes that can be counted."""
    del work
    cfg = model_config_from_hf(read_config(place))
    assert all(math.isfinite(x) and x > 0 for x in (cfg.rope_theta, cfg.rms_norm_eps, cfg.num_layers, cfg.vocab_size))
    assert all(min(location.disk_shape) >= 1 for location in disk_tensors(cfg).values())


def read_tokenizer(place: Path, work: Path) -> None:
    """A tokenizer that is taken encodes to the ids of the model's vocabulary, and its fields may be asked for."""
    tokenizer = load_tokenizer(place)
    check_tokenizer(tokenizer, MODEL)
    text = work / "text.txt"
    text.write_text("The cat, the dog.\n\n\nAnother text.")
    source = sources.Source(str(text))
    made = prepare.prepare(
        source,
        tokenizer.backend_tokenizer,
        work / "data",
        vocab_size=MODEL.vocab_size,
        framing=Framing(prompt_beginning(tokenizer), tokenizer.eos_token_id),
    )
    assert made.num_documents == 2
    ids = tokenizer("the end")["input_ids"]
    assert all(type(i) is int and 0 <= i < MODEL.vocab_size for i in ids)
    tokenizer.decode(ids)


def read_token_file(place: Path, work: Path) -> None:
    del work
    made = binidx.open_token_file(place / "t")
    made.check_vocab(MODEL.vocab_size)
    assert sum(len(made.document(i)) for i in range(made.num_documents)) <= made.num_tokens


def read_documents(name: str, kind: str) -> Callable[[Path, Path], None]:
    def read(place: Path, work: Path) -> None:
        source = sources.Source(str(place / name), kind)
        prepare.prepare(source, byte_tokenizer(), work / "data", vocab_size=MODEL.vocab_size, framing=Framing())

    return read
