"""The adapter against lm-eval's own model, and the command line."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from absl import flags
from untrained import random_params, save_tokenizer

from radlads_jax import evaluate
from radlads_jax.data import synthetic
from radlads_jax.decoding.loaded import load_model
from radlads_jax.evaluation import control, model_scores, paper, table
from radlads_jax.evaluation import tasks as suite
from radlads_jax.models import MIXERS, ModelConfig, bind
from radlads_jax.porting.save import save_params

TEACHER = ModelConfig("qwen2", 300, 32, 48, 4, 2, 8, (("attention", 2),), qkv_bias=True, max_position_embeddings=128)
STUDENT = TEACHER.as_student("rad_rwkv7", MIXERS["rad_rwkv7"].choose(32))
HYBRID = TEACHER.as_student("rad_rwkv6", MIXERS["rad_rwkv6"].choose(32), (0,))

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra `eval`)"
)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The teacher's and the student's directories."""
    tokenizer_dir = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    base = {"model_type": "qwen2", "eos_token_id": 0, "bos_token_id": 0}
    return {
        name: save_params(
            random_params(cfg),
            cfg,
            tmp_path_factory.mktemp(name) / "model",
            base_config=base,
            tokenizer_from=tokenizer_dir,
        )
        for name, cfg in {"teacher": TEACHER, "student": STUDENT}.items()
    }


