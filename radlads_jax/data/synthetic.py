"""The project's own language: readable little tales that can only be predicted with a memory."""

import os
import random
from collections.abc import Iterator, Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from radlads_jax.data.tales import PASSAGES, Span, Tale, ask, begin, scene, tell
from radlads_jax.system.json_files import write_json
from radlads_jax.system.storage import as_path, write_text

TRAIN_SEED = 0
VOCAB_SIZE = 896
END_OF_TEXT = "<|endoftext|>"
# Three kinds of tales, of all things, of facts, of lists: the weight of each passage as the next one, of "tell" for
# each fact that is still to be told.
_MIXES = (
    {"tell": 1, "ask": 3, "retell": 2, "use": 2, "plain": 3, "repeat": 4, "count": 6},
    {"tell": 3, "ask": 4, "retell": 6, "use": 1},
    {"tell": 1, "ask": 1, "plain": 1, "repeat": 12, "count": 8},
)
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")

# The splitting rule of Qwen2's tokenizer: words with their space, single digits, punctuation, line breaks.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def spans(seed: int, index: int) -> list[Span]:
    """Document `index` of the language `seed`, cut where certainty begins and ends.

    A pure function of (seed, index); documents of different seeds are independent draws.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"got seed {seed} and index {index}; expected both to be at least 0; pass integers from 0 on.")
    rng = random.Random(f"radlads tale {seed} {index}")
    target = rng.randint(50, 180)
    mix = rng.choice(_MIXES)
    tale = begin(rng)
    for _ in range(3):
        tell(tale)
    in_paragraph = 3
    while tale.length < target:
        if in_paragraph > 4 and rng.random() < 0.5:
            scene(tale)
            in_paragraph = 0
        PASSAGES[_next_passage(tale, mix)](tale)
        in_paragraph += 1
    left = [fact for fact in tale.facts if fact.name not in tale.asked]
    for fact in rng.sample(left, len(left)):
        ask(tale, fact)
    tale.say(" The end.")
    return tale.spans


def document(seed: int, index: int) -> str:
    """Document `index` of the language `seed`: a tale of about 70 to 300 tokens in plain English words."""
    return "".join(span.text for span in spans(seed, index))


def documents(seed: int, count: int) -> Iterator[str]:
    """The first `count` documents of the language `seed`."""
    return (document(seed, index) for index in range(count))


def _next_passage(tale: Tale, mix: Mapping[str, int]) -> str:
    room = {"tell": len(tale.names) - len(tale.facts)}
    return tale.rng.choices(list(mix), [weight * room.get(name, 1) for name, weight in mix.items()])[0]


def train_tokenizer(vocab_size: int = VOCAB_SIZE, count: int = 4000) -> Tokenizer:
    """Byte-level BPE with Qwen2's splitting rule, learned from the first `count` documents of TRAIN_SEED.

    Ids 0, 1, 2 are the special tokens, the next 256 the bytes, so that any text can be encoded.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"got vocab_size {vocab_size}; expected at least {smallest} (three special tokens and the 256 bytes); "
            f"ask for more, {VOCAB_SIZE} covers the language's words."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(documents(TRAIN_SEED, count), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: str | os.PathLike) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers reads them for a Qwen2 model."""
    directory = as_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "chat_template": _CHAT_TEMPLATE,
    }
    write_json(directory / "tokenizer_config.json", config)
