"""Generation against repeated full forward passes, its sampling, its streamed text, and the command line."""

import dataclasses
import functools
import io
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from untrained import random_params, save_tokenizer

from radlads_jax import generate
from radlads_jax.decoding import generation, loop, writer
from radlads_jax.decoding.generation import Memory
from radlads_jax.decoding.loaded import Model, cache_bytes, load_model, state_bytes
from radlads_jax.decoding.loop import (
    decode,
    empty_sequences,
    generate_greedy,
    left_padded,
    prefill,
    prefill_chunks,
    unrolled,
)
from radlads_jax.decoding.sampling import Sampling, choose, likely
from radlads_jax.decoding.text_stream import TextStream
from radlads_jax.models import MIXERS, ModelConfig, bind
from radlads_jax.porting.hub import load_tokenizer
from radlads_jax.porting.save import save_params
from radlads_jax.system import hosts

TEACHER = ModelConfig("qwen2", 300, 32, 48, 4, 2, 8, (("attention", 3),), qkv_bias=True, max_position_embeddings=2048)


def student(mixer: str, attention_layers=()) -> ModelConfig:
    return TEACHER.as_student(mixer, MIXERS[mixer].choose(32), attention_layers)


CONFIGS = {
    "attention": TEACHER,
    "rad_rwkv6": student("rad_rwkv6"),
    "rad_rwkv7": student("rad_rwkv7"),
    "hybrid": student("rad_rwkv7", (1,)),
}


# A layer alone is a stack of its own already, so that decoding needs no other programs.
ONE_LAYER = dataclasses.replace(TEACHER, stacks=(("attention", 1),))
SMALLEST = {
    "attention": ONE_LAYER,
    "rad_rwkv7": ONE_LAYER.as_student("rad_rwkv7", MIXERS["rad_rwkv7"].choose(32)),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    cfg = CONFIGS[request.param]
    return cfg, random_params(cfg)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tokenizer_dir):
    """Model directories by name."""
    base = {"model_type": "qwen2", "eos_token_id": 0, "bos_token_id": 0}
    return {
        name: save_params(
            random_params(cfg),
            cfg,
            tmp_path_factory.mktemp(name) / "model",
            base_config=base,
            tokenizer_from=tokenizer_dir,
        )
        for name, cfg in SMALLEST.items()
    }


@pytest.fixture(scope="module")
def loaded(directories) -> Model:
    model = load_model(directories["rad_rwkv7"], for_decoding=True)
    assert model.cfg == SMALLEST["rad_rwkv7"]
    return model


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, length).tolist()


@functools.partial(jax.jit, static_argnums=0)
def _most_likely(cfg, params, rows):
    decoder = bind(cfg, params)
    return jnp.argmax(decoder.logits(decoder.hidden(rows)[0]), axis=-1)


