"""Text from tokens as they come: whole characters, and nothing of a stop string."""

from collections.abc import Iterable, Sequence
from typing import Any

# What a decoder puts where bytes are no character, or not yet.
_UNFINISHED = "\ufffd"
# So many of a prompt's last tokens are decoded before what follows it.
_CONTEXT_TOKENS = 8
# Special tokens within stop strings are these while text is searched: private characters, which no vocabulary writes.
_FIRST_MARK = 0x100000


def _context_of(tokenizer: Any, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, which decide how the next one is written: with or without a space before it.

    Empty where the prompt ends, or all of it begins, within a character: what follows can not be told from that.
    """
    count = _CONTEXT_TOKENS
    while True:
        context = list(prompt[-count:])
        text = _decoded(tokenizer, context)
        if text.endswith(_UNFINISHED):
            return []
        if not text.startswith(_UNFINISHED):
            return context
        if count >= len(prompt):
            return []
        count *= 2


def text_after(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of tokens that follow a prompt, special ones included, as it stands behind the prompt's."""
    context = _context_of(tokenizer, prompt)
    known, whole = (tokenizer.decode(some, clean_up_tokenization_spaces=False) for some in (context, [*context, *ids]))
    return whole[len(known) :]


class TextStream:
    """Turns one sequence's tokens into deltas, texts whose concatenation is the text of all, up to a stop string.

    prompt: the tokens before them. A stop string may be, or hold, a special token, though no text shows it. `stopped`
    says that a stop string has come; it and everything behind it are left out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        self._marks = _marks(tokenizer, stop)
        self._stop = (*stop, *(marked for text in stop if (marked := self._marked(text)) != text))
        self._unmark = str.maketrans(dict.fromkeys((mark for _, mark in self._marks.values()), ""))
        self._ids = _context_of(tokenizer, prompt)
        # Tokens from `_start` on are decoded together, since a token's text may depend on the one before it;
        # the text of those before `_read` has been taken already.
        self._start, self._read = 0, len(self._ids)
        self._held = ""

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        new = ""
        for token in ids:
            if token in self._marks:
                new += self._new_text(is_last=True) + self._marks[token][1]
            self._ids.append(token)
            new += self._new_text(is_last=False)
        return self._through_stops(new)

    def finish(self) -> str:
        """What is left: the beginning of a stop string that did not come, bytes that are no character."""
        text = self._through_stops(self._new_text(is_last=True))
        held, self._held = self._held, ""
        return text if self.stopped else text + held.translate(self._unmark)

    def _new_text(self, is_last: bool) -> str:
        known, now = (
            _decoded(self._tokenizer, ids) for ids in (self._ids[self._start : self._read], self._ids[self._start :])
        )
        if len(now) <= len(known) or (now.endswith(_UNFINISHED) and not is_last):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(known) :]

    def _marked(self, text: str) -> str:
        for content, mark in sorted(self._marks.values(), key=lambda pair: -len(pair[0])):
            text = text.replace(content, mark)
        return text

    def _through_stops(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        starts = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)].translate(self._unmark)
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept].translate(self._unmark)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _marks(tokenizer: Any, stop: Sequence[str]) -> dict[int, tuple[str, str]]:
    """{id: (text, mark)} of the special tokens that the stop strings hold."""
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    held = {i: text for i, text in special.items() if text and any(text in each for each in stop)}
    return {i: (text, chr(_FIRST_MARK + n)) for n, (i, text) in enumerate(held.items())}


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of text that is a beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
