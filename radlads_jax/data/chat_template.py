"""A conversation as a model's own chat template writes it, and text as a tokenizer takes it."""

from collections.abc import Sequence
from typing import Any

import jinja2

from radlads_jax.system.untrusted import brief

Message = dict[str, Any]

# A template is a program of its author's: what it refuses, and what it does not expect, come as any of these.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def is_message(value: Any) -> bool:
    """Whether it is an object with a role and text; without text where the assistant called a tool.

    Most templates write anything else as Python shows it, or leave it out.
    """
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    return isinstance(content, str) or (content is None and bool(value.get("tool_calls")))


def is_tools(value: Any) -> bool:
    """Whether it may be what a model may call: a list of objects, each a JSON schema."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def chat_text(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, directory: Any
) -> str:
    """The text of a conversation up to where the assistant answers.

    tools: what the model may call, as JSON schemas. Raises ValueError where the tokenizer has no template, where the
    template refuses the messages, and where it makes nothing of tools.
    """
    require_template(tokenizer, directory, "Give a --prompt to continue instead.")
    check_tools(tokenizer, messages, tools, directory)
    return rendered(tokenizer, messages, tools, directory)


def check_tools(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, where: Any
) -> None:
    """Raises ValueError for tools of which the template writes nothing."""
    if tools and rendered(tokenizer, messages, tools, where) == rendered(tokenizer, messages, None, where):
        raise ValueError(
            f'got {len(tools)} "tools", of which the chat template of {where} writes nothing; expected a model '
            'that was made for tools. Leave "tools" out.'
        )


def require_template(tokenizer: Any, whose: Any, advice: str) -> None:
    """Raises ValueError, which ends in `advice`, for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {whose} has no chat template, so its model was not made for chats; expected one. "
            f"{advice}"
        )


def rendered(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    where: Any,
    *,
    begins_answer: bool = True,
    stays_open: bool = False,
) -> str:
    """What the template makes of messages: with an answer begun behind them, or without.

    stays_open: the text ends with the last message's own, which is to be gone on with.
    where: what an error says that they are of, the model's directory or a line of data.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=begins_answer,
            continue_final_message=stays_open,
        )
    except _TEMPLATE_ERRORS as error:
        reason = brief(str(error) or type(error).__name__, 400)
        roles = ", ".join(brief(message.get("role")) for message in messages)
        raise ValueError(
            f"the chat template of {where} refuses messages of the roles {brief(roles)}: {reason}; expected what "
            "it was made for. Change the messages (--system gives the first one), or correct the template."
        ) from error
    if not isinstance(text, str):
        raise ValueError(
            f"the chat template of {where} gives a {type(text).__name__}; expected text. Correct the template."
        )
    return text


def check_text(text: str, name: str) -> str:
    """The text itself; ValueError for halves of surrogate pairs, which stand for no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has {brief(text[error.start])} as its character {error.start + 1:,}, half of a surrogate pair; "
            "expected text that can be written as UTF-8. Correct it, or its encoding."
        ) from error
    return text
