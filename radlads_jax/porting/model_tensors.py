"""Which tensor of a checkpoint's files is which of a model's: other prefixes, tied heads, and all that does not fit."""

import json
import re
import shlex

import ml_dtypes
import numpy as np

from radlads_jax.models.config import ModelConfig
from radlads_jax.porting.families import FAMILIES
from radlads_jax.porting.names import Location, disk_tensors
from radlads_jax.porting.safetensors_read import INDEX_FILE, SINGLE_FILE, StoredTensor, merge_command, open_checkpoint
from radlads_jax.system.json_files import read_json
from radlads_jax.system.storage import AnyPath
from radlads_jax.system.untrusted import brief, listed

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_WEIGHT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
# Older libraries stored what RoPE and the causal mask are computed with; it follows from the config.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)|self_attn\.masked_bias)$")
_UNMERGED = re.compile(r"\.(lora_[A-Za-z]\w*|base_layer|modules_to_save)\.")
_COMPARED_BYTES = 1 << 26


def model_tensors(source: AnyPath, cfg: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors of a model directory by the names of `disk_tensors`, not yet read.

    As transformers reads them: names may lack `model.` or have a prefix before it; a tied model may have its embedding
    under the head's name alone. Raises ValueError listing all that is missing, unexpected or misshapen, and for a
    head of its own in a model that config.json calls tied. What the family leaves out of a larger model is passed over.
    """
    expected = disk_tensors(cfg)
    unused = FAMILIES[cfg.family].left_out
    tensors = open_checkpoint(source)
    if unused is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if not re.match(unused, name)}
    stored = _by_our_names(tensors, expected)
    if cfg.tie_embeddings and HEAD in stored and EMBEDDING not in stored:
        stored[EMBEDDING] = stored.pop(HEAD)
    _check_tensors(stored, expected, source, tied=cfg.tie_embeddings)
    if cfg.tie_embeddings and HEAD in stored and not _same_values(stored[EMBEDDING], stored[HEAD]):
        raise ValueError(
            f"{source / 'config.json'} says tie_word_embeddings true, but {HEAD} {_described(stored[HEAD])} has other "
            f"values than {EMBEDDING} {_described(stored[EMBEDDING])}; expected one matrix for both. To use the head "
            f"that is in the file, as transformers does: {_set_tied(source, False)}"
        )
    return stored


def _check_tensors(
    stored: dict[str, StoredTensor], expected: dict[str, Location], source: AnyPath, *, tied: bool
) -> None:
    """Raises one ValueError with every tensor that is missing, unexpected, misshapen or of a dtype no weight has.

    RoPE's frequency buffers are passed over, and so is a head in the checkpoint of a tied model.
    """
    ignored = {name for name in stored if _BUFFERS.search(name) or (tied and name == HEAD)}
    both = [name for name in expected if name in stored]
    missing = [name for name in expected if name not in stored]
    problems = {
        "missing": missing,
        "unexpected": sorted(stored.keys() - expected.keys() - ignored),
        "misshapen": [
            f"{name} {list(stored[name].shape)} (expected {list(expected[name].disk_shape)})"
            for name in both
            if stored[name].shape != expected[name].disk_shape
        ],
        "no float32, float16 or bfloat16": [
            f"{name} {stored[name].dtype}" for name in both if stored[name].dtype not in _WEIGHT_DTYPES
        ],
    }
    wrong = [f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names]
    if wrong:
        raise ValueError(
            f"the tensors in {source} are not those of its model, got {'; '.join(wrong)}; expected the {len(expected)} "
            f"that its config.json describes. {_cause(source, missing, wrong, problems['unexpected'])}"
        )


def _cause(source: AnyPath, missing: list[str], wrong: list[str], unexpected: list[str]) -> str:
    """What most likely is wrong, and what mends it."""
    if any(_UNMERGED.search(name) for name in unexpected):
        return f"These are weights with an adapter that is not merged. Merge it: {merge_command(source)}"
    misplaced = _misplaced(source, missing)
    if misplaced:
        return f"{INDEX_FILE} does not fit its files: {misplaced}. Download the model again, index and files together."
    if missing == [HEAD] and len(wrong) == 1:
        return (
            "A model whose head is its embedding says so by tie_word_embeddings true, which its config.json does not. "
            f"Where it is one: {_set_tied(source, True)}"
        )
    return "Check that config.json belongs to these weights."


def _misplaced(source: AnyPath, missing: list[str]) -> str:
    """Of missing tensors that the index lists, or that only the index leaves out: where they should be."""
    if not missing or (source / SINGLE_FILE).is_file() or not (source / INDEX_FILE).is_file():
        return ""
    weight_map = read_json(source / INDEX_FILE)["weight_map"]
    where = [f"{name} is not in {weight_map[name]}" for name in missing if name in weight_map]
    left_out = f"it lists {len(weight_map)} tensors, {listed(missing)} not among them"
    return listed(where) if where else left_out


def _by_our_names(stored: dict[str, StoredTensor], expected: dict[str, Location]) -> dict[str, StoredTensor]:
    """The tensors renamed to `model.` and `lm_head.` by the embedding's name; as they are where there is not one."""
    embeddings = [name for name in stored if name.endswith("embed_tokens.weight")]
    if len(embeddings) != 1 or embeddings[0] in expected:
        return dict(stored)
    decoder = embeddings[0].removesuffix("embed_tokens.weight")
    whole = decoder.removesuffix("model.")

    def renamed(name: str) -> str:
        if name.startswith(f"{whole}lm_head."):
            return name.removeprefix(whole)
        return f"model.{name.removeprefix(decoder)}" if name.startswith(decoder) else name

    by_name = {renamed(name): tensor for name, tensor in stored.items()}
    return by_name if len(by_name) == len(stored) else dict(stored)


def _same_values(first: StoredTensor, second: StoredTensor) -> bool:
    if first.shape != second.shape:
        return False
    if first.start == first.stop:
        return True
    step = max(1, _COMPARED_BYTES * first.shape[0] // (first.stop - first.start))
    for begin in range(0, first.shape[0], step):
        wanted = [(begin, min(begin + step, first.shape[0]))]
        (part,), (other,) = first.read_rows(wanted), second.read_rows(wanted)
        if part.dtype == other.dtype:
            equal = part.tobytes() == other.tobytes()
        else:
            equal = np.array_equal(part.astype(np.float32), other.astype(np.float32))
        if not equal:
            return False
    return True


def _described(tensor: StoredTensor) -> str:
    return f"({tensor.dtype} {list(tensor.shape)} in {brief(tensor.file.name)})"


def _set_tied(source: AnyPath, tied: bool) -> str:
    change = (
        "import json, sys; p = sys.argv[1]; c = json.load(open(p)); "
        f"c['tie_word_embeddings'] = {tied}; json.dump(c, open(p, 'w'), indent=2)"
    )
    return f"python -c {json.dumps(change)} {shlex.quote(str(source / 'config.json'))}"
