"""What prompts, chat templates and stop strings may hold: text as it stands behind a prompt, and refusals in words."""

import dataclasses
import io
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from absl import flags
from tokenizers import decoders
from untrained import TEACHER, random_params, save_teacher, save_tokenizer

from radlads_jax import generate
from radlads_jax.decoding import generation
from radlads_jax.decoding.generation import Step
from radlads_jax.decoding.loaded import Model, load_model
from radlads_jax.decoding.prompts import Prompt, encoded, read_prompts
from radlads_jax.decoding.text_stream import TextStream, text_after
from radlads_jax.decoding.writer import Writer
from radlads_jax.porting.hub import load_tokenizer
from radlads_jax.run.heldout import continue_prompts

BYTES = [f"<0x{byte:02X}>" for byte in "é世".encode()]
SENTENCEPIECE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def tokenizer_of(words: list[str], decoder) -> transformers.PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    backend.decoder = decoder
    backend.add_special_tokens([word for word in words if word.startswith("<|")])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=words[0])


def streamed(tokenizer, ids, stop=(), prompt=()) -> tuple[str, bool]:
    stream = TextStream(tokenizer, stop, prompt)
    text = "".join([*(stream.push([i]) for i in ids), stream.finish()])
    return text, stream.stopped


@pytest.mark.parametrize(
    ("decoder", "words", "expected"),
    [
        pytest.param(SENTENCEPIECE, ["▁Lily", "▁and", "▁Tom"], " and Tom", id="sentencepiece"),
        pytest.param(decoders.WordPiece("##"), ["Lily", "and", "##s"], " ands", id="wordpiece"),
        pytest.param(decoders.BPEDecoder("</w>"), ["Lily</w>", "and</w>", "Tom</w>"], " and Tom", id="ends of words"),
        pytest.param(SENTENCEPIECE, ["<|turn|>", "▁Lily", "▁and"], "Lily and", id="nothing but a special token before"),
    ],
)
def test_text_stands_behind_its_prompt(decoder, words, expected):
    tokenizer = tokenizer_of(["<unk>", *words], decoder)
    prompt, new = [1], [2, 3]
    assert streamed(tokenizer, new, prompt=prompt) == (expected, False)
    assert text_after(tokenizer, prompt, new).endswith(expected)


def test_a_prompt_may_be_cut_within_a_character():
    tokenizer = tokenizer_of(["<unk>", "▁a", "▁b", *BYTES], SENTENCEPIECE)
    character = tokenizer.convert_tokens_to_ids(BYTES[2:])
    assert streamed(tokenizer, [1, 2], prompt=character[:1]) == ("a b", False)
    # More of one run of bytes than the context's tokens: it is read from its beginning.
    assert streamed(tokenizer, [*character, 1], prompt=[1, *character * 3, *character]) == ("世 a", False)
    assert streamed(tokenizer, [1], prompt=character[1:] * 6) == ("a", False)


def test_generated_text_stands_behind_its_prompt(model, monkeypatch):
    words = tokenizer_of(["<unk>", "▁Lily", "▁and"], SENTENCEPIECE)
    monkeypatch.setattr(generation, "prefill", lambda cfg, params, sequences, unread: (sequences, unread))
    monkeypatch.setattr(generation, "decode", lambda *_, **__: (np.array([[2]]), None))
    (step,) = generation.generate(dataclasses.replace(model, tokenizer=words), [[1]], max_tokens=1)
    assert step.texts == [" and"]


def test_samples_stand_behind_their_prompts(monkeypatch):
    tokenizer = tokenizer_of(["<unk>", "▁Lily", "▁and"], SENTENCEPIECE)
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, text, **_: {"input_ids": [1]})
    monkeypatch.setattr("radlads_jax.run.heldout.generate_greedy", lambda *_: np.array([[2, 2]]))
    assert continue_prompts(TEACHER, {}, tokenizer, ("Lily",), 2) == [" and and"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        pytest.param("<|end|>", "a b", id="one special token"),
        pytest.param("b<|end|>", "a ", id="text before it"),
        pytest.param("<|end|><|turn|>", "a b", id="two of them"),
        pytest.param("<|turn|> a", "a b", id="text behind it"),
        pytest.param("<|turn|>b", None, id="does not come"),
    ],
)
def test_stop_strings_may_hold_special_tokens(stop, expected):
    tokenizer = tokenizer_of(["<unk>", "▁a", "▁b", "<|end|>", "<|turn|>"], SENTENCEPIECE)
    ids = [1, 2, 3, 4, 1]
    assert streamed(tokenizer, ids, [stop]) == (expected or "a b a", expected is not None)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """An untrained teacher with the synthetic language's tokenizer."""
    tokenizer = load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    cfg = dataclasses.replace(TEACHER, stacks=(("attention", 1),))
    return Model(pathlib.Path("DIR"), cfg, random_params(cfg), tokenizer, (0,))