def full_forward_greedy(cfg: ModelConfig, params, prompts: list[list[int]], new: int) -> list[list[int]]:
    """One pass over everything for each token; what stands behind a token changes nothing before it."""
    rows = np.zeros((len(prompts), max(map(len, prompts)) + new), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    for i in range(new):
        following = np.asarray(_most_likely(cfg, params, rows))
        for row, prompt, likeliest in zip(rows, prompts, following, strict=True):
            row[len(prompt) + i] = likeliest[len(prompt) + i - 1]
    return [row[len(prompt) : len(prompt) + new].tolist() for row, prompt in zip(rows, prompts, strict=True)]


def all_tokens(steps, row: int = 0) -> list[int]:
    return [i for step in steps for i in step.tokens[row]]


def test_greedy_equals_repeated_full_forward(model):
    cfg, params = model
    prompts = [prompt_of(n, seed=n) for n in (1, 8, 21)]
    expected = full_forward_greedy(cfg, params, prompts, 20)
    assert all(len(set(row)) > 3 for row in expected)
    assert generate_greedy(cfg, params, left_padded(prompts), 20).tolist() == expected


def test_what_is_decoded_is_asked_of_all_processes(monkeypatch):
    """Over several of them it may lie with another one."""
    asked = []
    monkeypatch.setattr(hosts, "fetched", lambda x: asked.append(x.shape) or np.asarray(x))
    generate_greedy(ONE_LAYER, random_params(ONE_LAYER), left_padded([[1, 2], [3]]), 2)
    assert asked == [(2, loop.BLOCK), ()]


def test_long_prompt_is_read_in_chunks():
    cfg, params = CONFIGS["hybrid"], random_params(CONFIGS["hybrid"])
    prompt = prompt_of(600)
    assert prefill_chunks(600) == [512, 64, 8, 8] and 600 - sum(prefill_chunks(600)) == 8
    assert prefill_chunks(1) == prefill_chunks(8) == [] and prefill_chunks(9) == [8] and prefill_chunks(513) == [512]
    expected = full_forward_greedy(cfg, params, [prompt], 3)
    assert generate_greedy(cfg, params, left_padded([prompt]), 3).tolist() == expected


def test_unrolled_layers_are_the_same_model():
    cfg = student("rad_rwkv7", (2,))
    assert unrolled(cfg).stacks == (("rad_rwkv7", 1), ("rad_rwkv7", 1), ("attention", 1))
    params = random_params(cfg)
    first, last = params["stacks"].values()
    layers = [*(jax.tree.map(lambda x, i=i: x[i : i + 1], first) for i in range(2)), last]
    prompt = left_padded([prompt_of(8)])
    np.testing.assert_array_equal(
        generate_greedy(unrolled(cfg), params | {"stacks": dict(enumerate(layers))}, prompt, 16),
        generate_greedy(cfg, params, prompt, 16),
    )


def test_programs_do_not_grow_in_number_with_lengths(loaded):
    for length in (30, 100):
        list(generation.generate(loaded, [prompt_of(length)], max_tokens=2))
    before = (loop.read_chunk._cache_size(), loop._loop._cache_size())
    for length in (31, 47, 66, 90, 137):
        list(generation.generate(loaded, [prompt_of(length)], max_tokens=5))
    assert (loop.read_chunk._cache_size(), loop._loop._cache_size()) == before


def test_end_tokens_end_rows(loaded):
    prompts = [prompt_of(5, seed=i) for i in range(2)]
    free = np.asarray([all_tokens(generation.generate(loaded, [p], max_tokens=24)) for p in prompts])
    end = int(free[0, 6])
    ending = dataclasses.replace(loaded, stop_ids=(end,))
    steps = list(generation.generate(ending, prompts, max_tokens=24))
    for row, expected in enumerate(free.tolist()):
        expected = expected[: expected.index(end)] if end in expected else expected
        assert all_tokens(steps, row) == expected
        assert "".join(step.texts[row] for step in steps) == loaded.tokenizer.decode(expected)
    alone = list(generation.generate(ending, prompts[:1], max_tokens=1000))
    assert len(all_tokens(alone)) <= 6


def test_likely_tokens_are_those_of_the_definition():
    logits = np.random.default_rng(0).normal(0, 3, (4, 50)).astype(np.float32)
    for sampling in (Sampling(0.7, 5), Sampling(1.3, 0, 0.8), Sampling(1.0, 20, 0.5), Sampling(0.5, 80, 0.05)):
        kept, ids = likely(jnp.asarray(logits), sampling)
        for row in range(4):
            scaled = logits[row].astype(np.float64) / sampling.temperature
            order = np.argsort(-scaled)[: sampling.top_k or None]
            shares = np.exp(scaled[order]) / np.exp(scaled[order]).sum()
            count = int(np.argmax(np.cumsum(shares) >= sampling.top_p - 1e-9)) + 1 if sampling.top_p < 1 else len(order)
            finite = np.isfinite(kept[row])
            assert set(np.asarray(ids[row])[finite].tolist()) == set(order[:count].tolist())


def test_likely_tokens_are_those_of_transformers():
    torch = pytest.importorskip("torch", reason="transformers' warpers are torch code, pinned for Python 3.11 alone")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(1).normal(0, 3, (6, 80)).astype(np.float32)
    warped = torch.tensor(logits)
    for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(30), TopPLogitsWarper(0.9)):
        warped = warper(None, warped)
    kept, ids = likely(jnp.asarray(logits), Sampling(0.8, 30, 0.9))
    ours = np.full(logits.shape, -np.inf, np.float32)
    np.put_along_axis(ours, np.asarray(ids), np.asarray(kept), axis=1)
    np.testing.assert_allclose(ours, warped.numpy(), rtol=1e-6)


def test_draws_follow_the_probabilities():
    logits = jnp.asarray([0.0, 1.0, 2.0, -1.0])
    keys = jax.random.split(jax.random.key(0), 20000)
    drawn = choose(jnp.broadcast_to(logits, (20000, 4)), keys, Sampling(2.0, 3))
    shares = np.exp([0.0, 0.5, 1.0, -np.inf])
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, shares / shares.sum(), atol=0.015)


