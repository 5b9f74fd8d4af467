"""Text from tokens as they come: whole characters, and nothing of a stop string."""

from collections.abc import Iterable, Sequence
from typing import Any

# What a decoder puts where bytes are no character, or not yet.
UNFINISHED = "\ufffd"


class TextStream:
    """Turns one sequence's tokens into pieces of text whose concatenation is the text of all, up to a stop string.

    `stopped` says that a stop string has come; it and everything behind it are left out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # Tokens from `_start` on are decoded together, since a token's text may depend on the one before it;
        # the text of those before `_read` has been taken already.
        self._start = self._read = 0
        self._held = ""

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        new = ""
        for token in ids:
            self._ids.append(token)
            new += self._new_text(is_last=False)
        return self._through_stops(new)

    def finish(self) -> str:
        """What is left: the beginning of a stop string that did not come, bytes that are no character."""
        text = self._through_stops(self._new_text(is_last=True))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _new_text(self, is_last: bool) -> str:
        known, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if len(now) <= len(known) or (now.endswith(UNFINISHED) and not is_last):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _through_stops(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of text that is a beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
