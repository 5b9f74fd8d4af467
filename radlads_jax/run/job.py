"""A run's parts, resolved from its config: directories, models' configs, tokenizer, data."""

import dataclasses
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from radlads_jax.config import RunConfig
from radlads_jax.data import binidx, packing, pipeline, prepare, synthetic
from radlads_jax.data.chats import chat_rows
from radlads_jax.data.stored_logits import StoredLogits
from radlads_jax.distill import mesh as mesh_lib
from radlads_jax.distill.program import StagePlan
from radlads_jax.distill.stage_checks import check_stages, check_trainable
from radlads_jax.distill.stages import STAGES
from radlads_jax.distill.student_config import layers_to_choose, make_student_config
from radlads_jax.fields import require
from radlads_jax.models import sharding
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.decoder import abstract_params
from radlads_jax.models.fresh import check_look_back, fresh_params
from radlads_jax.models.mixers import mixer_spec
from radlads_jax.models.placement import shardings
from radlads_jax.models.tree import Params
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.families import FAMILIES
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hub import check_tokenizer, files_without_weights, load_tokenizer, resolve_model_dir
from radlads_jax.porting.load import load_params
from radlads_jax.porting.model_tensors import model_tensors
from radlads_jax.porting.tokenizer_files import check_exportable
from radlads_jax.porting.writers import writer_for
from radlads_jax.run import choice_file, earlier_mixers, fingerprint, teacher_logits
from radlads_jax.run.earlier_mixers import EarlierMixers
from radlads_jax.run.settings import names_others
from radlads_jax.run.tokens import Tokens, find_chats, find_tokens
from radlads_jax.system import hosts
from radlads_jax.system.storage import AnyPath, as_path


@dataclasses.dataclass(frozen=True)
class Job:
    """What every stage of one run needs.

    source: the teacher's directory, None where the run starts from fresh weights. base_config: its config.json.
    teacher: the teacher's dimensions, its stacks cut at the student's boundaries.
    to_choose: how many softmax layers are still to be chosen; the student then has as many, evenly spaced, and the
    teacher is in one piece (run/softmax_layers.py).
    mesh: the devices the run is spread over, None for one. beginning: ids that documents begin with. depends: what a
    continuation has to find again, by contents. chats: the conversations that stage2c reads. logits: the teacher's
    stored ones, which stages read that can. earlier: the mixers that the converted layers begin with, not of a run that
    is finished.
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
    mesh: Mesh | None = None
    beginning: tuple[int, ...] = ()
    depends: dict[str, Any] = dataclasses.field(default_factory=dict)
    to_choose: int = 0
    chats: binidx.TokenFile | None = None
    logits: StoredLogits | None = None
    earlier: EarlierMixers | None = None

    def stage_plan(self, name: str) -> StagePlan:
        return StagePlan(self.run, name, self.student, self.teacher, self.mesh)

    def with_layers(self, layers: tuple[int, ...]) -> "Job":
        """The job whose student keeps these softmax layers, in place of those that were to be chosen."""
        student = make_student_config(self.teacher, choice_file.with_layers(self.run, layers))
        check_trainable(self.run, student)
        return dataclasses.replace(self, student=student, teacher=self.teacher.as_teacher_of(student), to_choose=0)

    def load_teacher(self, dtype: str) -> Params:
        """The teacher's parameters, from its files or, for a run from scratch, fresh ones; born where they lie."""
        placed = shardings(self.mesh, abstract_params(self.teacher), self.teacher)
        if self.source is None:
            cfg = dataclasses.replace(self.teacher, param_dtype=dtype)
            init = fresh_params
            if placed is not None:
                init = jax.jit(fresh_params, static_argnums=(0, 1, 2), out_shardings=placed)
            return init(cfg, self.run.seed, self.run.teacher.look_back)
        return load_params(self.source, self.teacher, dtype=dtype, shardings=placed)

    def batches(self, name: str, rows: int | None = None) -> grain.DatasetIterator:
        """A stage's batches, of `rows` rows (default: the recipe's); each stage has an order of its own."""
        recipe = self.run.stage(name)
        rows = rows or recipe.batch_size
        if STAGES[name].reads_chats:
            assert self.chats is not None
            text = packing.train_rows(
                self.token_file,
                recipe.seq_len,
                eval_tokens=self.run.eval_tokens,
                cross_document=self.run.data.cross_document,
            )
            return pipeline.make_mixed_iterator(
                chat_rows(self.chats, recipe.seq_len),
                text,
                first_rows=rows - round(self.run.data.replay * rows),
                batch_size=rows,
                seed=STAGES[name].order_seed(self.run.seed),
                rows_of_batch=sharding.own_rows(self.mesh, rows),
            )
        return pipeline.make_train_iterator(
            self.token_file,
            seq_len=recipe.seq_len,
            batch_size=rows,
            seed=STAGES[name].order_seed(self.run.seed),
            eval_tokens=self.run.eval_tokens,
            cross_document=self.run.data.cross_document,
            rows_of_batch=sharding.own_rows(self.mesh, rows),
            beside=self.logits.rows if self.logits is not None and self.stage_plan(name).reads_logits else None,
        )


