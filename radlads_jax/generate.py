"""Text from a teacher or a student: continues prompts, chats, or works through a file of prompts.

python -m radlads_jax.generate --model DIR [--prompt TEXT | --chat | --prompts FILE] [--temperature=0.7 --top_p=0.9 ...]
"""

import json
from collections.abc import Sequence
from typing import Any

from absl import flags

from radlads_jax.data.packing import whole_batches
from radlads_jax.decoding.loaded import DTYPES, load_model
from radlads_jax.decoding.prompts import Prompt, check_system, encoded, read_prompts
from radlads_jax.decoding.sampling import Sampling
from radlads_jax.decoding.writer import Writer, console, print_now
from radlads_jax.system import command, storage

# Of a number of tokens, rows or a seed, for which a device has 32 bits.
_LARGEST = 2**30


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    put: Any = {"flag_values": values}
    positive = put | {"lower_bound": 1, "upper_bound": _LARGEST}
    natural = put | {"lower_bound": 0, "upper_bound": _LARGEST}
    flags.DEFINE_string("model", None, "A model's directory, a run's, or a hub id.", **put)
    flags.DEFINE_multi_string("prompt", [], "A text to continue; may be given several times.", **put)
    flags.DEFINE_string("prompts", None, "A file of them: a line each, or .jsonl with prompt or messages.", **put)
    flags.DEFINE_boolean("chat", False, "Talk to the model; with prompts: they are a user's messages.", **put)
    flags.DEFINE_string("system", "", "What the chat begins with, in the system's role.", **put)
    flags.DEFINE_integer("max_tokens", 256, "The most tokens of one continuation.", **positive)
    flags.DEFINE_integer("context", 4096, "Tokens that a chat with a softmax model has room for.", **positive)
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.", **put)
    flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0: from all.", **natural)
    flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens of together this probability.", **put)
    flags.DEFINE_multi_string("stop", [], "A text before which to stop; may be given several times.", **put)
    flags.DEFINE_integer("seed", 0, "The same seed draws the same text.", **(natural | {"upper_bound": 2**32 - 1}))
    flags.DEFINE_integer("batch_size", 8, "How many prompts of a file are continued at once.", **positive)
    flags.DEFINE_enum("dtype", None, DTYPES, "Default: bfloat16, on a CPU float32.", **put)


def _refuse_idle(values: flags.FlagValues, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError for a flag that is given and changes nothing beside the others."""
    drawn = (values.temperature > 0, "a --temperature above 0, at which tokens are drawn")
    has_chat = values.chat or any(isinstance(prompt.content, list) for prompt in prompts)
    needed = {
        **dict.fromkeys(("top_k", "top_p", "seed"), drawn),
        "system": (has_chat, "--chat, or prompts with messages"),
        "context": (values.chat and not prompts, "--chat without prompts; each of those has the room that it needs"),
        "batch_size": (bool(values.prompts), "--prompts FILE"),
    }
    for name, (is_there, expected) in needed.items():
        if values[name].present and not is_there:
            raise ValueError(f"--{name} changes nothing here; expected with it {expected}. Leave it out, or add that.")


def main(values: flags.FlagValues) -> None:
    """Raises ValueError for settings that are wrong or contradict each other."""
    if values.model is None:
        raise ValueError("expected --model DIR, a model's or a run's directory.")
    if not (values.prompt or values.prompts or values.chat):
        raise ValueError("expected --prompt TEXT, --prompts FILE or --chat.")
    if values.prompt and values.prompts:
        raise ValueError("got both --prompt and --prompts; expected one of them.")
    prompts = read_prompts(storage.as_path(values.prompts)) if values.prompts else list(map(Prompt, values.prompt))
    sampling = Sampling(values.temperature, values.top_k, values.top_p)
    _refuse_idle(values, prompts)
    check_system(prompts, values.system)
    model = load_model(values.model, dtype=values.dtype, for_decoding=True)
    writer = Writer(model, sampling, values)
    if not prompts:
        writer.chat(values.system)
        return
    ids = [encoded(model, prompt, chat=values.chat, system=values.system) for prompt in prompts]
    if not values.prompts:
        for prompt, row in zip(prompts, ids, strict=True):
            if len(prompts) > 1:
                console.print(f"> {prompt.content}", style="bold", markup=False)
            writer.texts([row], print_now)
        return
    for batch in whole_batches(len(ids), values.batch_size):
        numbers = batch.tolist()
        texts = writer.texts([ids[i] for i in numbers], numbers=numbers)
        # What fills up the last batch is told once.
        for i, text in dict(zip(numbers, texts, strict=True)).items():
            print(json.dumps({"prompt": prompts[i].content, "text": text}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    command.run(define_flags, main)
