"""Generators of bad model and data files, by kind, for fuzz_files.py: each writes one case from a random generator."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_readers as readers
from fuzz_damage import JUNK, Rng, deep, flipped, mutated, truncated
from fuzz_data_cases import (
    jsonl,
    jsonl_gz,
    parquet_bytes,
    parquet_column,
    saved_dataset,
    text,
    token_file,
    token_file_bytes,
)
from fuzz_readers import MODEL, WEIGHTS

INDEX = f"{WEIGHTS}.index.json"
OUTSIDE = (
    "../{}",
    "/etc/passwd",
    "/{}",
    "sub/{}",
    "..",
    ".",
    "",
    ".{}",
    "C:\\{}",
    "a\\{}",
    "{}\0",
    "../../../dev/zero",
    "{}/",
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """make writes a case into a directory; read must end in a ValueError, or return where the case may be sound."""

    make: Callable[[Rng, Path], None]
    read: Callable[[Path, Path], None]
    may_be_sound: bool = False


def packed(entries: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header, as an object or as text, and data."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def weights_case(change: Callable[[Rng, dict, bytes], bytes]) -> Callable[[Rng, Path], None]:
    """A model directory whose weights went through change(rng, header, data) -> the file."""

    def make(rng: Rng, place: Path) -> None:
        readers.write_model(place)
        whole = (place / WEIGHTS).read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:start])
        (place / WEIGHTS).write_bytes(change(rng, header, whole[start:]))

    return make


def header_length(rng: Rng, header: dict, data: bytes) -> bytes:
    real = len(json.dumps(header))
    lengths = (
        0,
        1,
        real - 1,
        real + 1,
        real + len(data) + 1,
        10**8,
        10**8 + 1,
        2**31,
        2**32,
        2**63 - 1,
        2**63,
        2**64 - 1,
    )
    return packed(header, data, rng.choice((*lengths, rng.randrange(real + len(data) + 1, 2**64))))


def header_text(rng: Rng, header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    choices = (
        lambda: truncated(rng, text),
        lambda: rng.randbytes(rng.randrange(200)),
        lambda: deep(rng).encode(),
        lambda: json.dumps(rng.choice(JUNK[:-1])).encode(),
        lambda: text.replace(b'"dtype"', b'"dty\xffpe"', 1),
        lambda: text.replace(b'"F32"', b"9" * 5000, 1),
        lambda: text + b"," + text,
        lambda: b'{"' + b"a" * 10**6 + b'": 1}',
    )
    return packed(rng.choice(choices)(), data)


def header_entry(rng: Rng, header: dict, data: bytes) -> bytes:
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    field = rng.choice(list(entry))
    start, stop = entry["data_offsets"]
    bad: dict[str, tuple] = {
        "dtype": ("F64", "f32", "F4", "I32", "BOOL", "object", "F8_E4M3", "U64"),
        "shape": (
            [-1],
            [2**62, 4],
            [2**64],
            [1.0],
            [True],
            ["3"],
            [[3]],
            [0],
            [*entry["shape"], 2],
            10**30,
            [1] * 10_000,
        ),
        "data_offsets": (
            [stop, start],
            [start + 1, stop + 1],
            [start - 1, stop - 1],
            [start, stop, stop],
            [start, stop + 4],
            [0, len(data) + 4],
            [start + 2**40, stop + 2**40],
            [2**63, 2**63 + stop - start],
            [float(start), stop],
            [start],
        ),
    }
    entry[field] = rng.choice((*bad[field], *(junk for junk in JUNK if junk != entry[field])))
    if rng.random() < 0.1:
        del entry[field]
    return packed(header, data)


def duplicate_name(rng: Rng, header: dict, data: bytes) -> bytes:
    name = rng.choice([name for name in header if name != "__metadata__"])
    twice = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    inner = json.dumps(header).replace('"dtype":', '"dtype": "F32", "dtype":', 1)
    return packed(rng.choice((twice, inner)).encode(), data)


def other_names(rng: Rng, header: dict, data: bytes) -> bytes:
    name = rng.choice([name for name in header if name != "__metadata__"])
    strange = ("../../x", "\x1b[31mred", "a\nb", "", "\0", "model.layers.999999999999.x", "x" * 100_000, "‮txt")
    entry = header.pop(name)
    header[rng.choice(strange)] = entry
    return packed(header, data)


def size_of_file(rng: Rng, header: dict, data: bytes) -> bytes:
    whole = packed(header, data)
    return rng.choice((truncated(rng, whole), whole + rng.randbytes(rng.randint(1, 100)), whole[: -rng.randint(1, 8)]))


def header_bytes(rng: Rng, header: dict, data: bytes) -> bytes:
    whole = packed(header, data)
    return flipped(rng, whole, 0, len(whole) - len(data))


def index(rng: Rng, place: Path) -> None:
    readers.write_model(place, files=3)
    contents = json.loads((place / INDEX).read_text())
    weight_map, name = contents["weight_map"], rng.choice(list(contents["weight_map"]))
    file = weight_map[name]
    (place.parent / file).write_bytes((place / file).read_bytes())
    action = rng.randrange(6)
    if action == 0:
        weight_map[name] = rng.choice(OUTSIDE).format(file)
    elif action == 1:
        contents["weight_map"] = {each: rng.choice(OUTSIDE[:4]).format(where) for each, where in weight_map.items()}
    elif action == 2:
        weight_map[name] = rng.choice(JUNK)
    elif action == 3:
        (place / file).unlink()
    elif action == 4:
        other = next(where for where in weight_map.values() if where != file)
        contents["weight_map"] = rng.choice(
            (*JUNK, {name: file}, weight_map | {name: other}, weight_map | {"x": "y.safetensors"})
        )
    else:
        text = (place / INDEX).read_bytes()
        broken = truncated(rng, text[:-2])
        (place / INDEX).write_bytes(
            rng.choice((broken, deep(rng).encode(), b"\xff" + text, b"9" * 5000, b"", text + b"}"))
        )
        return
    (place / INDEX).write_text(json.dumps(contents))


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
NUMBERS = ("rms_norm_eps", "rope_theta")
FLAGS = ("tie_word_embeddings", "use_sliding_window", "mlp_bias")
NOT_SIZES = (
    True,
    False,
    -1,
    0,
    1.5,
    8.0,
    1e400,
    float("nan"),
    10**30,
    2**31 + 1,
    "8",
    "",
    [8],
    [],
    {},
    {"a": 8},
    -(2**63),
)
NOT_NUMBERS = (True, False, -1.0, 0, float("nan"), 1e400, -1e400, 10**400, 1e308, "1e-6", [], {}, [1e-6], {"a": 1})
NOT_FLAGS = (0, 1, "true", "false", "", [], {}, 1.0, float("nan"), [True])
NOT_SCALING = (True, 1, "linear", [], [1], {"type": 3}, {"type": "linear"}, {"type": "linear", "factor": "2"})
NOT_SCALING += tuple({"rope_type": "linear", "factor": x} for x in (float("nan"), -1, 0.5, True, 1e400, None, [2]))
NOT_SCALING += tuple({"rope_type": x, "factor": 2.0} for x in ("yarn", "dynamic", "longrope", "", 7, ["linear"], {}))
NOT_SCALING += ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},)
BAD_VALUES: dict[str, tuple] = {key: NOT_SIZES for key in SIZES}
BAD_VALUES |= {"head_dim": (*NOT_SIZES[:3], *NOT_SIZES[4:], 7)}
BAD_VALUES |= {"max_position_embeddings": NOT_SIZES, "rope_scaling": NOT_SCALING, "rope_parameters": NOT_SCALING}
BAD_VALUES |= {key: NOT_NUMBERS for key in NUMBERS} | {key: NOT_FLAGS for key in FLAGS}
BAD_VALUES |= {
    "model_type": (None, 3, True, "", "mamba", "../qwen2", [], {}, ["qwen2"], "qwen2\0", "Qwen2", "x" * 10**5)
}
BAD_VALUES |= {"layer_types": (1, "full", {}, [1], ["sliding_attention"], [["full_attention"]], True)}
BAD_VALUES |= {"hidden_act": ("gelu", 1, [], {}, True), "quantization_config": ({}, {"bits": 4}, 1, "x", [])}
BAD_VALUES |= {"num_experts": (4, "4", [1], {"a": 1}, True, -1), "partial_rotary_factor": (0.5, "1", [], {}, True, 2)}


def config_value(rng: Rng, place: Path) -> None:
    """One to three keys with values that no model has, in a config whose other keys are sound."""
    readers.write_model(place)
    config = json.loads((place / "config.json").read_text())
    for key in rng.sample(sorted(BAD_VALUES), rng.choice((1, 1, 2, 3))):
        # "rope_scaling" is an empty object in configs without any scaling, and so are null and no experts.
        config[key] = rng.choice(BAD_VALUES[key])
    if rng.random() < 0.1:
        del config[rng.choice(("model_type", *SIZES[:5]))]
    (place / "config.json").write_text(json.dumps(config))


def config_text(rng: Rng, place: Path) -> None:
    readers.write_model(place)
    text = (place / "config.json").read_bytes().strip()
    choices = (
        lambda: truncated(rng, text),
        lambda: deep(rng).encode(),
        lambda: b'{"a": ' + b"9" * 5000 + b"}",
        lambda: json.dumps(rng.choice([junk for junk in JUNK if not isinstance(junk, dict)])).encode(),
        lambda: b"\xff\xfe" + text,
        lambda: text + text,
        lambda: rng.randbytes(100),
        lambda: b"",
    )
    (place / "config.json").write_bytes(rng.choice(choices)())


def config_anywhere(rng: Rng, place: Path) -> None:
    """A student's or teacher's config with junk in any place."""
    readers.write_model(place)
    config = rng.choice(readers.CONFIGS)
    for _ in range(rng.randint(1, 3)):
        config = mutated(rng, config) if isinstance(config, dict) else config
    (place / "config.json").write_text(json.dumps(config))


def tokenizer_text(rng: Rng, place: Path) -> None:
    readers.write_tokenizer(place)
    name = rng.choice(("tokenizer.json", "tokenizer_config.json"))
    text = (place / name).read_bytes().strip()
    broken = (
        truncated(rng, text),
        deep(rng).encode(),
        rng.randbytes(99),
        b"[1]",
        b'"a"',
        b"9" * 5000,
        b"\xff" + text,
        b"7",
    )
    (place / name).write_bytes(rng.choice(broken))


def tokenizer_anywhere(rng: Rng, place: Path) -> None:
    readers.write_tokenizer(place)
    path = place / rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    tree = json.loads(path.read_text())
    for _ in range(rng.randint(1, 3)):
        tree = mutated(rng, tree)
    path.write_text(json.dumps(tree))


def tokenizer_vocabulary(rng: Rng, place: Path) -> None:
    """Ids beyond the model's, below zero, no integers; a vocabulary that lacks the pieces of its merges."""
    readers.write_tokenizer(place)
    tree = json.loads((place / "tokenizer.json").read_text())
    vocab, size = tree["model"]["vocab"], MODEL.vocab_size
    piece = rng.choice(list(vocab))
    if rng.random() < 0.2:
        tree["model"]["merges"] = [[piece, "nowhere"]]
    elif rng.random() < 0.3:
        tree["added_tokens"][0]["id"] = rng.choice((-1, 1.5, "1", None, 2**32, 2**64, [], size, size + 7, 2**31))
        tree["added_tokens"][0]["content"] = "<new>"
    else:
        vocab[piece] = rng.choice(
            (-1, 1.5, "1", None, True, size, size + rng.randrange(10**6), 2**31, 2**32 - 1, 2**32, 10**30)
        )
    (place / "tokenizer.json").write_text(json.dumps(tree))


