"""Prompts: read from a file, and as a model's tokens."""

import json

from radlads_jax.decoding.loaded import Model
from radlads_jax.system import storage


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


def encoded(model: Model, prompt: str | list[dict[str, str]], *, chat: bool, system: str) -> list[int]:
    """The tokens of a prompt; chat: of a text too, as the message of a user after the system's, where there is one."""
    if isinstance(prompt, str) and not chat:
        return model.encode(prompt)
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    beginning = [{"role": "system", "content": system}] if system else []
    return model.encode_chat(beginning + messages)