@pytest.fixture
def with_template(model, monkeypatch):
    def set_template(template: str) -> Model:
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
        return model

    return set_template


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[0].nothing.at_all }}", "nothing"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% for %}", "Expected"),
        ("{{ range(1000000000) | list }}", "Range"),
    ],
)
def test_what_a_template_refuses_is_told(with_template, template, reason):
    model = with_template(template)
    with pytest.raises(ValueError, match=r"chat template of DIR .*system") as caught:
        encoded(model, Prompt("Hello"), chat=True, system="Be kind.")
    assert reason in str(caught.value)


TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
MESSAGES = [{"role": "user", "content": "Hello"}]


def test_tools_reach_the_template(with_template, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"messages": MESSAGES, "tools": TOOLS}))
    (prompt,) = read_prompts(file)
    model = with_template("{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[0].content }}")
    assert encoded(model, prompt, chat=False, system="") == model.encode("clock Hello")
    model = with_template("{{ messages[0].content }}")
    with pytest.raises(ValueError, match=r"tools.*DIR"):
        encoded(model, prompt, chat=False, system="")


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": "a", "id": 7}, "id"),
        ({"messages": MESSAGES, "tool": TOOLS}, "tool"),
        ({"prompt": "a", "tools": TOOLS}, "tools"),
        ({"messages": MESSAGES, "tools": "clock"}, "tools"),
        ({"prompt": "a", "messages": MESSAGES}, "both"),
        ({"prompt": "\ud800"}, "surrogates"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "surrogates"),
        ({"messages": [{"role": "user"}]}, "neither"),
        ([1], "neither"),
    ],
)
def test_records_that_are_refused(tmp_path, record, told):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n" + json.dumps(record))
    with pytest.raises(ValueError, match=rf"prompts\.jsonl, line 2 .*{told}"):
        read_prompts(file)


@pytest.mark.parametrize("name", ["prompts.JSONL", "prompts.ndjson", "prompts.json", "prompts.txt"])
def test_lines_of_json_are_told_by_the_files_name(tmp_path, name):
    file = tmp_path / name
    file.write_text(json.dumps({"messages": MESSAGES}))
    if name.endswith("txt"):
        with pytest.raises(ValueError, match=r"prompts\.txt, line 1 is JSON .*\.jsonl or"):
            read_prompts(file)
        file.write_text('{"a": 1}')
        assert read_prompts(file) == [Prompt('{"a": 1}')]
    else:
        assert read_prompts(file) == [Prompt(MESSAGES)]


@pytest.mark.parametrize("line", ['{"prompt": "a", "prompt": "b"}', '{"messages": [{"role": "user", "role": "x"}]}'])
def test_a_key_that_is_given_twice_is_refused(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 1 .*twice"):
        read_prompts(file)


def test_calls_of_tools_need_no_text(tmp_path):
    file = tmp_path / "prompts.jsonl"
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock"}}]}]
    file.write_text(json.dumps({"messages": messages, "tools": TOOLS}))
    assert read_prompts(file) == [Prompt(messages, TOOLS)]


def test_only_a_line_end_ends_a_line(tmp_path):
    texts = ["a\u2028b", "c\u0085d", "e\x0cf", "g"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "prompts.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    (tmp_path / "prompts.txt").write_bytes(("\ufeff" + "\r\n".join(texts) + "\n\n").encode())
    for name in ("prompts.jsonl", "prompts.txt"):
        assert [prompt.content for prompt in read_prompts(tmp_path / name)] == texts


@pytest.mark.parametrize("data", [b"", b"\n \n", "a".encode("utf-16"), b"\xff"])
def test_files_without_prompts_are_refused(tmp_path, data):
    (tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"prompts\.txt .*expected"):
        read_prompts(tmp_path / "prompts.txt")


def test_text_that_no_tokenizer_takes_is_refused(model, with_template):
    for text, place in (("ab\ud800", 3), ("\udcff", 1)):
        with pytest.raises(ValueError, match=rf"character {place}\b.*surrogate"):
            model.encode(text)
        with pytest.raises(ValueError, match=rf"stop string .*character {place}\b.*surrogate"):
            next(generation.generate(model, [[1]], max_tokens=1, stop=[text]))
    with pytest.raises(ValueError, match=r"character 1\b.*surrogate"):
        with_template("{{ messages[0].content }}").encode_chat([{"role": "user", "content": "\udcff"}])


def test_tokens_that_the_model_lacks_are_refused(model):
    last = max(model.encode("This is a tale"))
    small = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, vocab_size=last))
    with pytest.raises(ValueError, match=rf"\[?{last}"):
        small.encode("This is a tale")