def _check_teacher(run: RunConfig, source: AnyPath | None, teacher: ModelConfig) -> None:
    """Raises ValueError for a teacher that can not be converted, or not as the config says. source: as of Job."""
    if teacher.recurrent_mixer not in (None, FAMILIES[teacher.family].recurrent):
        raise ValueError(
            f"the teacher {run.teacher.path} is a {teacher.recurrent_mixer} student already; expected a model of "
            "softmax attention, or of a family with recurrent layers of its own. Point config.teacher.path at the "
            "model it was made from."
        )
    if FAMILIES[teacher.family].recurrent and teacher.o_bias:
        raise ValueError(
            f"the teacher {run.teacher.path} has biases of o, as an export with biases of q has, all of them 0: its "
            "student would train them, and vLLM and llama.cpp leave them out. Expected none; python -m "
            "radlads_jax.export --model TEACHER --output DIR --for=llama.cpp writes it without."
        )
    check_look_back(teacher, run.teacher.look_back)
    if source is not None:
        # Only headers are read here: a damaged file shows now, not after the data has been tokenised.
        model_tensors(source, teacher)
    if run.export.retie and not teacher.tie_embeddings:
        raise ValueError(
            f"config.export.retie is true, but the teacher {run.teacher.path or 'from scratch'} has a head of its own "
            "(tie_word_embeddings is not true in its config.json): the export would be another model. Expected retie "
            "for tied teachers alone. Leave config.export.retie out."
        )
    if source is None and layers_to_choose(run.student):
        raise ValueError(
            f"config.student.attention_layers is {run.student.attention_layers[0]!r} for a run from fresh weights, "
            "whose teacher can tell nothing of its layers; expected config.teacher.path. Name the layers instead."
        )


def make_job(run: RunConfig, workdir: AnyPath) -> Job:
    """Checks teacher, student, tokenizer and data, in this order; raises ValueError for the first that is wrong."""
    mixer_spec(run.student.mixer)  # a typo is told before anything is read
    mesh, workdir = mesh_lib.make_mesh(run), as_path(workdir)
    source = resolve_model_dir(run.teacher.path, run.teacher.revision or None) if run.teacher.path else None
    base_config = read_config(source) if source else dict(run.teacher.scratch)
    original = dataclasses.replace(model_config_from_hf(base_config), dtype=run.teacher.dtype)
    _check_teacher(run, source, original)
    student = make_student_config(original, run)
    check_stages(run, student, original)
    with hosts.first_alone("data"):
        tokenizer_dir = _tokenizer_dir(run, workdir, source)
        tokenizer = load_tokenizer(tokenizer_dir)
        check_tokenizer(tokenizer, student)
        form = writer_for(student, run.export.engine)
        # What has no place in it is told with all else that preflight finds.
        if not form.obstacles(student, None):
            check_exportable(tokenizer_dir, form.config(student, base_config))
        tokens = find_tokens(run, workdir, tokenizer, student.vocab_size)
        chat_file = find_chats(run, workdir, tokenizer, student.vocab_size)
    _check_rows(run, tokens.file, chat_file)
    depends = _depends(source, base_config, tokenizer, tokens)
    if chat_file is not None:
        depends["chats"] = {"token_file": chat_file.prefix.name, "tokens": fingerprint.of_tokens(chat_file)}
    if student.copied or student.aligned_layers != student.converted_layers:
        # Which layers an alignment error is of does not follow from the settings alone.
        depends["converted"] = list(student.aligned_layers)
    logits = earlier = None
    # One that is finished reads them no more, and they may be gone.
    if not (is_finished := fingerprint.finished(workdir, run.stages) is not None):
        if run.teacher.logits:
            logits = teacher_logits.find(run, depends, tokens.file, run.eval_tokens, original.vocab_size)
        depends["logits"] = teacher_logits.identity(logits)
        if run.student.init_from:
            earlier = earlier_mixers.find(run, workdir, original, depends)
            depends["init_from"] = earlier.said["contents"]
    if not is_finished or names_others(workdir, run):
        _require_same(workdir, depends)
    job = Job(
        run,
        workdir,
        source,
        base_config,
        original.as_teacher_of(student),
        student,
        tokenizer_dir,
        tokenizer,
        tokens.file,
        mesh,
        tokens.beginning,
        depends,
        chats=chat_file,
        logits=logits,
        earlier=earlier,
    )
    if not (count := layers_to_choose(run.student)):
        return job
    layers = choice_file.read(workdir, run, count, original.num_layers, depends)
    return job.with_layers(layers) if layers else dataclasses.replace(job, teacher=original, to_choose=count)


