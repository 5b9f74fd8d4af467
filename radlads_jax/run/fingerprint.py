"""What a run depends on beside its settings, told by contents: a continuation with others is refused, by name.

DIR/fingerprint.json: the teacher's tensors and config, the tokenizer, the text, the tokens, and the values of new
weights that a stage freezes (no checkpoint holds them: every start draws them again). No path or time is compared.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from radlads_jax.config import CHAT_STAGES
from radlads_jax.data.binidx import TokenFile
from radlads_jax.data.files import identity
from radlads_jax.porting.safetensors_read import StoredTensor, open_checkpoint
from radlads_jax.run.settings import begun_stages, settled_stages, trained_stages
from radlads_jax.system import hosts, storage
from radlads_jax.system.json_files import read_json, write_json
from radlads_jax.system.storage import AnyPath, read_ranges
from radlads_jax.system.untrusted import brief, listed, parse_json

FILE = "fingerprint.json"

# Of a tensor's bytes so many are read at so many places: any training step changes nearly all of them.
_SAMPLE_BYTES, _SAMPLES = 1 << 13, 4
# Of config.json: what a tool writes anew without any effect on the model.
_IGNORED = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures")
_VALUES = 8
_TOLERANCE = 1e-2
_ADVICE = {
    "teacher": "put the teacher's own files back (config.teacher.path)",
    "tokenizer": "put its own tokenizer back (config.data.tokenizer, or the teacher's)",
    "data": "put the text back as it was (config.data.path; of a hub dataset set config.data.revision), or take "
    "it away: the tokens in data/ are all that is read",
    "chats": "put the conversations back as they were (config.data.chats), or take them away",
    "logits": "put the stored logits back that it began with (config.teacher.logits)",
    "frozen": "go on with the versions of jax and radlads_jax that began it, and with its first stage's batch_size and "
    "seq_len, for a calibrated start reads the first batch",
}


def read(workdir: AnyPath) -> dict[str, Any]:
    """What the run in DIR began with; empty where none has, or one of an older version.

    Not what only a stage reads that has not begun: it may be another.
    """
    parts, settled = written(workdir), settled_stages(workdir)
    return {part: value for part, value in parts.items() if part != "chats" or not CHAT_STAGES.isdisjoint(settled)}


def written(workdir: AnyPath) -> dict[str, Any]:
    """All of it, also what only such a stage reads."""
    return _known(workdir) if has_begun(workdir) else {}


def begin(workdir: AnyPath, parts: Mapping[str, Any]) -> None:
    """Writes what the run depends on, as far as it is not known of one that has begun; the first host does."""
    _write(workdir, {**parts, **read(workdir)})


def remember(workdir: AnyPath, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds to the parts what the run turns out to depend on, as far as it is not known yet; the first host does."""
    known = _known(workdir)
    _write(workdir, known | {part: {**values, **known.get(part, {})} for part, values in parts.items()})


def _known(workdir: AnyPath) -> dict[str, Any]:
    path = workdir / FILE
    if not path.exists():
        return {}
    return parse_json(storage.read_text(path), path, "Choose another --workdir.")


def _write(workdir: AnyPath, parts: Mapping[str, Any]) -> None:
    if hosts.is_first() and parts != _known(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / FILE, parts, indent=1)


def has_begun(workdir: AnyPath) -> bool:
    """Whether a run in DIR has computed a step: it has its settings, or, of an older version, a checkpoint.

    One that was refused or ran out of memory before has no say in the next one.
    """
    return (workdir / "config.json").exists() or bool(begun_stages(workdir))


def finished(workdir: AnyPath, stages: Sequence[str]) -> dict[str, Any] | None:
    """summary.json of a run whose export and scores are there; None of one that still has to train or to score.

    stages: the run's now. Where they are others than those that were trained, it is to go on.
    """
    trained = trained_stages(workdir)
    if trained != list(stages) or not (workdir / "export").is_dir():
        return None
    return read_json(workdir / "summary.json")


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], workdir: AnyPath, hint: str = "") -> None:
    """Raises ValueError, naming what differs, where something of which both know is not the same.

    hint: what else may help, as a sentence.
    """
    for part in sorted(before.keys() & now.keys()):
        differences = _differences(before[part], now[part], "")
        if differences:
            what = "data" if part in ("source", "tokens", "documents") else part
            raise ValueError(
                f"the {part} of the run in {workdir} is another than the one it began with: {listed(differences)}. "
                f"Expected the same contents, under whatever path. To continue it, {_ADVICE[what]}; else choose "
                f"another --workdir. {hint}"
            )


