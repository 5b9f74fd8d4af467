"""Stage 2 by a teacher's stored logits: equal to the live teacher's, resumed, refused where they are of another."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from absl import flags
from untrained import TEACHER, random_params, save_teacher

from radlads_jax import config, store_logits
from radlads_jax.data import stored_logits
from radlads_jax.distill.losses import kl_loss, stored_kl_loss
from radlads_jax.distill.program import abstract_arguments, create_state, make_step
from radlads_jax.models import bind, sharding
from radlads_jax.planning import cost
from radlads_jax.planning import stage as planning_stage
from radlads_jax.run import preflight, storing, train
from radlads_jax.run.job import make_job
from radlads_jax.run.settings import check_same_config, remember_config
from radlads_jax.run.teacher_weights import TeacherWeights

VOCAB = TEACHER.vocab_size
STEPS = {"stage2": 3}


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_logits, "BLOCK_ROWS", 48)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def _settings(teacher, steps):
    return tiny_run.settings(teacher, "window", steps) | {"data.documents": 20, "data.eval_rows": 8}


def job_of(teacher, workdir, steps=STEPS, **more):
    values = config.defaults()
    flat = {name.replace("__", "."): value for name, value in more.items()}
    values.update_from_flattened_dict(_settings(teacher, steps) | flat)
    return make_job(config.validate(values), workdir)


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """All of the vocabulary, in float32."""
    place = tmp_path_factory.mktemp("whole")
    storing.store(job_of(teacher, place, teacher__top_k=VOCAB), place, "float32")
    return place


@pytest.fixture(scope="module")
def few(teacher, tmp_path_factory):
    """Five, in float16."""
    place = tmp_path_factory.mktemp("few")
    storing.store(job_of(teacher, place, teacher__top_k=5), place, "float16")
    return place


def of_live(job):
    """The teacher's parameters, a student's, and a batch with what is stored of it."""
    batch = {name: jnp.asarray(values) for name, values in next(job.batches("stage2")).items()}
    return job.load_teacher("float32"), random_params(job.student, 0.08), batch


def test_the_whole_vocabulary_is_the_live_teachers_loss_and_gradient(teacher, whole, tmp_path):
    job = job_of(teacher, tmp_path, teacher__logits=str(whole), teacher__top_k=VOCAB)
    weights, student, batch = of_live(job)

    def gradient(loss, batch):
        # Padding counts for neither.
        batch = batch | {"segment_ids": batch["segment_ids"].at[0, 20:].set(0)}
        return jax.jit(
            jax.value_and_grad(lambda p: loss(job.student, job.teacher, p, weights, batch, remat="none").loss)
        )(student)

    live, stored = gradient(kl_loss, batch), gradient(stored_kl_loss, batch)
    assert float(stored[0]) == pytest.approx(float(live[0]), rel=1e-6)
    pairs = list(zip(*map(jax.tree.leaves, (live[1], stored[1])), strict=True))
    difference, size = (
        sum(float(jnp.sum(x**2)) for x in of) for of in ([a - b for a, b in pairs], [a for a, _ in pairs])
    )
    assert (difference / size) ** 0.5 < 1e-6


def test_a_few_tokens_are_the_formula_in_float64(teacher, few, tmp_path):
    job = job_of(teacher, tmp_path, teacher__logits=str(few), teacher__top_k=5)
    weights, student, batch = of_live(job)
    log_p, log_q = (
        np.asarray(
            jax.nn.log_softmax(
                bind(cfg, params).logits(
                    bind(cfg, params).hidden(
                        batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"]
                    )[0]
                )
            ),
            np.float64,
        )
        for cfg, params in ((job.teacher, weights), (job.student, student))
    )
    likeliest = np.argsort(-log_p)[..., :5]
    top_p, top_q = (np.exp(np.take_along_axis(x, likeliest, -1)) for x in (log_p, log_q))
    rest_p, rest_q = 1 - top_p.sum(-1), 1 - top_q.sum(-1)
    expected = ((top_p * np.log(top_p / top_q)).sum(-1) + rest_p * np.log(rest_p / rest_q)).sum()
    sums = stored_kl_loss(job.student, job.teacher, student, None, batch, remat="none")
    # float16 keeps three digits of each logarithm.
    assert float(sums.loss) == pytest.approx(expected, rel=2e-3) and float(sums.weight) == batch["tokens"].size
    assert 0 < expected < (np.exp(log_p) * (log_p - log_q)).sum()
    np.testing.assert_allclose(np.exp(batch["teacher_log_probs"]).sum(-1), top_p.sum(-1), rtol=5e-6)


def test_a_run_s_loss_is_softened_as_its_settings_say(teacher, tmp_path):
    job = job_of(teacher, tmp_path, teacher__temperature=2.0, teacher__top_k=5)
    weights, student, batch = of_live(job)
    plan = job.stage_plan("stage2")
    assert plan.loss == "KL to the teacher at temperature 2 of its 5 likeliest tokens and the rest"
    state = create_state(plan, student)
    _, metrics = make_step(plan)(state, {}, weights, batch)
    asked = {"temperature": 2.0, "top_k": 5, "remat": "none"}
    sums = kl_loss(job.student, job.teacher, random_params(job.student, 0.08), weights, batch, **asked)
    plain = kl_loss(job.student, job.teacher, random_params(job.student, 0.08), weights, batch, remat="none")
    np.testing.assert_allclose(metrics["loss"], sums.loss / sums.weight, rtol=1e-5)
    assert abs(metrics["loss"] - plain.loss / plain.weight) > 1e-3


@pytest.mark.parametrize(
    ("steps", "more", "words"),
    [
        ({"stage1": 1}, {"teacher__temperature": 2.0}, ["config.teacher.temperature is 2", "stage2, stage2a, stage2c"]),
        ({"stage1": 1}, {"teacher__top_k": 8}, ["config.teacher.top_k is 8", "stage2, stage2a, stage2c"]),
        (STEPS, {"teacher__top_k": VOCAB + 1}, ["config.teacher.top_k is 301", "vocabulary 300"]),
        (
            STEPS,
            {"teacher__logits": "logits", "teacher__temperature": 2.0},
            ["temperature is 2", "config.teacher.logits"],
        ),
        (STEPS, {"teacher__temperature": 0.0}, ["config.teacher.temperature", "more than 0"]),
    ],
)
def test_softening_that_can_not_be_is_refused(teacher, tmp_path, steps, more, words):
    with pytest.raises(ValueError) as error:
        job_of(teacher, tmp_path, steps, **more)
    assert all(word in str(error.value) for word in words), error.value


def test_a_run_from_before_a_kl_could_be_softened_goes_on(teacher, tmp_path):
    """Its top_k, of stored logits that it had none of, is no setting of it."""
    settings = job_of(teacher, tmp_path).run.settings()
    former = json.loads(json.dumps(settings))
    former["teacher"]["top_k"] = 64
    remember_config(tmp_path, former)
    with pytest.raises(ValueError, match=r"config\.teacher\.top_k was 64 and is now 0"):
        check_same_config(tmp_path, settings)
    del former["teacher"]["temperature"]
    remember_config(tmp_path, former)
    check_same_config(tmp_path, settings)


def test_killed_it_goes_on_to_the_same_bytes(teacher, few, tmp_path, monkeypatch):
    write, written = stored_logits.StoredLogits.write, []

    def killed(self, block, *values):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(block)
        write(self, block, *values)

    monkeypatch.setattr(stored_logits.StoredLogits, "write", killed)
    job = job_of(teacher, few, teacher__top_k=5)
    with pytest.raises(KeyboardInterrupt):
        storing.store(job, tmp_path, "float16")
    (tmp_path / "rows-0000000000.bin").write_bytes(b"cut short")
    stored = stored_logits.open_logits(tmp_path)
    left = stored.missing()
    assert written == [0, 1] and left[:2] == [0, 2]
    with pytest.raises(ValueError, match=rf"lacks {len(left)} of its files.*row 0;"):
        job_of(teacher, tmp_path / "run", teacher__logits=str(tmp_path), teacher__top_k=5)
    written.clear()
    monkeypatch.setattr(
        stored_logits.StoredLogits, "write", lambda self, *values: (written.append(values[0]), write(self, *values))
    )
    storing.store(job, tmp_path, "float16")
    assert written == left
    files = sorted(file.name for file in few.glob("rows-*"))
    assert files == sorted(file.name for file in tmp_path.glob("rows-*")) and len(files) > 3
    assert all((few / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)
    with pytest.raises(ValueError, match=r"begun otherwise: log_probs 'float16', not 'float32'"):
        storing.store(job, tmp_path, "float32")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"teacher__top_k": 6}, "top_k 5, not 6"),
        ({"stage2__seq_len": 16}, "seq_len 32, not 16"),
        ({"data__cross_document": True}, "cross_document False, not True"),
        ({"teacher__dtype": "bfloat16"}, "dtype 'float32', not 'bfloat16'"),
        ({"data__documents": 21}, "documents .*tokens"),
        ({"stages": ("stage3",), "stage3__seq_len": 32}, r"\('stage3',\) .*at least one of stage2, stage2a"),
    ],
)
def test_logits_of_something_else_are_refused(teacher, few, tmp_path, more, words):
    chosen = {"teacher__logits": str(few), "teacher__top_k": 5} | more
    with pytest.raises(ValueError, match=words):
        job_of(teacher, tmp_path, **chosen)


def test_another_teachers_logits_are_refused(teacher, few, tmp_path):
    other = save_teacher(tmp_path, dataclasses.replace(TEACHER, rope_theta=5e4))
    with pytest.raises(ValueError, match=r"teacher '[0-9a-f]{16}', not '[0-9a-f]{16}'"):
        job_of(other, tmp_path / "run", teacher__logits=str(few), teacher__top_k=5)


def test_no_weights_are_held_while_stage_2_trains_and_a_run_goes_on_with_the_same_logits(teacher, few, tmp_path):
    chosen = {"teacher__logits": str(few), "teacher__top_k": 5}
    said = preflight.stored_logits(job_of(teacher, tmp_path, {"stage1": 1, "stage2": 2}, **chosen)).result
    swept = preflight.stored_logits(job_of(teacher, tmp_path, {"stage2": 2}, **chosen, stage2__sweep=True)).result
    assert "a sweep's trials too" in swept and "a sweep's trials" not in said
    assert "stage2 reads the top 5 of 300" in said and "by stage1 (its loss is the distance to attention" in said
    job = job_of(teacher, tmp_path, **chosen)
    held = job.load_teacher("float32")
    summary = train.convert(job, TeacherWeights(job, held))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(held))
    # At the end it is compared with the teacher itself, of which five tokens tell less.
    assert summary["student"]["kl"] > summary["stages"][0]["last_loss"] > 0
    assert summary["stages"][0]["loss"] == "KL to the teacher of its 5 likeliest tokens and the rest"
    # A finished one does without them.
    assert job_of(teacher, tmp_path, **(chosen | {"teacher__logits": str(tmp_path / "gone")})).logits is None
    (tmp_path / "summary.json").unlink()
    path = few / stored_logits.FILE
    text = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(text) | {"made": "again"}))
        with pytest.raises(ValueError, match=rf"\blogits of .*{re.escape(str(tmp_path))} .*config\.teacher\.logits"):
            job_of(teacher, tmp_path, **chosen)
    finally:
        path.write_text(text)


def test_a_stage_without_a_teacher_holds_none(teacher, tmp_path, monkeypatch):
    job, held, make_step = job_of(teacher, tmp_path, {"stage1": 1, "stage3": 1}), [], train.make_step
    weights = TeacherWeights(job)

    def watched(plan):
        step = make_step(plan)
        return lambda *arguments: held.append((plan.name, weights._params is not None)) or step(*arguments)

    monkeypatch.setattr(train, "make_step", watched)
    assert train.convert(job, weights)["teacher"]["loss"] > 0
    assert held == [("stage1", True), ("stage3", False)]


def test_the_plan_has_no_teacher(teacher, few, tmp_path):
    records = {}
    for name, more in {"live": {}, "stored": {"teacher__logits": str(few), "teacher__top_k": 5}}.items():
        job = job_of(teacher, tmp_path / name, **more)
        plan = dataclasses.replace(job.stage_plan("stage2"), mesh=sharding.one_device_mesh(jax.devices()[0]))
        *_, weights, batch = abstract_arguments(plan)
        assert (weights is None) == ("teacher_indices" in batch) == (name == "stored")
        records[name] = planning_stage.by_arithmetic(plan)
    assert batch["teacher_log_probs"].shape == (tiny_run.ROWS, tiny_run.TOKENS, 5)
    assert records["stored"]["teacher_bytes"] == 0 < records["live"]["teacher_bytes"]
    difference = records["live"]["model_flops"] - records["stored"]["model_flops"]
    forward = 2 * cost.matmul_weights(job.teacher) + cost.mixing_flops(job.teacher, tiny_run.TOKENS)
    assert difference == pytest.approx(tiny_run.ROWS * tiny_run.TOKENS * forward)


def test_the_command(teacher, few, tmp_path, capsys):
    values = flags.FlagValues()
    store_logits.define_flags(values)
    chosen = config.defaults()
    chosen.update_from_flattened_dict(_settings(teacher, STEPS) | {"teacher.top_k": 5})
    flags.DEFINE_string("config", None, "", flag_values=values)
    values(["store_logits", f"--output={tmp_path}"])
    values["config"].value = chosen
    assert store_logits.main(values) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"--config.teacher.logits={tmp_path}" in printed and "0 of " in printed
    assert all((tmp_path / file.name).read_bytes() == file.read_bytes() for file in few.glob("rows-*"))
    for name, value, said in (
        ("temperature", 2.0, "temperature is 2; expected 1"),
        ("top_k", VOCAB + 1, "top_k is 301"),
    ):
        before, chosen.teacher[name] = chosen.teacher[name], value
        assert store_logits.main(values) == 1 and said in " ".join(capsys.readouterr().err.split())
        chosen.teacher[name] = before
