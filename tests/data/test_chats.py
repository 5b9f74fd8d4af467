"""Conversations as training data: which tokens are the assistant's, in every turn, and that these alone are learnt."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from untrained import TEACHER, random_params, save_teacher, save_tokenizer

from radlads_jax.data import chats, packing, pipeline
from radlads_jax.data.binidx import TokenFileWriter, open_token_file
from radlads_jax.distill.losses import answers_kl_loss
from radlads_jax.porting.hub import load_tokenizer
from radlads_jax.reporting.metrics_file import read_metrics

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What was thought is written for the last answer alone, as Qwen3's template has it.
FORGETS = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split('!')[-1] }}")
TALK = [
    {"role": "user", "content": "What is red"},
    {"role": "assistant", "content": "hm!A door"},
    {"role": "user", "content": "And blue"},
    {"role": "assistant", "content": "hm!A bird"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    loaded = load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    loaded.chat_template = TEMPLATE
    return loaded


def said(training) -> list[str]:
    return [training.text[first:last] for first, last in training.spans]


def test_every_answer_is_found_and_nothing_else(tokenizer):
    (training,) = chats.trainings(tokenizer, TALK, "here")
    assert said(training) == ["hm!A door<end>", "hm!A bird<end>"]
    assert training.text == tokenizer.apply_chat_template(TALK, tokenize=False).rstrip()


def test_answers_that_are_written_otherwise_later_are_texts_of_their_own(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", FORGETS)
    first, second = chats.trainings(tokenizer, TALK, "here")
    assert said(first) == ["hm!A door<end>"] and said(second) == ["hm!A bird<end>"]
    assert "<assistant>A door<end>" in second.text, "as it is when the second answer is asked for"


def test_what_is_no_answer_is_not_learnt(tokenizer):
    assert chats.trainings(tokenizer, TALK[:1], "here") == []
    (training,) = chats.trainings(tokenizer, [{"role": "assistant", "content": "Hello"}, *TALK[:2]], "here")
    assert said(training) == ["hm!A door<end>"]


def test_a_template_that_asks_otherwise_than_it_answers_is_refused(tokenizer, monkeypatch):
    asks = TEMPLATE.replace("%}<assistant>{%", "%}<assistant>Now: {%")
    monkeypatch.setattr(tokenizer, "chat_template", asks)
    with pytest.raises(ValueError, match=r"line 7.*Correct the template"):
        chats.trainings(tokenizer, TALK, "line 7")


def write(path, conversations, field="messages"):
    path.write_text("".join(json.dumps({field: talk}) + "\n" for talk in conversations))
    return str(path)


def test_rows_hold_the_ids_and_count_the_answers(tokenizer, tmp_path):
    path = write(tmp_path / "talks.jsonl", [TALK] * 5)
    file = chats.prepare_chats(path, "messages", tokenizer, tmp_path / "data", vocab_size=len(tokenizer))
    (training,) = chats.trainings(tokenizer, TALK, "")
    ids = tokenizer(training.text, add_special_tokens=False)["input_ids"]
    assert np.array_equal(file.tokens // 2, ids * 5)
    row = chats.chat_rows(file, 2 * len(ids)).rows(np.array([0]))
    assert np.array_equal(row["tokens"][0], ids * 2)
    assert np.array_equal(row["segment_ids"][0], np.repeat([1, 2], len(ids)))
    targets = np.flatnonzero(row["loss_mask"][0]) + 1
    answered = "".join(tokenizer.decode([int(i)]) for i in row["tokens"][0][targets])
    assert answered == "hm!A door<end>hm!A bird<end>" * 2
    again = chats.prepare_chats(path, "messages", tokenizer, tmp_path / "data", vocab_size=len(tokenizer))
    assert again.prefix == file.prefix
    tokenizer.chat_template = TEMPLATE.replace("<end>", "<stop>")
    other = chats.prepare_chats(path, "messages", tokenizer, tmp_path / "data", vocab_size=len(tokenizer))
    tokenizer.chat_template = TEMPLATE
    assert other.prefix != file.prefix


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"talk": []}, ["line 1", "messages", "talk"]),
        ({"messages": "hello"}, ["line 1", "hello", "role"]),
        ({"messages": [{"content": "x"}]}, ["line 1", "role"]),
        ({"messages": [*TALK, {"role": "user", "content": [{"type": "text", "text": "x"}]}]}, ["line 1", "'type'"]),
        ({"messages": [TALK[0], {"role": "assistant", "content": None}]}, ["line 1", "None", "content"]),
        ({"messages": [TALK[0], {"role": "assistant", "contents": "A door"}]}, ["line 1", "'contents'", "content"]),
        ({"messages": [*TALK, None]}, ["line 1", "None", "role"]),
        ({"messages": [TALK[0], {"role": "assistant", "content": "\ud800"}]}, ["line 1", "surrogate"]),
        ({"messages": TALK[:1]}, ["assistant", "config.data.chats"]),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_line(tokenizer, tmp_path, line, named):
    (tmp_path / "talks.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError) as caught:
        chats.prepare_chats(
            str(tmp_path / "talks.jsonl"), "messages", tokenizer, tmp_path / "data", vocab_size=len(tokenizer)
        )
    assert all(part in str(caught.value) for part in named), caught.value


def test_an_answer_that_calls_a_tool_needs_no_text(tokenizer, tmp_path, monkeypatch):
    calls = TEMPLATE.replace("m['content']", "m['content'] or m['tool_calls'][0]['name']")
    monkeypatch.setattr(tokenizer, "chat_template", calls)
    talk = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}]
    path = write(tmp_path / "talks.jsonl", [talk])
    file = chats.prepare_chats(path, "messages", tokenizer, tmp_path / "data", vocab_size=len(tokenizer))
    assert tokenizer.decode((file.tokens[file.tokens % 2 == 1] // 2).tolist()) == "clock<end>"


def test_tools_are_written_as_a_model_is_asked_with_them(tokenizer, monkeypatch):
    """What the model may call stands before the conversation; what the template does not write is refused."""
    tools = [{"name": "weather"}]
    messages = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": None, "tool_calls": tools}]
    writes = "{% if tools %}<tools>{{ tools[0].name }}<end>{% endif %}"
    writes += TEMPLATE.replace("m['content']", "(m['content'] or m['tool_calls'][0]['name'])")
    monkeypatch.setattr(tokenizer, "chat_template", writes)
    (training,) = chats.trainings(tokenizer, messages, "line 1", tools)
    asked = tokenizer.apply_chat_template(messages[:1], tools=tools, tokenize=False, add_generation_prompt=True)
    assert training.text.startswith(asked) and asked.startswith("<tools>weather<end>")
    assert said(training) == ["weather<end>"]

    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    with pytest.raises(ValueError, match=r"got 1 \"tools\", of which the chat template of line 1 writes nothing"):
        chats.trainings(tokenizer, messages, "line 1", tools)
    with pytest.raises(ValueError, match="line 1 has an answer with tool_calls, of which the chat template writes"):
        chats.trainings(tokenizer, messages, "line 1")


def test_an_answer_of_which_nothing_is_written_is_not_learnt(tokenizer, monkeypatch):
    """A template without an end, whose prompt ends in a space."""
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", plain)
    talk = [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": ""}]
    assert chats.trainings(tokenizer, talk, "line 1") == []
    (training,) = chats.trainings(tokenizer, [talk[0], {"role": "assistant", "content": "Yes \n"}], "line 1")
    assert said(training) == ["Yes"]


def test_a_tokenizer_without_a_template_is_refused(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "talks.jsonl", [TALK])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"chat template.*config\.data\.tokenizer"):
        chats.prepare_chats(path, "messages", tokenizer, tmp_path / "data", vocab_size=len(tokenizer))


def test_what_the_assistant_does_not_say_has_no_gradient():
    """None at all: what stands where nothing is learnt, and reaches no answer, changes no bit of it."""
    student, teacher = random_params(TEACHER, 0.08), random_params(TEACHER, 0.1)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, TEACHER.vocab_size, (2, 2, 12))
    second[0, :7] = first[0, :7]
    mask = np.zeros((2, 12), np.float32)
    mask[0, 3:6] = 1

    @jax.jit
    def gradients(tokens, mask):
        positions = jnp.tile(jnp.arange(12), (2, 1))
        batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions, "loss_mask": mask}
        sums = functools.partial(answers_kl_loss, TEACHER, TEACHER, remat="none")
        return jax.grad(lambda params: sums(params, teacher, batch).loss)(student)

    got, other, none = (
        jax.tree.leaves(gradients(jnp.asarray(tokens, jnp.int32), jnp.asarray(weights)))
        for tokens, weights in ((first, mask), (second, mask), (first, 0 * mask))
    )
    assert any(np.any(x) for x in got) and not any(np.any(x) for x in none)
    assert all(np.array_equal(x, y) for x, y in zip(got, other, strict=True))


def token_file(prefix, count, length, first):
    with TokenFileWriter(prefix, 60_000) as writer:
        for i in range(count):
            writer.add(np.full(length, first + 2 * i))
    return open_token_file(prefix)


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_batch_is_of_both_kinds_on_any_number_of_hosts(tmp_path, hosts):
    talks = chats.chat_rows(token_file(tmp_path / "talks", 40, 8, 20_000), 8)
    text = packing.train_rows(token_file(tmp_path / "text", 40, 8, 100), 8)
    options = {"first_rows": 4, "batch_size": 6, "seed": 3}
    whole = pipeline.make_mixed_iterator(talks, text, **options)
    parts = [
        pipeline.make_mixed_iterator(talks, text, rows_of_batch=share, **options)
        for share in np.array_split(np.arange(6), hosts)
    ]
    seen = set()
    for _ in range(3):
        batch = next(whole)["tokens"]
        assert (batch[:4] >= 10_000).all() and (batch[4:] < 10_000).all()
        assert np.array_equal(np.concatenate([next(part)["tokens"] for part in parts]), batch)
        seen |= set(batch[:, 0].tolist())
    assert len(seen) == 18, "another order goes through all of both"
    state = whole.get_state()
    following = next(whole)["tokens"]
    whole.set_state(state)
    assert np.array_equal(next(whole)["tokens"], following)


def test_a_run_learns_from_conversations_and_goes_on(tmp_path, capsys):
    teacher = save_teacher(tmp_path / "teacher")
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    (teacher / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    path = write(tmp_path / "talks.jsonl", [TALK] * 40)
    settings = tiny_run.settings(teacher, steps={"stage2c": 3}) | {"data.chats": path, "data.replay": 0.25}
    settings |= {"train.sample_prompts": ()}
    summary = tiny_run.convert(tmp_path / "run", settings)
    assert [stage["name"] for stage in summary["stages"]] == ["stage2c"]
    assert len(read_metrics(tmp_path / "run")) == 3
    with pytest.raises(ValueError, match=r"config\.data\.replay is 0\.01.*config\.stage2c\.batch_size="):
        tiny_run.convert(tmp_path / "other", settings | {"data.replay": 0.01})
    write(tmp_path / "talks.jsonl", [TALK[:2]] * 80)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"chats.*config\.data\.chats"):
        tiny_run.convert(tmp_path / "run", settings)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"stages": ("stage2c",)}, "config.data.chats"),
        ({"data.chats": "talks.jsonl"}, "config.data.chats"),
        ({"data.replay": 0.5}, "config.data.replay"),
    ],
)
def test_settings_that_do_nothing_are_refused(tmp_path, settings, field):
    with pytest.raises(ValueError, match=field.replace(".", r"\.")):
        tiny_run.convert(tmp_path / "run", tiny_run.settings(tmp_path, steps={"stage2": 1}) | settings)