def _differences(before: Any, now: Any, where: str) -> list[str]:
    """Each place at which two JSON values differ, as words."""
    if isinstance(before, dict) and isinstance(now, dict):
        different: list[str] = []
        for name in sorted(before.keys() | now.keys()):
            inner = f"{where} {name}".strip()
            if name not in now:
                different.append(f"{inner} is gone")
            elif name not in before:
                different.append(f"{inner} is new")
            else:
                different += _differences(before[name], now[name], inner)
        return different
    # As JSON has them: a tuple is a list there.
    if json.loads(json.dumps(before)) == json.loads(json.dumps(now)):
        return []
    return [f"{where} was {brief(_said(before))} and is {brief(_said(now))}".strip()]


def _said(value: Any) -> str:
    """A value as words; of a file's [bytes, hash]: how long it is, and of what."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], int) and isinstance(value[1], str):
        return f"{value[0]:,} bytes ({value[1]})"
    return repr(value)


def of_teacher(source: AnyPath, base_config: Mapping[str, Any]) -> dict[str, Any]:
    """A model directory's tensors by name, with type, shape and a hash of samples, and what its config.json says."""
    tensors = open_checkpoint(source)
    by_file: dict[AnyPath, list[str]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.file, []).append(name)
    hashes: dict[str, str] = {}
    for file, names in by_file.items():
        ranges = [(name, sample) for name in names for sample in _samples(tensors[name])]
        digests = {name: hashlib.sha256() for name in names}
        for (name, _), data in zip(ranges, read_ranges(file, [sample for _, sample in ranges]), strict=True):
            digests[name].update(data)
        hashes |= {name: digest.hexdigest()[:16] for name, digest in digests.items()}
    described = {n: f"{t.dtype.name} {list(t.shape)} {hashes[n]}" for n, t in sorted(tensors.items())}
    config = {key: value for key, value in base_config.items() if key not in _IGNORED}
    return {"tensors": described, "config": json.loads(json.dumps(config))}


def _samples(tensor: StoredTensor) -> Sequence[tuple[int, int]]:
    """The bytes of a tensor's samples, from where to where in its file; a small tensor is read whole."""
    length = tensor.stop - tensor.start
    if length <= _SAMPLES * _SAMPLE_BYTES:
        return [(tensor.start, tensor.stop)] if length else []
    last = length - _SAMPLE_BYTES
    begins = [tensor.start + last * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    return [(begin, begin + _SAMPLE_BYTES) for begin in begins]


def hub_commit(source: AnyPath) -> str | None:
    """The commit of a model that was downloaded from the hub, by where its snapshot lies."""
    return source.name if source.parent.name == "snapshots" else None


def of_tokens(file: TokenFile) -> list:
    """[bytes, hash] of a token file's tokens."""
    return identity(file.prefix.with_name(f"{file.prefix.name}.bin"))


def of_documents(file: TokenFile) -> list:
    """[bytes, hash] of where a token file's documents begin."""
    return identity(file.prefix.with_name(f"{file.prefix.name}.idx"))


def of_values(arrays: Mapping[str, jax.Array]) -> dict[str, list[float]]:
    """A few elements of every array, by its path. All processes have to ask."""
    return {path: hosts.fetched(_some(x)).astype(float).tolist() for path, x in arrays.items()}


@jax.jit
def _some(x: jax.Array) -> jax.Array:
    flat = np.linspace(0, math.prod(x.shape) - 1, _VALUES).astype(np.int64)
    return x[np.unravel_index(flat, x.shape)].astype(jnp.float32)


def require_same_values(before: Mapping[str, list[float]], now: Mapping[str, list[float]], workdir: AnyPath) -> None:
    """Raises ValueError where an array's elements differ by more than the rounding of another device."""
    moved = [path for path in sorted(before.keys() & now.keys()) if not _near(before[path], now[path])]
    if moved:
        raise ValueError(
            f"the new weights that a stage of the run in {workdir} freezes are drawn otherwise than when it began: "
            f"{listed(moved)} began with {before[moved[0]][:2]} and are {now[moved[0]][:2]}. Expected the same values; "
            f"{_ADVICE['frozen']}, or choose another --workdir."
        )


def _near(before: Sequence[float], now: Sequence[float]) -> bool:
    scale = max(map(abs, before), default=0.0)
    return len(before) == len(now) and np.allclose(now, before, rtol=_TOLERANCE, atol=_TOLERANCE * scale)