KINDS = {
    "safetensors: header's length": Kind(weights_case(header_length), readers.read_weights),
    "safetensors: header's text": Kind(weights_case(header_text), readers.read_weights),
    "safetensors: entries": Kind(weights_case(header_entry), readers.read_weights),
    "safetensors: a name twice": Kind(weights_case(duplicate_name), readers.read_weights),
    "safetensors: other names": Kind(weights_case(other_names), readers.read_weights),
    "safetensors: file's size": Kind(weights_case(size_of_file), readers.read_weights),
    "safetensors: header's bytes": Kind(weights_case(header_bytes), readers.read_weights, may_be_sound=True),
    "index": Kind(index, readers.read_indexed),
    "config: values": Kind(config_value, readers.read_weights),
    "config: text": Kind(config_text, readers.read_weights),
    "config: any place": Kind(config_anywhere, readers.read_config_only, may_be_sound=True),
    "tokenizer: text": Kind(tokenizer_text, readers.read_tokenizer),
    "tokenizer: vocabulary": Kind(tokenizer_vocabulary, readers.read_tokenizer),
    "tokenizer: any place": Kind(tokenizer_anywhere, readers.read_tokenizer, may_be_sound=True),
    "token file: fields": Kind(token_file, readers.read_token_file),
    "token file: bytes": Kind(token_file_bytes, readers.read_token_file, may_be_sound=True),
    "jsonl": Kind(jsonl, readers.read_documents("data.jsonl", "jsonl")),
    "jsonl.gz": Kind(jsonl_gz, readers.read_documents("data.jsonl.gz", "jsonl"), may_be_sound=True),
    "text": Kind(text, readers.read_documents("data.txt", "text")),
    "parquet: column": Kind(parquet_column, readers.read_documents("data.parquet", "parquet")),
    "parquet: bytes": Kind(parquet_bytes, readers.read_documents("data.parquet", "parquet"), may_be_sound=True),
    "saved dataset": Kind(saved_dataset, readers.read_documents(".", "hf"), may_be_sound=False),
}