def command_line(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    generate.define_flags(values)
    values(["generate", *arguments])
    return values


@pytest.mark.parametrize(
    "flag",
    ["seed=18446744073709551616", "seed=-1", "max_tokens=4294967296", "context=0", "batch_size=0", "top_k=-1"],
)
def test_numbers_that_no_device_holds_are_refused(flag):
    with pytest.raises(flags.IllegalFlagValueError, match=flag.split("=")[0]):
        command_line(f"--{flag}")


def test_two_messages_of_the_system_are_refused(tmp_path):
    own = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in (MESSAGES, own)))
    words = ["--model=none/such", f"--prompts={tmp_path / 'chats.jsonl'}"]
    with pytest.raises(ValueError, match=r"prompt 2 .*Be brief.*--system"):
        generate.main(command_line(*words, "--system=Be kind."))


def test_a_chat_goes_on_after_a_refusal(with_template, monkeypatch, capsys):
    model = with_template("{% if 'bad' in messages[-1].content %}{{ raise_exception('no, not that') }}{% endif %}Hello")
    asked = []

    def answer(model, prompts, **_):
        asked.append(prompts)
        yield Step([f"answer {len(asked)}"], [[1]])

    monkeypatch.setattr("radlads_jax.decoding.writer.generate", answer)
    monkeypatch.setattr("radlads_jax.decoding.writer.compile_for", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a bad word\nHello\nbad again\nHello\n"))
    Writer(model, generation.GREEDY, command_line("--chat")).chat("")
    out, err = capsys.readouterr()
    assert len(asked) == 2 and "answer 2" in out
    assert err.count("no, not that") == 2


def test_a_batch_is_no_larger_than_its_file(model, monkeypatch, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    sizes = []
    monkeypatch.setattr(generate, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(Writer, "texts", lambda self, rows, **_: sizes.append(len(rows)) or ["x"] * len(rows))
    generate.main(command_line("--model=m", f"--prompts={tmp_path / 'prompts.txt'}", "--batch_size=1000000"))
    assert sizes == [2] and len(capsys.readouterr().out.splitlines()) == 2


def test_what_fills_a_batch_is_not_counted(model, monkeypatch, tmp_path, capsys):
    # Two tokens a row and second; of three prompts, two at once, the second batch is one of them twice.
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    clock = iter(range(100))

    def answer(model, prompts, **_):
        for _ in range(5):
            yield Step(["x"] * len(prompts), [[1, 1]] * len(prompts))

    monkeypatch.setattr(generate, "load_model", lambda *_, **__: model)
    monkeypatch.setattr("radlads_jax.decoding.writer.generate", answer)
    monkeypatch.setattr("radlads_jax.decoding.writer.compile_for", lambda *_: None)
    monkeypatch.setattr("radlads_jax.decoding.writer.time.perf_counter", lambda: float(next(clock)))
    generate.main(command_line("--model=m", f"--prompts={tmp_path / 'prompts.txt'}", "--batch_size=2"))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    speeds = [line for line in err.replace("\n", " ").split("first token") if "tokens/s" in line]
    assert ["4.0 tokens/s" in speeds[0], "2.0 tokens/s" in speeds[1]] == [True, True], err


def test_what_does_not_fit_into_memory_is_told(model, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr("radlads_jax.decoding.writer.compile_for", full)
    with pytest.raises(ValueError, match=r"300 tokens .*--max_tokens"):
        Writer(model, generation.GREEDY, command_line("--max_tokens=298")).texts([[1, 2]])


def test_weights_that_do_not_fit_are_told(tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr("radlads_jax.decoding.loaded.load_params", full)
    with pytest.raises(ValueError, match=r"weights of .*model do not fit .*JAX_PLATFORMS=cpu"):
        load_model(save_teacher(tmp_path))
