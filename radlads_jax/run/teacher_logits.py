"""A teacher's stored logits in the place of the teacher: what they have to be made of, and whether they are."""

from typing import Any

from radlads_jax.config import RunConfig
from radlads_jax.data import binidx, packing, stored_logits
from radlads_jax.data.stored_logits import StoredLogits
from radlads_jax.distill.stages import STAGES
from radlads_jax.system.json_files import digest
from radlads_jax.system.storage import as_path

# What has to be the same; rows may be more than a run has.
_COMPARED = ("teacher", "dtype", "tokenizer", "tokens", "documents", "vocab_size", "seq_len", "cross_document", "top_k")


def _reading_stages(run: RunConfig) -> list[str]:
    """The run's stages whose loss can read stored logits."""
    return [name for name in run.stages if STAGES[name].stored_loss_fn is not None]


def recipe(
    run: RunConfig, depends: dict[str, Any], token_file: binidx.TokenFile, eval_tokens: int, vocab_size: int
) -> dict[str, Any]:
    """What logits of the run's teacher on the rows of its stages are made of, by contents.

    Raises ValueError where no stage reads them, or several do that have rows of other lengths.
    """
    lengths = {name: run.stage(name).seq_len for name in _reading_stages(run)}
    if len(set(lengths.values())) != 1:
        able = ", ".join(name for name, stage in STAGES.items() if stage.stored_loss_fn is not None)
        raise ValueError(
            f"a teacher's stored logits are of rows of one length, and of config.stages {run.stages} those that can "
            f"read them have {lengths or 'none'}; expected at least one of {able}, all with the same seq_len. Change "
            "config.stages, or leave config.teacher.logits out."
        )
    seq_len = next(iter(lengths.values()))
    return {
        "top_k": run.teacher.stored_top_k,
        "vocab_size": vocab_size,
        "seq_len": seq_len,
        "cross_document": run.data.cross_document,
        "rows": len(packing.train_rows(token_file, seq_len, eval_tokens=eval_tokens)),
        "teacher": digest(depends["teacher"]),
        "dtype": run.teacher.dtype,
        "tokenizer": depends["tokenizer"],
        "tokens": depends["data"]["tokens"],
        "documents": depends["data"]["documents"],
    }


def find(
    run: RunConfig, depends: dict[str, Any], token_file: binidx.TokenFile, eval_tokens: int, vocab_size: int
) -> StoredLogits:
    """The logits that the run names. Raises ValueError where they are of something else, too few, or not whole."""
    wanted = recipe(run, depends, token_file, eval_tokens, vocab_size)
    stored = stored_logits.open_logits(as_path(run.teacher.logits))
    wrong = stored_logits.differences(stored.recipe, wanted, _COMPARED)
    if stored.num_rows < wanted["rows"]:
        wrong.append(f"rows {stored.num_rows:,}, not {wanted['rows']:,}")
    if wrong:
        raise ValueError(
            f"config.teacher.logits {stored.directory} was made of other things than this run has: {'; '.join(wrong)}. "
            "Expected the same teacher, tokenizer, tokens and rows. Store them again with this config (python -m "
            "radlads_jax.store_logits), or leave config.teacher.logits out."
        )
    if missing := stored.missing():
        raise ValueError(
            f"config.teacher.logits {stored.directory} lacks {len(missing)} of its files, the first of which begins at "
            f"row {missing[0] * stored.recipe['block_rows']:,}; expected all of them. Run the command that made it "
            "again: it goes on where it stopped."
        )
    return stored


def identity(stored: StoredLogits | None) -> str | None:
    """What a continuation has to find again."""
    return None if stored is None else digest(stored.recipe)
