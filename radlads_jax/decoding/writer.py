"""A model that writes to the terminal: prompts continued, chats answered, and how fast it went."""

import time
from collections.abc import Callable, Sequence

from absl import flags
from rich.console import Console

from radlads_jax.decoding.generation import Memory, generate
from radlads_jax.decoding.loaded import Model, cache_bytes, state_bytes
from radlads_jax.decoding.loop import compile_for
from radlads_jax.decoding.sampling import Sampling
from radlads_jax.models import ModelConfig
from radlads_jax.models.state import grows
from radlads_jax.system import backend, command
from radlads_jax.system.space import shown_bytes

console = Console(stderr=True, highlight=False)


class Writer:
    """A model with the command line's settings; says after each call how fast it went."""

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
        """The continuations of prompts, whose numbers differ but for those that are there twice.

        show: gets each delta of the first one's text as soon as it is there.
        """
        model, longest = self.model, max(map(len, prompts))
        capacity = longest + self.max_tokens if memory is None else memory.capacity
        # Before the clock starts, so that it shows what a second prompt will take.
        what = f"{len(prompts)} sequences with room for {capacity:,} tokens do"
        with backend.room_for(what, "Lower --max_tokens, --batch_size or, in a chat, --context."):
            compile_for(model.cfg, model.params, len(prompts), longest, capacity, self.sampling, model.stop_ids)
        texts, later = [""] * len(prompts), 0
        # A number that comes again only fills the batch.
        rows = range(len(prompts)) if numbers is None else [numbers.index(number) for number in set(numbers)]
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
                later += sum(len(step.tokens[row]) for row in rows)
            texts = [text + new for text, new in zip(texts, step.texts, strict=True)]
            if show is not None:
                show(step.texts[0])
        if show is not None:
            show("\n")
        speed = f", then {later / (last - first):.1f} tokens/s" if later else ""
        context = longest + 1 + later // len(rows)
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
            except UnicodeDecodeError as error:
                command.refuse(f"what was typed is not text ({error}); expected UTF-8. Type it again.")
                continue
            if said == "/quit":
                return
            if said in ("/new", ""):
                messages = list(beginning) if said else messages
                continue
            messages.append({"role": "user", "content": said})
            answer: list[str] = []

            def show(text: str, answer: list[str] = answer) -> None:
                answer.append(text)
                print_now(text)

            try:
                self.texts([self.model.encode_chat(messages)], show, memory=memory)
            except KeyboardInterrupt:
                print_now("\n")
            except ValueError as error:
                # What the template refuses, or has no room: the conversation goes on as if it had not been said.
                command.refuse(error)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": "".join(answer)})


def print_now(text: str) -> None:
    print(text, end="", flush=True)


def memory_line(cfg: ModelConfig, context: int) -> str:
    """The state of one sequence beside what keys and values of the same context would take."""
    state, cache = (shown_bytes(count(cfg, context)) for count in (state_bytes, cache_bytes))
    if cfg.recurrent_mixer is None:
        return f"keys and values of {context:,} tokens: {cache}"
    constant = ", whatever the context" if not grows(cfg) else ""
    return f"state {state} a sequence{constant}; keys and values of {context:,} tokens would be {cache}"