def test_draws_depend_on_seed_and_row_number_alone(loaded):
    prompts = [prompt_of(n, seed=n) for n in (4, 9)]
    options = {"max_tokens": 20, "sampling": Sampling(1.0, 50), "seed": 3}
    both = list(generation.generate(loaded, prompts, **options))
    alone = list(generation.generate(loaded, prompts[1:], numbers=[1], **options))
    assert all_tokens(both, 1) == all_tokens(alone)
    other_number = list(generation.generate(loaded, prompts[1:], **options))
    other_seed = list(generation.generate(loaded, prompts, **(options | {"seed": 4})))
    assert all_tokens(other_number) != all_tokens(alone) and all_tokens(other_seed) != all_tokens(both)


def test_streamed_deltas_are_the_whole_text(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    text = "Grüße, 世界! 🎉 naïve 👩‍👩‍👧 end"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)  # characters are cut between tokens
    stream = TextStream(tokenizer)
    deltas = [stream.push([i]) for i in ids] + [stream.finish()]
    assert "".join(deltas) == text and not any("\ufffd" in delta for delta in deltas)
    random_ids = np.random.default_rng(0).integers(0, 300, 500).tolist()
    stream = TextStream(tokenizer)
    streamed = "".join(stream.push(random_ids[i : i + 7]) for i in range(0, 500, 7)) + stream.finish()
    assert streamed == tokenizer.decode(random_ids, skip_special_tokens=True)


def test_stop_strings(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)

    def streamed(text: str, *stop: str) -> tuple[list[str], bool]:
        stream = TextStream(tokenizer, stop)
        shown = [stream.push([i]) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        return [*shown, stream.finish()], stream.stopped

    deltas, stopped = streamed("one two END three", "END", "zzz")
    assert "".join(deltas) == "one two " and stopped
    deltas, stopped = streamed("one two EN", "END")
    assert "".join(deltas) == "one two EN" and not stopped
    assert "".join(streamed("aab", "ab")[0]) == "a"
    assert "".join(streamed("x stop y end", "end", "stop")[0]) == "x "


def test_generation_stops_at_a_string(loaded):
    whole = "".join(step.texts[0] for step in generation.generate(loaded, [prompt_of(5)], max_tokens=40))
    stop = whole[10:14]
    cut = "".join(step.texts[0] for step in generation.generate(loaded, [prompt_of(5)], max_tokens=40, stop=[stop]))
    assert cut == whole[: whole.index(stop)]


@pytest.mark.parametrize("name", ["attention", "rad_rwkv7"])
def test_memory_continues_a_conversation(directories, name, monkeypatch):
    model = load_model(directories[name], for_decoding=True)
    memory = Memory(model.cfg, 256)
    first = prompt_of(40)
    answer = all_tokens(generation.generate(model, [first], max_tokens=20, memory=memory))
    second = first + answer + prompt_of(30, seed=5)
    expected = all_tokens(generation.generate(model, [second], max_tokens=20))
    read = []
    real = loop.read_chunk
    monkeypatch.setattr(loop, "read_chunk", lambda c, p, s, t: read.append(t.shape[1]) or real(c, p, s, t))
    assert all_tokens(generation.generate(model, [second], max_tokens=20, memory=memory)) == expected
    assert sum(read) < 40  # only what the first turn had not read
    other = prompt_of(30, seed=9)
    expected = all_tokens(generation.generate(model, [other], max_tokens=5))
    assert all_tokens(generation.generate(model, [other], max_tokens=5, memory=memory)) == expected
    if name == "attention":
        with pytest.raises(ValueError, match=r"at most 256 .*--context"):
            next(generation.generate(model, [prompt_of(250)], max_tokens=20, memory=memory))


def test_prefill_leaves_what_decode_reads():
    cfg = SMALLEST["rad_rwkv7"]
    params = random_params(cfg)
    sequences, unread = prefill(cfg, params, empty_sequences(cfg, 2, 64), left_padded([prompt_of(30), prompt_of(21)]))
    assert unread.shape == (2, 6) and sequences.read.tolist() == [24, 15]
    new, sequences = decode(cfg, params, sequences, unread, steps=4)
    assert new.shape == (2, 4) and sequences.read.tolist() == [33, 24]


def test_state_is_constant_and_a_cache_is_not():
    for context in (10, 10_000):
        assert state_bytes(CONFIGS["rad_rwkv7"], context) == 3 * 4 * 8 * 8 * 4
        assert state_bytes(CONFIGS["rad_rwkv6"], context) == 3 * (4 * 8 * 8 + 32) * 4
        assert cache_bytes(CONFIGS["rad_rwkv7"], context) == 2 * 3 * context * 2 * 8 * 4
        assert state_bytes(TEACHER, context) == cache_bytes(TEACHER, context)
    assert "state 3.07 kB a sequence" in writer.memory_line(CONFIGS["rad_rwkv7"], 10)


def command_line(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    generate.define_flags(values)
    values(["generate", *arguments])
    return values


def test_prompt_on_the_command_line(directories, loaded, capsys):
    generate.main(command_line(f"--model={directories['rad_rwkv7']}", "--prompt=This is", "--max_tokens=10"))
    expected = all_tokens(generation.generate(loaded, [loaded.encode("This is")], max_tokens=10))
    out, err = capsys.readouterr()
    assert out == loaded.tokenizer.decode(expected) + "\n"
    assert "first token after" in err and "tokens/s" in err and "state 1.02 kB" in err


def test_prompts_of_a_file(directories, loaded, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "Hello"}]
    file.write_text("\n".join(map(json.dumps, [{"prompt": "This is a"}, {"messages": chat}, {"prompt": "What"}])))
    arguments = (f"--model={directories['rad_rwkv7']}", f"--prompts={file}", "--batch_size=2", "--max_tokens=9")
    generate.main(command_line(*arguments, "--temperature=1", "--top_k=50", "--seed=2"))
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["prompt"] for r in records] == ["This is a", chat, "What"]
    options = {"max_tokens": 9, "sampling": Sampling(1.0, 50), "seed": 2, "numbers": [2]}
    third = generation.generate(loaded, [loaded.encode("What")], **options)
    assert records[2]["text"] == "".join(step.texts[0] for step in third)


