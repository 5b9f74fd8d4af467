"""Prompts: read from a file, and as a model's tokens."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from radlads_jax.data.chat_template import Message, is_message, is_tools
from radlads_jax.decoding.loaded import Model
from radlads_jax.system import storage
from radlads_jax.system.untrusted import brief, listed, parse_json

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_KEYS = ("prompt", "messages", "tools")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue, or the messages of a chat; tools: what the model may call in its answer, as JSON schemas."""

    content: str | list[Message]
    tools: Sequence[dict[str, Any]] | None = None


def read_prompts(path: storage.AnyPath) -> list[Prompt]:
    """The prompts of a file: lines of text; where it is .jsonl, .ndjson or .json, an object a line.

    An object has "prompt" (text) or "messages" (a chat), and a chat may have "tools". Raises ValueError naming the line
    that is none, and for a file without prompts.
    """
    try:
        text = storage.read_text(path).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); expected text. Convert the file to UTF-8.") from error
    # Not splitlines(), which also ends a line at U+2028, a form feed and their kin: JSON has them within strings.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt; expected one a line. Fill the file, or give another as --prompts.")
    if path.suffix.lower() not in _JSON_LINES:
        _refuse_json(lines[0][1], f"{path}, line {lines[0][0]}")
        return [Prompt(line) for _, line in lines]
    return [_prompt_of(line, f"{path}, line {number}") for number, line in lines]


def _refuse_json(line: str, where: str) -> None:
    """Raises ValueError for a line of text that was meant as one of JSON."""
    try:
        record = json.loads(line) if line.lstrip().startswith("{") else None
    except ValueError:
        return
    if isinstance(record, dict) and {"prompt", "messages"} & set(record):
        raise ValueError(
            f"{where} is JSON with a prompt, in a file of plain text; expected one whose name ends in "
            f"{' or '.join(_JSON_LINES)}. Rename it."
        )


def _prompt_of(line: str, where: str) -> Prompt:
    record = parse_json(line, where, "Correct the line.", strict=True)
    if not isinstance(record, dict) or not _is_prompt(record):
        count = "both" if isinstance(record, dict) and {"prompt", "messages"} <= set(record) else "neither"
        raise ValueError(
            f'{where} has {count} of a text "prompt" and "messages" with role and content; expected one of them in an '
            "object a line. Correct it."
        )
    if unknown := [key for key in record if key not in _KEYS]:
        raise ValueError(
            f"{where} has {listed(unknown)}; expected no keys but {', '.join(_KEYS)}, since others change nothing. "
            "Leave them out."
        )
    tools = record.get("tools")
    if tools is not None and not ("messages" in record and is_tools(tools)):
        raise ValueError(
            f'{where} has "tools" that are no list of JSON objects, or no "messages" beside them; expected both. '
            "Correct the line."
        )
    return Prompt(record.get("prompt") or record["messages"], tools)


def _is_prompt(record: dict[str, Any]) -> bool:
    if ("prompt" in record) == ("messages" in record):
        return False
    if "prompt" in record:
        return isinstance(record["prompt"], str) and bool(record["prompt"])
    messages = record["messages"]
    return isinstance(messages, list) and bool(messages) and all(map(is_message, messages))


def check_system(prompts: Sequence[Prompt], system: str) -> None:
    """Raises ValueError for a chat that has a system's message already, where another is to stand before it."""
    for number, prompt in enumerate(prompts, 1):
        if system and isinstance(prompt.content, list) and prompt.content[0]["role"] == "system":
            raise ValueError(
                f"prompt {number} begins with a message of the system ({brief(prompt.content[0]['content'])}), and "
                "--system has another; expected one of them. Leave --system out, or take that message away."
            )


def encoded(model: Model, prompt: Prompt, *, chat: bool, system: str) -> list[int]:
    """The tokens of a prompt; chat: of a text too, as the message of a user after the system's, where there is one."""
    if isinstance(prompt.content, str) and not chat:
        return model.encode(prompt.content)
    messages = prompt.content if isinstance(prompt.content, list) else [{"role": "user", "content": prompt.content}]
    beginning = [{"role": "system", "content": system}] if system else []
    return model.encode_chat(beginning + messages, prompt.tools)
