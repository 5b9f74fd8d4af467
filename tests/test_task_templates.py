"""Tasks whose prompts are in each model's own chat template: --apply_chat_template."""

import json
import types

import pytest
from test_evaluate import command_line, needs_lm_eval
from test_evaluate import directories as directories  # a fixture
from test_evaluate import task_files as task_files  # another

from radlads_jax import evaluate
from radlads_jax.data import synthetic
from radlads_jax.decoding.loaded import load_model
from radlads_jax.evaluation import model_scores

# A message as the tokenizer's own template writes it.
SAID = "<|im_start|>{}\n{}<|im_end|>\n"


@pytest.mark.parametrize("lacks", ["student", "teacher"])
def test_a_tokenizer_without_a_chat_template_is_refused(lacks, directories, tmp_path, monkeypatch):
    def tokenizer_of(directory):
        return types.SimpleNamespace(chat_template=None if directory == directories[lacks] else "{{ messages }}")

    monkeypatch.setattr(model_scores, "load_tokenizer", tokenizer_of)
    models = [f"--model={directories['student']}", f"--teacher={directories['teacher']}", f"--output={tmp_path}"]
    with pytest.raises(ValueError, match=rf"{directories[lacks]} has no chat template.*--apply_chat_template out"):
        evaluate.main(command_line(*models, "--tasks=piqa", "--apply_chat_template"))


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_prompts_are_in_the_models_own_template(directories, task_files, tmp_path, monkeypatch):
    from radlads_jax.evaluation.adapter import RadladsLM

    seen = []

    def scored(self, requests, **_):
        seen.extend(texts for texts, _context, _continuation in requests)
        return [(0.0, False) for _ in requests]

    monkeypatch.setattr(RadladsLM, "_loglikelihood_tokens", scored)
    arguments = [f"--model={directories['student']}", f"--tasks={task_files['choices']}", "--limit=1"]
    evaluate.main(command_line(*arguments, "--apply_chat_template", f"--output={tmp_path}"))
    question = SAID.format("user", synthetic.document(5, 0)[:40]) + "<|im_start|>assistant"
    assert {context.strip() for context, _ in seen} == {question}
    assert {answer.strip() for _, answer in seen} == {"king", "a small dog.", "the"}
    assert json.loads((tmp_path / "evaluation.json").read_text())["chat_template"]
    assert "chat template" in (tmp_path / "evaluation.md").read_text()


@needs_lm_eval
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_template_refuses_and_what_a_task_begins(directories, monkeypatch, capsys):
    from radlads_jax.evaluation.adapter import RadladsLM

    adapter = RadladsLM(load_model(directories["student"]))
    chat = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant")]
    text = "".join(SAID.format(role, role.upper()) for role in ("system", "user"))
    assert adapter.apply_chat_template(chat[:2]) == text + "<|im_start|>assistant\n"
    assert adapter.apply_chat_template(chat, False) == text + "<|im_start|>assistant\nASSISTANT"
    refuses = "{% for m in messages %}{{ raise_exception('no') if m.role == word else m.role }}{% endfor %}"
    monkeypatch.setattr(adapter.tokenizer, "chat_template", refuses.replace("word", "'system'"))
    assert [adapter.apply_chat_template(chat[:2]) for _ in range(2)] == ["user"] * 2
    assert capsys.readouterr().err.count("no system's message") == 1
    monkeypatch.setattr(adapter.tokenizer, "chat_template", refuses.replace("word", "'user'"))
    with pytest.raises(ValueError, match=r"chat template of .* refuses"):
        adapter.apply_chat_template(chat[:2])
