"""Text from a teacher or a student: continues prompts, chats, or works through a file of prompts.

python -m radlads_jax.generate --model DIR [--prompt TEXT | --chat | --prompts FILE] [--temperature=0.7 --top_p=0.9 ...]
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console

from radlads_jax import command, storage
from radlads_jax.decoding.loaded import DTYPES, Model, cache_bytes, load_model, state_bytes
from radlads_jax.decoding.loop import BLOCK, Sequences, compile_for, decode, empty_sequences, left_padded, prefill
from radlads_jax.decoding.sampling import GREEDY, Sampling
from radlads_jax.decoding.text_stream import TextStream
from radlads_jax.models import ModelConfig

console = Console(stderr=True, highlight=False)


class Step(NamedTuple):
    """What one call of the decoding loop made, a list item for every row: its new text and its new tokens."""

    texts: list[str]
    tokens: list[list[int]]


class Memory:
    """What a model has read of one conversation, so that the next turn need not read it all again."""

    def __init__(self, cfg: ModelConfig, capacity: int):
        """capacity: tokens that softmax layers will have room for; without such layers a conversation has no end."""
        self.cfg, self.capacity = cfg, capacity
        self.ids: list[int] = []
        self.sequences: Sequences | None = None

    def resume(self, ids: list[int], max_tokens: int) -> tuple[Sequences, list[int]]:
        """Sequences that have read a beginning of these tokens, and the rest of them.

        Raises ValueError where they and max_tokens more do not fit.
        """
        if "attention" in self.cfg.layer_mixers and len(ids) + max_tokens > self.capacity:
            raise ValueError(
                f"the conversation has {len(ids)} tokens and up to {max_tokens} will come; expected at most "
                f"{self.capacity} in all for a model with softmax layers. Raise --context, or begin a new conversation."
            )
        known = len(self.ids)
        kept, self.sequences = self.sequences, None
        if kept is not None and ids[:known] == self.ids and known < len(ids):
            return kept, ids[known:]
        return empty_sequences(self.cfg, 1, self.capacity), ids


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    memory: Memory | None = None,
) -> Iterator[Step]:
    """Continues all prompts at once, yielding after the first new token and then after every BLOCK of them.

    A row ends at one of model.stop_ids, which is not yielded, at a stop string or after max_tokens. Every draw is a
    function of the seed, the row's number (default: its index) and how many tokens it has. memory: of the conversation
    that the only prompt continues; it is kept up to date.
    """
    rows = [list(prompt) for prompt in prompts]
    _check(rows, max_tokens, stop)
    if memory is None:
        sequences = empty_sequences(model.cfg, len(rows), max(map(len, rows)) + max_tokens)
        unread = left_padded(rows)
    else:
        (read,) = rows
        sequences, rest = memory.resume(read, max_tokens)
        unread = left_padded([rest])
    sequences, unread = prefill(model.cfg, model.params, sequences, unread)
    streams = [TextStream(model.tokenizer, stop) for _ in rows]
    row_numbers = jnp.arange(len(rows)) if numbers is None else jnp.asarray(numbers)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), row_numbers)
    done, made = np.zeros(len(rows), bool), 0
    while made < max_tokens and not done.all():
        if memory is not None:
            memory.sequences = None  # the loop gives up the arrays that it is called with
        new, sequences = decode(
            model.cfg,
            model.params,
            sequences,
            unread,
            steps=min(BLOCK, max_tokens - made) if made else 1,
            sampling=sampling,
            keys=keys,
            done=done,
            stop_ids=model.stop_ids,
        )
        unread, made = new[:, -1:], made + new.shape[1]
        if memory is not None:
            read += new[0].tolist()
            memory.ids, memory.sequences = read[:-1], sequences
        tokens = [[i for i in row if i >= 0 and i not in model.stop_ids] for row in new.tolist()]
        texts = [stream.push(ids) for stream, ids in zip(streams, tokens, strict=True)]
        ended = np.isin(new, model.stop_ids).any(axis=1) | np.asarray([stream.stopped for stream in streams])
        for row in np.flatnonzero(~done & (ended | (made >= max_tokens))):
            texts[row] += streams[row].finish()
        done |= ended
        yield Step(texts, tokens)


def _check(prompts: list[list[int]], max_tokens: int, stop: Sequence[str]) -> None:
    if not prompts or not all(prompts):
        raise ValueError("a prompt holds no token; expected at least one to continue. Leave empty prompts out.")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; expected at least 1. Change --max_tokens.")
    if not all(stop):
        raise ValueError("a stop string is empty; expected text. Leave --stop out to stop at the model's end tokens.")


class Writer:
    """A model with the command line's settings; says after each piece of work how fast it went."""

    def __init__(self, model: Model, sampling: Sampling, values: flags.FlagValues):
        self.model, self.sampling, self.context = model, sampling, values.context
        self.max_tokens, self.stop, self.seed = values.max_tokens, tuple(values.stop), values.seed

    def texts(
        self,
        prompts: list[list[int]],
        show: Callable[[str], None] | None = None,
        *,
        numbers: Sequence[int] | None = None,
        memory: Memory | None = None,
    ) -> list[str]:
        """The continuations of prompts; show: gets each piece of the first one's text as soon as it is there."""
        model, longest = self.model, max(map(len, prompts))
        capacity = longest + self.max_tokens if memory is None else memory.capacity
        # Before the clock starts, so that it shows what a second prompt will take.
        compile_for(model.cfg, model.params, len(prompts), longest, capacity, self.sampling, model.stop_ids)
        texts, later = [""] * len(prompts), 0
        steps = generate(
            model,
            prompts,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            stop=self.stop,
            seed=self.seed,
            numbers=numbers,
            memory=memory,
        )
        start = first = last = time.perf_counter()
        for step in steps:
            last = time.perf_counter()
            if first == start:
                first = last
            else:
                later += sum(map(len, step.tokens))
            texts = [text + new for text, new in zip(texts, step.texts, strict=True)]
            if show is not None:
                show(step.texts[0])
        if show is not None:
            show("\n")
        speed = f", then {later / (last - first):.1f} tokens/s" if later else ""
        context = longest + 1 + later // len(prompts)
        console.print(
            f"first token after {first - start:.2f} s{speed}; {memory_line(self.model.cfg, context)}", style="dim"
        )
        return texts

    def chat(self, system: str) -> None:
        """Answers what is typed until the input ends."""
        console.print("/new begins a new conversation, /quit or the end of the input ends it, Ctrl-C cuts an answer.")
        beginning = [{"role": "system", "content": system}] if system else []
        messages, memory = list(beginning), Memory(self.model.cfg, self.context)
        while True:
            try:
                said = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if said == "/quit":
                return
            if said in ("/new", ""):
                messages = list(beginning) if said else messages
                continue
            messages.append({"role": "user", "content": said})
            answer: list[str] = []

            def show(text: str, answer: list[str] = answer) -> None:
                answer.append(text)
                _print_now(text)

            try:
                self.texts([self.model.encode_chat(messages)], show, memory=memory)
            except KeyboardInterrupt:
                _print_now("\n")
            messages.append({"role": "assistant", "content": "".join(answer)})