def test_chat(directories, loaded, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd then?\n/new\nHello\n/quit\n"))
    generate.main(command_line(f"--model={directories['rad_rwkv7']}", "--chat", "--max_tokens=8", "--system=Be kind."))
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    expected = "".join(
        step.texts[0] for step in generation.generate(loaded, [loaded.encode_chat(messages)], max_tokens=8)
    )
    answers = capsys.readouterr().out.split("> ")
    assert answers[1] == expected + "\n" and answers[4] == answers[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --model DIR"),
        (["--model=x"], "expected --prompt TEXT"),
        (["--model=x", "--prompt=a", "--prompts=b"], "both --prompt and --prompts"),
        (["--model=x", "--prompt=a", "--temperature=-1"], "temperature is -1.0"),
        (["--model=x", "--prompt=a", "--top_p=0"], "top_p is 0.0"),
        (["--model=x", "--prompt=a", "--top_p=0.9"], "--top_p .*--temperature"),
        (["--model=x", "--chat", "--top_k=5", "--temperature=0"], "--top_k .*--temperature"),
        (["--model=x", "--prompt=a", "--seed=0"], "--seed .*--temperature"),
        (["--model=x", "--prompt=a", "--system=b"], "--system .*--chat"),
        (["--model=x", "--prompts={texts}", "--system=b"], "--system .*messages"),
        (["--model=x", "--chat", "--prompt=a", "--context=9"], "--context .*--chat without prompts"),
        (["--model=x", "--prompt=a", "--batch_size=2"], "--batch_size .*--prompts FILE"),
        (["--model=no/such/model/at/all", "--prompt=a"], "'no/such/model/at/all'.*'organisation/name'"),
        (["--model={model}", "--prompt=a", "--max_tokens=0"], "max_tokens"),
        (["--model={model}", "--prompt=a", "--stop="], "empty.*--stop"),
        (["--model={model}", "--prompts={file}"], r'file\.jsonl, line 2 .*\bneither\b.*"prompt" and "messages"'),
        (["--model={run}", "--prompt=a"], r"/run .*\bexport/"),
    ],
)
def test_refusals(directories, tmp_path, arguments, message):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "texts.txt").write_text("a\n")
    places = {"model": directories["attention"], "run": tmp_path / "run"}
    places |= {"file": tmp_path / "file.jsonl", "texts": tmp_path / "texts.txt"}
    with pytest.raises((ValueError, flags.IllegalFlagValueError), match=message):
        generate.main(command_line(*(argument.format(**places) for argument in arguments)))


def test_chat_needs_a_template(directories):
    model = load_model(directories["rad_rwkv7"])
    model.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=rf"{re.escape(str(directories['rad_rwkv7']))} .*\bchat template\b.*--prompt"):
        model.encode_chat([{"role": "user", "content": "Hello"}])


def test_run_directories_mean_their_export(directories, tmp_path):
    (tmp_path / "export").symlink_to(directories["rad_rwkv7"])
    assert load_model(tmp_path).cfg == load_model(directories["rad_rwkv7"]).cfg


def test_mistaken_flags_are_one_paragraph():
    command = [sys.executable, "-m", "radlads_jax.generate", "--modle=x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "modle" in result.stderr
