"""Answers in made-up tales: which tokens are asked for, and that "right" is what greedy generation says."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radlads_jax.config import Data, Mesh, RunConfig, Train
from radlads_jax.data import synthetic
from radlads_jax.decoding.loaded import load_model
from radlads_jax.decoding.loop import generate_greedy, left_padded
from radlads_jax.distill.mesh import make_mesh
from radlads_jax.models.decoder import abstract_params
from radlads_jax.models.placement import shardings
from radlads_jax.run import answers, heldout

DEMO_TEACHER = Path(__file__).parent.parent / "configs" / "demo_teacher"
TALES = 5


@pytest.fixture(scope="module")
def teacher():
    return load_model(DEMO_TEACHER)


@pytest.fixture(scope="module")
def dulled(teacher):
    """The teacher with noise in its weights: it knows a part of what is asked."""
    leaves, tree = jax.tree.flatten(teacher.params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noisy = [x + 0.15 * jnp.std(x) * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return dataclasses.replace(teacher, params=jax.tree.unflatten(tree, noisy))


def test_rows_are_the_tales_tokens_and_marks_what_follows_with_certainty(teacher) -> None:
    tales = answers._tales(teacher.tokenizer, 3, TALES, ())
    for index, (row, marks) in enumerate(zip(tales.rows, tales.marks, strict=True), answers._FIRST_TALE):
        whole = teacher.tokenizer(synthetic.document(3, index), add_special_tokens=False)["input_ids"]
        assert row == [teacher.tokenizer.eos_token_id, *whole]
        said = [(kind, teacher.tokenizer.decode(row[begin:end]).rstrip(".")) for kind, begin, end in marks]
        assert said == [(s.kind, s.text.rstrip(".")) for s in synthetic.spans(3, index) if s.kind in answers._TITLES]
        assert marks


def test_a_right_answer_is_what_greedy_generation_says(dulled) -> None:
    scores = answers.answer_scores({"student": (dulled.cfg, dulled.params)}, dulled.tokenizer, TALES)
    tales = answers._tales(dulled.tokenizer, 0, TALES, ())
    asked = [
        (kind, row[:begin], row[begin:end]) for row, marks in zip(*tales, strict=True) for kind, begin, end in marks
    ]
    longest = max(len(answer) for _, _, answer in asked)
    prompts = left_padded([before for _, before, _ in asked])
    said = np.asarray(generate_greedy(dulled.cfg, dulled.params, prompts, longest))
    right: dict[str, list[bool]] = {}
    for (kind, _, answer), tokens in zip(asked, said, strict=True):
        right.setdefault(kind, []).append(tokens[: len(answer)].tolist() == answer)
    assert scores["tales"] == TALES
    assert {s["what"]: (s["asked"], s["student"]) for s in scores["scores"]} == {
        title: (len(right[kind]), np.mean(right[kind])) for kind, title in answers._TITLES.items()
    }
    assert 0.1 < np.mean(right["answer"]) < 0.95


def test_a_run_that_scores_while_it_trains_says_what_is_recalled(dulled, monkeypatch) -> None:
    settings = RunConfig(train=Train(answer_tales=TALES, eval_batch_size=2), data=Data(seed=5))
    job: Any = SimpleNamespace(run=settings, student=dulled.cfg, tokenizer=dulled.tokenizer, beginning=(), mesh=None)
    monkeypatch.setattr(heldout, "evaluate_job", lambda *_: {"student": {"loss": 1.0}})
    wanted = answers.answer_scores({"it": (dulled.cfg, dulled.params)}, dulled.tokenizer, TALES, seed=5)["scores"]
    got = heldout.evaluate_in_training(job, dulled.params, None)
    assert got == {"heldout_loss": 1.0} | {f"heldout_{s['what'].replace(' ', '_')}": s["it"] for s in wanted}
    assert 0.1 < got["heldout_facts_recalled"] < 0.95
    assert heldout.in_words(got).endswith(f"loss 1.0000; {got['heldout_facts_recalled']:.1%} of tales' facts")


def test_another_model_gives_other_answers(teacher) -> None:
    silent = jax.tree.map(lambda x: x * 0, teacher.params)
    models = {"teacher": (teacher.cfg, teacher.params), "student": (teacher.cfg, silent)}
    scores = answers.answer_scores(models, teacher.tokenizer, TALES)["scores"]
    assert all(score["student"] == 0 for score in scores)
    assert all(score["teacher"] > 0 for score in scores)


def test_split_over_devices_the_answers_are_the_same(teacher) -> None:
    mesh = make_mesh(dataclasses.replace(RunConfig(), mesh=Mesh(fsdp=2, tensor=2, context=2)))
    assert mesh is not None and mesh.size == 8
    placed = jax.device_put(teacher.params, shardings(mesh, abstract_params(teacher.cfg), teacher.cfg))
    models = {"student": (teacher.cfg, teacher.params)}
    whole = answers.answer_scores(models, teacher.tokenizer, TALES, batch_size=4)
    assert answers.answer_scores({"student": (teacher.cfg, placed)}, teacher.tokenizer, TALES, mesh=mesh) == whole
