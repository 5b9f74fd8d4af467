"""KL to the teacher on its own continuations: against float64 sums over whole logits, and as `evaluate` writes it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from absl import flags
from untrained import TEACHER, random_params, save_teacher, save_tokenizer, student_of

from radlads_jax import evaluate
from radlads_jax.decoding.loaded import Model
from radlads_jax.evaluation import completions, model_scores
from radlads_jax.evaluation.completions import Sizes
from radlads_jax.models import bind
from radlads_jax.porting.hub import load_tokenizer
from radlads_jax.porting.save import save_params

STUDENT = student_of(TEACHER, "rad_rwkv7", (1,))
# In whole batches of three the last one has two rows.
SIZES = Sizes(prompts=5, batch_size=3, seed=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Teacher and student; the teacher ends where it says one of 60 tokens of 300."""
    place = tmp_path_factory.mktemp("tokenizer")
    tokenizer = load_tokenizer(save_tokenizer(place))
    return [Model(place, cfg, random_params(cfg), tokenizer, tuple(range(0, 300, 5))) for cfg in (TEACHER, STUDENT)]


def _log_probabilities(model, tokens):
    decoder = bind(model.cfg, model.params)
    logits = np.asarray(jax.jit(lambda t: decoder.logits(decoder.hidden(t)[0]))(tokens), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_it_is_the_sum_over_the_teachers_own_tokens(models):
    teacher, student = models
    reference = completions.reference(teacher, SIZES)
    measured = completions.measure(student, reference)
    for name, (tokens, counted) in reference.rows.items():
        log_p, log_q = (_log_probabilities(model, tokens)[:, 63:-1] for model in models)
        following = tokens[:, 64:, None]
        sums = {
            "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1),
            "nll": -np.take_along_axis(log_q, following, -1)[..., 0],
            "teacher_nll": -np.take_along_axis(log_p, following, -1)[..., 0],
            "agreement": log_p.argmax(-1) == log_q.argmax(-1),
        }
        for key, values in sums.items():
            assert measured[name][key] == pytest.approx((values * counted).sum() / counted.sum(), rel=2e-4), (name, key)
        low, high = measured[name]["interval"]
        assert low < measured[name]["kl"] < high and measured[name]["tokens"] == counted.sum()
    assert measured["text"]["tokens"] == 5 * 64
    # What the teacher says is its likeliest token at every place until it ends; nothing behind that is counted.
    tokens, counted = reference.rows["completions"]
    likeliest = _log_probabilities(teacher, tokens)[:, 63:-1].argmax(-1)
    assert 0 < counted.sum() < 5 * 64 and np.array_equal(likeliest * counted, tokens[:, 64:] * counted)
    ends = [int(row.sum()) for row in counted if row.sum() < 64]
    assert ends and all(likeliest[i, int(row.sum())] % 5 == 0 for i, row in enumerate(counted) if row.sum() < 64)


def test_a_teacher_is_as_it_is_itself_and_draws_by_the_seed(models):
    teacher, _ = models
    drawn = [completions.reference(teacher, dataclasses.replace(SIZES, temperature=1.0, seed=s)) for s in (3, 3, 4)]
    same, other = (np.array_equal(drawn[0].rows["completions"].tokens, d.rows["completions"].tokens) for d in drawn[1:])
    assert same and not other
    for means in completions.measure(teacher, drawn[0]).values():
        assert means["kl"] == pytest.approx(0, abs=1e-6) and means["agreement"] == 1
        assert means["nll"] == pytest.approx(means["teacher_nll"], rel=1e-6)


def test_a_teacher_that_says_nothing_is_refused(models):
    with pytest.raises(ValueError, match=r"\b5 continuations\b.*--completions .*--probe_text"):
        completions.reference(dataclasses.replace(models[0], stop_ids=tuple(range(300))), SIZES)


@pytest.mark.parametrize(
    ("teacher", "words"),
    [({"max_position_embeddings": 127}, r"\b128 tokens\b.*\b127\b"), ({"vocab_size": 301}, "has 301 ")],
)
def test_what_can_not_be_compared_is_refused(teacher, words):
    with pytest.raises(ValueError, match=words):
        completions.check_sizes(SIZES, dataclasses.replace(TEACHER, **teacher), STUDENT)


def _values(*arguments):
    values = flags.FlagValues()
    evaluate.define_flags(values)
    values(["evaluate", *arguments])
    return values


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--completions=3"], "expected --teacher DIR"),
        (["--completions=3", "--teacher=y", "--completion_temperature=-1"], "--completion_temperature -1"),
    ],
)
def test_the_command_refuses(arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        evaluate.main(_values("--model=x", f"--output={tmp_path}", *arguments))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"A king.", r"text\.txt holds \d tokens; expected 384, .*--completions"),
        (b"\xe9" * 9, r"text\.txt is not UTF-8"),
    ],
)
def test_the_text_is_looked_at_before_a_model_is_loaded(data, words, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_bytes(data)
    monkeypatch.setattr(model_scores, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    teacher = save_teacher(tmp_path)
    asked = [f"--model={teacher}", f"--teacher={teacher}", "--completions=3", f"--probe_text={tmp_path / 'text.txt'}"]
    with pytest.raises(ValueError, match=words):
        evaluate.main(_values(*asked))


def test_the_command_writes_it_beside_the_control(tmp_path, capsys):
    teacher = save_teacher(tmp_path)
    base = {"model_type": "qwen2", "eos_token_id": 0, "bos_token_id": 0}
    student = save_params(
        random_params(STUDENT, 0.08), STUDENT, tmp_path / "student", base_config=base, tokenizer_from=teacher
    )
    evaluate.main(_values(f"--model={student}", f"--teacher={teacher}", "--control", "--completions=3"))
    result = json.loads((student / "evaluation.json").read_text())["kl"]
    assert list(result["models"]) == ["control", "student"] and result["sizes"]["prompts"] == 3
    page = capsys.readouterr().out
    for kind in ("text", "completions"):
        # 64 keys and 4 sinks are nearly all of a row of 128.
        assert result["models"]["control"][kind]["kl"] < result["models"]["student"][kind]["kl"]
        for role, of_kinds in result["models"].items():
            means = of_kinds[kind]
            assert f"| {kind} | {role} | {means['tokens']} | {means['nll']:.3f} | {means['kl']:.4f} (" in page
        assert f"| {kind} | teacher | {means['tokens']} | {means['teacher_nll']:.3f} | | |" in page