def _depends(source: AnyPath | None, base_config: dict[str, Any], tokenizer: Any, tokens: Tokens) -> dict[str, Any]:
    """What the run depends on, by its contents."""
    data = {"token_file": tokens.file.prefix.name, "tokens": fingerprint.of_tokens(tokens.file)}
    data["documents"] = fingerprint.of_documents(tokens.file)
    return {
        "teacher": fingerprint.of_teacher(source, base_config) if source else None,
        "commit": fingerprint.hub_commit(source) if source else None,
        "tokenizer": prepare.tokenizer_hash(tokenizer.backend_tokenizer),
        "data": {**tokens.recipe, "beginning": list(tokens.beginning), **data},
    }


def _require_same(workdir: AnyPath, depends: dict[str, Any]) -> None:
    """Raises ValueError where the run in the work directory began with others."""
    begun = fingerprint.read(workdir)
    commit = begun.get("commit")
    moved = commit is not None and commit != depends["commit"]
    hint = f"Its teacher was the commit {commit}: --config.teacher.revision={commit}." if moved else ""
    fingerprint.require_same(_comparable(begun), _comparable(depends), workdir, hint)


def _comparable(depends: dict[str, Any]) -> dict[str, Any]:
    """What a continuation has to have the same of; of the data, of which more is known, the tokens and documents."""
    parts = {part: depends[part] for part in ("teacher", "tokenizer", "logits") if part in depends}
    data = depends.get("data", {})
    chats = {"chats": depends["chats"]["tokens"]} if "chats" in depends else {}
    return parts | {part: data[part] for part in ("tokens", "documents") if part in data} | chats


def _check_rows(run: RunConfig, token_file: binidx.TokenFile, chat_file: binidx.TokenFile | None) -> None:
    """Raises ValueError where a stage, even the last one, could not fill a single batch."""
    for name, recipe in run.recipes.items():
        kinds = {"data": (token_file, recipe.batch_size)}
        if STAGES[name].reads_chats:
            assert chat_file is not None
            replayed = round(run.data.replay * recipe.batch_size)
            whole = f"a share that leaves whole rows of both in config.{name}.batch_size={recipe.batch_size}, or 0"
            is_whole = not run.data.replay or 0 < replayed < recipe.batch_size
            require(is_whole, "config.data.replay", run.data.replay, whole)
            kinds = {"data": (token_file, replayed), "conversations": (chat_file, recipe.batch_size - replayed)}
        for what, (file, wanted) in kinds.items():
            held_out = 0 if file is chat_file else run.eval_tokens
            rows = pipeline.rows_available(file, recipe.seq_len, held_out)
            if rows < wanted:
                raise ValueError(
                    f"the {what} make {rows} rows of {recipe.seq_len} tokens for {name} ({file.num_tokens:,} tokens, "
                    f"{held_out:,} of them held out); expected at least one batch of {wanted} rows. Bring more, or "
                    f"lower config.{name}.batch_size, config.{name}.seq_len or config.data.eval_rows."
                )


def _tokenizer_dir(run: RunConfig, workdir: AnyPath, source: AnyPath | None) -> AnyPath:
    if run.data.tokenizer:
        return files_without_weights(run.data.tokenizer)
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