def command_line(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    evaluate.define_flags(values)
    values(["evaluate", *arguments])
    return values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --model DIR"),
        (["--model=x"], "expected --tasks"),
        (["--model=x", "--probes", "--probe_lengths=5,many"], "--probe_lengths has many"),
        (["--model=x", "--probes", "--probe_kinds=passkey,copi"], "--probe_kinds has copi; .*copy_tokens"),
        (["--model=x", "--probes", "--probe_kinds="], "--probe_kinds has none"),
        (["--model=x", "--tasks=piqa", "--probe_samples=8"], "--probe_samples .*--probes"),
        (["--model=x", "--probes", "--limit=5"], "--limit .*--tasks=NAME"),
        (["--model=x", "--probes", "--apply_chat_template"], "--apply_chat_template .*--tasks=NAME"),
        (["--model=x", "--tasks=recall", "--num_fewshot=5"], "--num_fewshot .*--tasks=NAME"),
        (["--model=x", "--tasks=recall", "--probe_text=x.txt"], "--probe_text .*--probes or --completions"),
        (["--model=x", "--probes", "--completion_temperature=1"], "--completion_temperature .*--completions"),
        (["--model=x", "--tasks=piqa", "--trust_task_code"], "--trust_task_code .*FILE"),
        (["--model=x", "--tasks=piqa", "--seed=1"], "--seed .*--probes"),
        (["--model=x", "--probes", "--batch_size=0"], "batch_size is 0"),
        (["--model=x", "--tasks=piqa", "--limit=0"], "--limit is 0; expected a number of documents"),
        (["--model=x", "--tasks=piqa", "--limit=-3"], "--limit is -3"),
        (["--model=x", "--tasks=piqa", "--limit=nan"], "--limit is nan"),
        (["--model=x", "--tasks=piqa", "--limit=2.5"], "--limit is 2.5"),
        (["--model=org/name", "--probes"], "org/name .*--output DIR"),
        (["--model=x", "--tasks=recall", "--control"], "--control .*--teacher DIR"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate.main(command_line(*arguments))


def test_the_control_is_the_teachers_weights_behind_a_window(directories):
    teacher = load_model(directories["teacher"], dtype="float32", beside=HYBRID)
    made = control.control_of(teacher, HYBRID)
    assert made.params is teacher.params and made.cfg.layer_mixers == ("attention", "window")
    tokens = jax.numpy.asarray(np.random.default_rng(0).integers(0, 300, (1, 100)))
    seen, whole = (np.asarray(bind(m.cfg, m.params).hidden(tokens)[0]) for m in (made, teacher))
    # 64 keys and the sinks are all there is for the first tokens, and not for the last.
    np.testing.assert_allclose(seen[:, :68], whole[:, :68], rtol=2e-4, atol=2e-5)
    assert np.abs(seen[:, 80:] - whole[:, 80:]).max() > 1e-3


@pytest.mark.parametrize(
    ("teacher", "student", "words"),
    [
        (TEACHER, TEACHER, "--control .*--model has softmax"),
        (STUDENT, STUDENT, r"--control .*--teacher .*\brad_rwkv7\b"),
        (dataclasses.replace(TEACHER, stacks=(("attention", 3),)), STUDENT, "3 layers and --model 2"),
    ],
)
def test_a_control_of_other_models_is_refused(teacher, student, words):
    with pytest.raises(ValueError, match=words):
        control.check_control(teacher, student)


def answers(generated: list[float], low: list[float]) -> dict:
    """A probe's results of two lengths, as `run_probes` gives them."""
    interval = [[x, 1.0] for x in low]
    counts = {"lengths": [512, 1024], "samples": [32, 32], "chance": [0.1, 0.1]}
    return counts | {"generated": generated, "interval": interval, "accuracy": generated}


def test_the_recall_suite_with_the_control(directories, tmp_path, monkeypatch, capsys):
    """Its place in the page, with every part that is asked for; what the models answer is made up."""
    by_mixer = {
        "attention": answers([0.9, 0.2], [0.75, 0.08]),
        "window": answers([0.2, 0.1], [0.1, 0.0]),
        "rad_rwkv7": answers([0.5, 0.2], [0.3, 0.1]),
    }
    asked = []

    def probed(model, **options):
        asked.append((model.cfg.layer_mixers[0], options["by_position"], options["samples"], options["kinds"]))
        return {"recall": by_mixer[model.cfg.layer_mixers[0]]}

    monkeypatch.setattr(model_scores, "run_probes", probed)
    models = [f"--model={directories['student']}", f"--teacher={directories['teacher']}", f"--output={tmp_path}"]
    evaluate.main(
        command_line(*models, "--tasks=recall", "--control", "--probe_lengths=1024,512", "--probe_kinds=recall")
    )
    assert asked == [(mixer, False, 32, ["recall"]) for mixer in ("attention", "window", "rad_rwkv7")]
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["control"] == {"sinks": 4, "window": 64} and list(result["probes"]) == [
        "teacher",
        "control",
        "student",
    ]
    page = capsys.readouterr().out
    assert "| control | 20.0 (10 to 100) | 10.0 (0 to 100) |" in page and "| chance | 10.0 | 10.0 |" in page
    # (0.5 - 0.1) / (0.9 - 0.1), and a teacher whose interval reaches down to chance.
    assert "| relative | 50.0 | teacher at the floor |" in page


def test_what_was_found_before_a_failure_is_kept(directories, tmp_path, monkeypatch):
    def probed(model, **options):
        if model.cfg.recurrent_mixer is not None:
            raise ValueError("out of room")
        return {"recall": answers([0.9, 0.2], [0.75, 0.08])}

    monkeypatch.setattr(model_scores, "run_probes", probed)
    models = [f"--model={directories['student']}", f"--teacher={directories['teacher']}", f"--output={tmp_path}"]
    with pytest.raises(ValueError, match="out of room"):
        evaluate.main(command_line(*models, "--tasks=recall", "--probe_lengths=1024,512"))
    found = json.loads((tmp_path / "evaluation.partial.json").read_text())
    assert (
        found["teacher"]["probes"]["recall"]["generated"] == [0.9, 0.2] and not (tmp_path / "evaluation.json").exists()
    )
    monkeypatch.setattr(model_scores, "run_probes", lambda model, **options: found["teacher"]["probes"])
    evaluate.main(command_line(*models, "--tasks=recall", "--probe_lengths=1024,512"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.md"]


def test_the_probes_have_no_documents_to_limit(directories):
    with pytest.raises(ValueError, match="--probe_samples=N"):
        evaluate.main(command_line(f"--model={directories['student']}", "--tasks=recall", "--limit=4"))


def test_no_length_to_probe_is_refused(directories):
    with pytest.raises(ValueError, match="--probe_lengths has none"):
        evaluate.main(command_line(f"--model={directories['student']}", "--tasks=recall", "--probe_lengths="))


def test_lengths_are_looked_at_before_a_model_is_loaded(directories, monkeypatch):
    monkeypatch.setattr(model_scores, "load_model", lambda *args, **options: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"\b60 tokens\b.*--probe_lengths"):
        evaluate.main(command_line(f"--model={directories['student']}", "--tasks=recall", "--probe_lengths=1024,60"))


def test_lm_eval_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[eval\]'"):
        suite.load_tasks(["piqa"])


CHOICES = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WORDS = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
metric_list: [{{metric: acc}}, {{metric: perplexity}}]
"""
WRITING = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["th"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """Tasks of every kind over one local file, by name."""
    directory = tmp_path_factory.mktemp("tasks")
    texts = [synthetic.document(5, i) for i in range(10)]
    records = [
        # Of very different lengths, one longer than the model's context.
        {"question": text[: 40 * (i + 1)], "choices": [" king", " a small dog.", " the"], "label": i % 3}
        for i, text in enumerate(texts)
    ]
    data = directory / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    kinds = {"choices": CHOICES, "words": WORDS, "writing": WRITING, "rolling": ROLLING}
    for name, template in kinds.items():
        text = template.format(name=f"local_{name}", file=data, cache=directory / "cache")
        (directory / f"{name}.yaml").write_text(text)
    return {name: directory / f"{name}.yaml" for name in kinds}


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_adapter_agrees_with_lm_evals_own_model(directories, task_files):
    pytest.importorskip("torch", reason="lm-eval's own model is torch code")
    pytest.importorskip("accelerate", reason="lm-eval's own model needs it")
    pytest.importorskip("peft", reason="lm-eval's own model needs it")
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    torch.set_num_threads(1)
    tasks = suite.load_tasks([str(path) for path in task_files.values()])
    model = load_model(directories["teacher"])
    ours = suite.run_tasks(model, tasks, batch_size=4)
    own = HFLM(
        pretrained=str(directories["teacher"]),
        tokenizer=model.tokenizer,
        dtype="float32",
        device="cpu",
        batch_size=1,
        max_length=128,
    )
    for loaded in tasks.values():
        (name, task), *_ = loaded["tasks"].items()
        options = {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": int(name == "local_choices")}
        expected = lm_eval.simple_evaluate(own, tasks=[task], **options)["results"][name]
        for metric, value in ours[name]["metrics"].items():
            assert value == pytest.approx(expected[metric], rel=1e-4), (name, metric)
        if name == "local_choices":
            assert ours[name]["stderr"] == pytest.approx(expected["acc_stderr,none"], rel=1e-4)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_command_line(directories, task_files, tmp_path, capsys):
    arguments = [f"--model={directories['student']}", f"--teacher={directories['teacher']}", "--limit=6"]
    tasks = f"--tasks={task_files['choices']},{task_files['words']}"
    evaluate.main(command_line(*arguments, tasks, f"--output={tmp_path}"))
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert (tmp_path / "evaluation.md").read_text().strip() == capsys.readouterr().out.strip()
    assert set(result["tasks"]) == {"local_choices", "local_words"}
    choices = result["tasks"]["local_choices"]
    assert choices["chance"] == pytest.approx(1 / 3) and choices["metric"] == "acc"
    assert choices["student"]["documents"] == choices["teacher"]["documents"] == 6
    assert result["tasks"]["local_words"]["chance"] == 0.0
    student, teacher = (choices[role]["score"] for role in ("student", "teacher"))
    relative = None if choices["at_floor"] else paper.relative_score(student, teacher, choices["chance"])
    assert choices["relative"] == relative and choices["num_fewshot"] == [0]
    # Of labels 0, 1, 2, 0, 1, 2; words have no letters to be stuck on.
    assert choices["always"] == pytest.approx(1 / 3) and choices["student"]["options"] is None
    assert result["tasks"]["local_words"]["always"] is None


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_group_is_one_score_over_all_its_documents(directories, task_files, tmp_path):
    text = task_files["choices"].read_text()
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(text.replace("local_choices", name))
    group = tmp_path / "group.yaml"
    group.write_text(
        "group: both\ntask: [first, second]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    model = load_model(directories["student"])
    result = suite.run_tasks(model, suite.load_tasks([str(group)]), limit=6.0)
    alone = suite.run_tasks(model, suite.load_tasks([str(task_files["choices"])]), limit=6.0)["local_choices"]
    assert list(result) == ["both"]
    assert result["both"]["score"] == pytest.approx(alone["score"]) and result["both"]["documents"] == 12
    assert result["both"]["chance"] == pytest.approx(1 / 3)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_perplexity_is_one_score_among_others(directories, task_files):
    tasks = suite.load_tasks([str(task_files["rolling"]), str(task_files["writing"])])
    scores = suite.run_tasks(load_model(directories["student"]), tasks, limit=3)
    assert scores["local_rolling"]["score"] > 1 and scores["local_rolling"]["options"] is None
    assert scores["local_writing"]["documents"] == 3 and scores["local_writing"]["options"] is None


FILTERS = """\
filter_list:
  - {name: strict, filter: [{function: regex, regex_pattern: "(nothing like it)"}, {function: take_first}]}
  - {name: all, filter: [{function: take_first}]}
"""


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_of_several_filters_the_first_one_counts(directories, task_files, tmp_path, monkeypatch):
    from radlads_jax.evaluation.adapter import RadladsLM

    file = tmp_path / "filters.yaml"
    file.write_text(task_files["writing"].read_text() + FILTERS)
    monkeypatch.setattr(RadladsLM, "generate_until", lambda self, requests, **_: [" king"] * len(requests))
    scores = suite.run_tasks(load_model(directories["student"]), suite.load_tasks([str(file)]), limit=6)
    result = scores["local_writing"]
    assert result["documents"] == 6 and result["metrics"] == {"exact_match,strict": 0.0, "exact_match,all": 1.0}
    assert (result["metric"], result["filter"], result["score"], result["stderr"]) == ("exact_match", "strict", 0, 0)
    page = table.as_markdown({"model": "S"} | suite.compare(STUDENT, scores, None))
    assert "| local_writing | exact_match, strict | 6 |" in page


@pytest.fixture
def broken(task_files, tmp_path):
    """A task whose data is missing."""
    file = tmp_path / "broken.yaml"
    file.write_text(task_files["choices"].read_text().replace("data.jsonl", "gone.jsonl"))
    return file


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_missing_data_is_named(broken):
    with pytest.raises(ValueError, match=r"broken\.yaml.*gone\.jsonl"):
        suite.load_tasks([str(broken)])


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_missing_data_and_unknown_tasks_are_named_together(broken):
    with pytest.raises(ValueError, match=r"broken\.yaml.*\bsciq\b.*no_such_task"):
        suite.load_tasks([str(broken), "sciq", "no_such_task"])
