"""A run's parts, resolved from its config: directories, models' configs, tokenizer, data."""

import dataclasses
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from radlads_jax.config import RunConfig
from radlads_jax.data import binidx, pipeline, prepare, sources, synthetic
from radlads_jax.distill import mesh as mesh_lib
from radlads_jax.distill.stages import STAGES
from radlads_jax.models import sharding
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.decoder import Params, abstract_params, init_params
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hub import check_tokenizer, load_tokenizer, resolve_model_dir
from radlads_jax.porting.load import load_params
from radlads_jax.porting.model_tensors import model_tensors
from radlads_jax.porting.student_config import make_student_config
from radlads_jax.porting.tokenizer_files import check_exportable
from radlads_jax.system import hosts
from radlads_jax.system.storage import AnyPath

EVAL_SEQ_LEN = 512


@dataclasses.dataclass(frozen=True)
class Job:
    """What every stage of one run needs.

    source: the teacher's directory, None where the run starts from fresh weights. base_config: its config.json.
    teacher: the teacher's dimensions, its stacks cut at the student's boundaries. eval_tokens: held out at the end.
    mesh: the devices the run is spread over, None for one.
    """

    run: RunConfig
    workdir: AnyPath
    source: AnyPath | None
    base_config: dict[str, Any]
    teacher: ModelConfig
    student: ModelConfig
    tokenizer_dir: AnyPath
    tokenizer: Any
    token_file: binidx.TokenFile
    eval_tokens: int
    mesh: Mesh | None = None

    def load_teacher(self, dtype: str) -> Params:
        """The teacher's parameters, from its files or, for a run from scratch, fresh ones; born where they lie."""
        placed = sharding.shardings(self.mesh, abstract_params(self.teacher))
        if self.source is None:
            cfg = dataclasses.replace(self.teacher, param_dtype=dtype)
            init = init_params if placed is None else jax.jit(init_params, static_argnums=0, out_shardings=placed)
            return init(cfg, self.run.seed)
        return load_params(self.source, self.teacher, dtype=dtype, shardings=placed)

    def batches(self, name: str, rows: int | None = None) -> grain.DatasetIterator:
        """A stage's batches, of `rows` rows (default: the recipe's); each stage has an order of its own."""
        recipe = self.run.stage(name)
        rows = rows or recipe.batch_size
        return pipeline.make_train_iterator(
            self.token_file,
            seq_len=recipe.seq_len,
            batch_size=rows,
            seed=self.run.seed * len(STAGES) + list(STAGES).index(name),
            eval_tokens=self.eval_tokens,
            cross_document=self.run.data.cross_document,
            rows_of_batch=sharding.own_rows(self.mesh, rows),
        )


def make_job(run: RunConfig, workdir: AnyPath) -> Job:
    """Checks teacher, student, tokenizer and data, in this order; raises ValueError for the first that is wrong."""
    mesh = mesh_lib.make_mesh(run)
    source = resolve_model_dir(run.teacher.path, run.teacher.revision or None) if run.teacher.path else None
    base_config = read_config(source) if source else dict(run.teacher.scratch)
    original = dataclasses.replace(model_config_from_hf(base_config), dtype=run.teacher.dtype)
    if original.recurrent_mixer is not None:
        raise ValueError(
            f"the teacher {run.teacher.path} is a {original.recurrent_mixer} student already; expected a model of "
            "softmax attention. Point config.teacher.path at the model it was made from."
        )
    if source is not None:
        # Only headers are read here: a damaged file shows now, not after the data has been tokenised.
        model_tensors(source, original)
    if run.export.retie and not original.tie_embeddings:
        raise ValueError(
            f"config.export.retie is true, but the teacher {run.teacher.path or 'from scratch'} has a head of its own "
            "(tie_word_embeddings is not true in its config.json): the export would be another model. Expected retie "
            "for tied teachers alone. Leave config.export.retie out."
        )
    student = make_student_config(original, run)
    with hosts.first_alone("data"):
        tokenizer_dir = _tokenizer_dir(run, workdir, source)
        tokenizer = load_tokenizer(tokenizer_dir)
        check_tokenizer(tokenizer, student)
        check_exportable(tokenizer_dir)
        token_file = _token_file(run, workdir, tokenizer, student)
    eval_tokens = run.data.eval_rows * (run.stage(run.stages[0]).seq_len if run.stages else EVAL_SEQ_LEN)
    _check_rows(run, token_file, eval_tokens)
    return Job(
        run,
        workdir,
        source,
        base_config,
        original.as_teacher_of(student),
        student,
        tokenizer_dir,
        tokenizer,
        token_file,
        eval_tokens,
        mesh,
    )


def _check_rows(run: RunConfig, token_file: binidx.TokenFile, eval_tokens: int) -> None:
    """Raises ValueError where a stage, even the last one, could not fill a single batch."""
    for name in run.stages:
        stage = run.stage(name)
        rows = pipeline.rows_available(token_file, stage.seq_len, eval_tokens)
        if rows < stage.batch_size:
            raise ValueError(
                f"the data makes {rows} rows of {stage.seq_len} tokens for {name} ({token_file.num_tokens:,} tokens, "
                f"{eval_tokens:,} of them held out); expected at least one batch of {stage.batch_size} rows. Bring "
                f"more text, or lower config.{name}.batch_size, config.{name}.seq_len or config.data.eval_rows."
            )


def _tokenizer_dir(run: RunConfig, workdir: AnyPath, source: AnyPath | None) -> AnyPath:
    if run.data.tokenizer:
        return resolve_model_dir(run.data.tokenizer)
    if source is not None:
        return source
    if run.data.source != "synthetic":
        raise ValueError(
            "config.data.tokenizer is empty and there is no teacher to take one from; expected a directory with "
            "tokenizer.json."
        )
    directory = workdir / "tokenizer"
    if not (directory / "tokenizer_config.json").exists():
        synthetic.save_tokenizer(synthetic.train_tokenizer(run.teacher.scratch["vocab_size"]), directory)
    return directory


def _token_file(run: RunConfig, workdir: AnyPath, tokenizer: Any, student: ModelConfig) -> binidx.TokenFile:
    data = run.data
    needed = max((run.stage(name).tokens for name in run.stages), default=0)
    limit = data.max_tokens or (needed + needed // 50 + 10**6 if data.streaming else None)
    source = sources.Source(
        data.path or "synthetic",
        kind=data.source,
        text_field=data.text_field,
        separator=data.separator,
        config=data.name or None,
        split=data.split,
        streaming=data.streaming,
        seed=data.seed,
        num_documents=data.documents if data.source == "synthetic" else None,
    )
    return prepare.prepare(
        source,
        tokenizer.backend_tokenizer,
        workdir / "data",
        vocab_size=student.vocab_size,
        eos_id=tokenizer.eos_token_id,
        max_tokens=limit,
    )