def _print_now(text: str) -> None:
    print(text, end="", flush=True)


def memory_line(cfg: ModelConfig, context: int) -> str:
    """The state of one sequence beside what keys and values of the same context would take."""
    state, cache = (shown_bytes(count(cfg, context)) for count in (state_bytes, cache_bytes))
    if cfg.recurrent_mixer is None:
        return f"keys and values of {context:,} tokens: {cache}"
    constant = ", whatever the context" if "attention" not in cfg.layer_mixers else ""
    return f"state {state} a sequence{constant}; keys and values of {context:,} tokens would be {cache}"


def shown_bytes(count: int) -> str:
    """A number of bytes with its unit, three digits."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def read_prompts(path: storage.AnyPath) -> list[str | list[dict[str, str]]]:
    """The prompts of a file: lines of text, or of JSON with "prompt" (text) or "messages" (a chat) where it is .jsonl.

    Raises ValueError naming the line that is none.
    """
    lines = storage.read_text(path).splitlines()
    if path.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    prompts: list[str | list[dict[str, str]]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); expected one object a line.") from error
        prompt = record.get("prompt", record.get("messages")) if isinstance(record, dict) else None
        is_chat = isinstance(prompt, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
        )
        if not (prompt and (isinstance(prompt, str) or is_chat)):
            raise ValueError(
                f'{path}, line {number} has neither a text "prompt" nor "messages" with role and content; expected '
                "one of them. Correct the line."
            )
        prompts.append(prompt)
    return prompts


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    put: Any = {"flag_values": values}
    flags.DEFINE_string("model", None, "A model's directory, a run's, or a hub id.", **put)
    flags.DEFINE_multi_string("prompt", [], "A text to continue; may be given several times.", **put)
    flags.DEFINE_string("prompts", None, "A file of them: a line each, or .jsonl with prompt or messages.", **put)
    flags.DEFINE_boolean("chat", False, "Talk to the model; with prompts: they are a user's messages.", **put)
    flags.DEFINE_string("system", "", "What the chat begins with, in the system's role.", **put)
    flags.DEFINE_integer("max_tokens", 256, "The most tokens of one continuation.", **put)
    flags.DEFINE_integer("context", 4096, "Tokens that a chat with a softmax model has room for.", **put)
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.", **put)
    flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0: from all.", **put)
    flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens of together this probability.", **put)
    flags.DEFINE_multi_string("stop", [], "A text before which to stop; may be given several times.", **put)
    flags.DEFINE_integer("seed", 0, "The same seed draws the same text.", **put)
    flags.DEFINE_integer("batch_size", 8, "How many prompts of a file are continued at once.", **put)
    flags.DEFINE_enum("dtype", None, DTYPES, "Default: bfloat16, on a CPU float32.", **put)


def main(values: flags.FlagValues) -> None:
    """Raises ValueError for settings that are wrong or contradict each other."""
    if values.model is None:
        raise ValueError("expected --model DIR, a model's or a run's directory.")
    if not (values.prompt or values.prompts or values.chat):
        raise ValueError("expected --prompt TEXT, --prompts FILE or --chat.")
    if values.prompt and values.prompts:
        raise ValueError("got both --prompt and --prompts; expected one of them.")
    if values.batch_size < 1:
        raise ValueError(f"batch_size is {values.batch_size}; expected at least 1. Change --batch_size.")
    prompts = read_prompts(storage.as_path(values.prompts)) if values.prompts else list(values.prompt)
    sampling = Sampling(values.temperature, values.top_k, values.top_p)
    model = load_model(values.model, dtype=values.dtype, for_decoding=True)
    writer = Writer(model, sampling, values)
    if not prompts:
        writer.chat(values.system)
        return
    ids = [_encoded(model, prompt, values) for prompt in prompts]
    if not values.prompts:
        for prompt, row in zip(prompts, ids, strict=True):
            if len(prompts) > 1:
                console.print(f"> {prompt}", style="bold", markup=False)
            writer.texts([row], _print_now)
        return
    for start in range(0, len(ids), values.batch_size):
        numbers = range(start, min(start + values.batch_size, len(ids)))
        # The last batch is filled up with its last prompt, since another number of rows is another program.
        batch = [min(start + i, len(ids) - 1) for i in range(values.batch_size)]
        texts = writer.texts([ids[i] for i in batch], numbers=batch)
        for i in numbers:
            print(json.dumps({"prompt": prompts[i], "text": texts[i - start]}, ensure_ascii=False), flush=True)


def _encoded(model: Model, prompt: str | list[dict[str, str]], values: flags.FlagValues) -> list[int]:
    if isinstance(prompt, str) and not values.chat:
        return model.encode(prompt)
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    beginning = [{"role": "system", "content": values.system}] if values.system else []
    return model.encode_chat(beginning + messages)


if __name__ == "__main__":
    command.run(define_flags, main)
