"""Conversations to train on: a model's own chat template around them, and which of their tokens are the assistant's.

A line of a .jsonl file is an object with a list of messages, {"role": ..., "content": ...} each. Templates rarely say
themselves which part of their text the assistant writes, so that is found as a model meets it: what the template gives
for the messages up to an answer, beyond what it gives for the messages before it with the answer begun.

In a token file of conversations a token is id * 2 + 1 where the assistant says it, and id * 2 elsewhere: in one file,
the two can not part.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from radlads_jax.data.binidx import TokenFile, TokenFileWriter, open_token_file
from radlads_jax.data.chat_template import (
    Message,
    check_text,
    check_tools,
    is_message,
    is_tools,
    rendered,
    require_template,
)
from radlads_jax.data.packing import Batch, PackedRows
from radlads_jax.data.prepare import made_before, publish_recipe, tokenizer_hash, tokens_bar
from radlads_jax.data.sources import Source, fingerprint, json_records
from radlads_jax.system.json_files import digest
from radlads_jax.system.storage import AnyPath
from radlads_jax.system.untrusted import brief, listed

_ASSISTANT = "assistant"


class _Training(NamedTuple):
    """A text, and the spans of characters in it that the assistant writes."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class ChatRows:
    """PackedRows of a token file of conversations: loss_mask is 1 where the next token is the assistant's."""

    packed: PackedRows

    def __len__(self) -> int:
        return len(self.packed)

    def rows(self, indices: np.ndarray) -> Batch:
        """As PackedRows.rows."""
        batch = self.packed.rows(indices)
        ids, said = np.divmod(batch["tokens"], 2)
        mask = batch["loss_mask"].copy()
        mask[:, :-1] *= said[:, 1:]
        return batch | {"tokens": ids.astype(np.int32), "loss_mask": mask}


def chat_rows(file: TokenFile, seq_len: int) -> ChatRows:
    """All whole rows of a token file that `prepare_chats` made."""
    return ChatRows(PackedRows(file, seq_len))


def answered_tokens(file: TokenFile) -> int:
    """How many tokens of the file are the assistant's."""
    return int(np.count_nonzero(file.tokens % 2))


def prepare_chats(path: str, messages_field: str, tokenizer: Any, cache_dir: AnyPath, *, vocab_size: int) -> TokenFile:
    """Tokenises the conversations of a .jsonl file, or of a directory of them, into a token file below `cache_dir`.

    One that was made before of the same conversations with the same tokenizer and template is opened.
    tokenizer: transformers' own. Raises ValueError for a line that holds no conversation (with its number), for a
    template that refuses it, for a tokenizer without one, and where no assistant says anything.
    """
    require_template(
        tokenizer, "the run", "Set config.data.tokenizer to the same one with a template, such as its chat model's."
    )
    source = Source(path, kind="jsonl", text_field=messages_field)
    recipe = {
        "chats": fingerprint(source),
        "tokenizer": tokenizer_hash(tokenizer.backend_tokenizer),
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "vocab_size": vocab_size,
    }
    name = digest(recipe)
    if there := made_before(cache_dir, name):
        return open_token_file(there)
    prefix = cache_dir / f"chats-{name}"
    with TokenFileWriter(prefix, 2 * vocab_size) as writer, tokens_bar() as bar:
        task = bar.add_task(f"tokenising {path}", total=None, completed=writer.num_tokens)
        documents = _documents(source, tokenizer)
        for ids in itertools.islice(documents, writer.num_documents, None):
            writer.add(ids)
            bar.update(task, completed=writer.num_tokens)
        if writer.num_documents == 0:
            raise ValueError(
                f"{path} has no conversation in which the assistant says something; expected lines with "
                f'{messages_field!r}: [{{"role": "user", "content": ...}}, {{"role": "assistant", "content": ...}}]. '
                "Check config.data.chats."
            )
    publish_recipe(prefix, recipe)
    return open_token_file(prefix)


def _documents(source: Source, tokenizer: Any) -> Iterator[np.ndarray]:
    """Each conversation's tokens, with what the assistant says marked."""
    for record, where in json_records(source):
        messages, tools = _messages(record, source.text_field, where), _tools(record, where)
        for training in trainings(tokenizer, messages, where, tools):
            yield _marked(training, tokenizer)


def _messages(record: dict[str, Any], field: str, where: str) -> list[Message]:
    if field not in record:
        raise ValueError(
            f"{where} has no {field!r}; expected one of what it has: {listed(list(record))}. Set "
            "config.data.messages_field, or mend the line."
        )
    messages = record[field]
    is_list = isinstance(messages, list) and bool(messages)
    wrong = [message for message in messages if not is_message(message)] if is_list else [messages]
    if wrong:
        raise ValueError(
            f"{where} has {brief(wrong[0])} in {field!r}; expected a list of messages, each an object with a role and "
            "a content, both text. Mend the line."
        )
    return messages


def _tools(record: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    tools = record.get("tools")
    if tools is not None and not is_tools(tools):
        raise ValueError(
            f'{where} has {brief(tools)} as "tools"; expected a list of objects, what the model may call as JSON '
            "schemas. Mend the line."
        )
    return tools


def trainings(
    tokenizer: Any, messages: Sequence[Message], where: str, tools: Sequence[dict[str, Any]] | None = None
) -> list[_Training]:
    """What a conversation gives to train on, as a model meets it that answers it turn by turn.

    One text with all answers where the template writes each turn in the same way whatever follows; where it does not,
    as those do that leave out what was thought before, a text for every answer. None where the assistant says nothing.
    tools: what it may call. Raises ValueError for tools, and calls of them, of which the template writes nothing.
    """
    # What the assistant says before anybody has spoken is no answer.
    turns = [i for i, message in enumerate(messages) if i and message["role"] == _ASSISTANT]
    if turns:
        check_tools(tokenizer, messages[: turns[0]], tools, where)
    answers = [_answer(tokenizer, messages[: i + 1], tools, where) for i in turns]
    each = [one for one in answers if one.spans]
    if each and all(each[-1].text.startswith(one.text) for one in each[:-1]):
        return [_Training(each[-1].text, tuple(span for one in each for span in one.spans))]
    return each


def _answer(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, where: str
) -> _Training:
    """The text up to the last message, which is the assistant's; without a span where the template writes nothing."""

    def written(message: Message) -> str:
        return rendered(tokenizer, [*messages[:-1], message], tools, where, begins_answer=False)

    before, last = rendered(tokenizer, messages[:-1], tools, where), messages[-1]
    text = check_text(written(last), where)
    if last.get("tool_calls") and text == _or_none(written, {"role": last["role"], "content": last.get("content")}):
        raise ValueError(
            f"{where} has an answer with tool_calls, of which the chat template writes nothing; expected a template "
            "that was made for tools, or what is learnt is to say nothing. Leave the line out."
        )
    if not text.startswith(before):
        begins = len(_common(text, before))
        raise ValueError(
            f"the chat template writes {brief(before[begins:])} before an answer that it is asked for and "
            f"{brief(text[begins:][: len(before) - begins + 20])} before the one of {where}; expected the same, or "
            "what is learnt is not what is asked. Correct the template, or leave the line out."
        )
    said = text[len(before) :].rstrip()
    return _Training(before + said, ((len(before), len(before + said)),) if said else ())


def _or_none(written: Callable[[Message], str], message: Message) -> str | None:
    """None where the template refuses the message: one that has to have its calls."""
    try:
        return written(message)
    except ValueError:
        return None


def _common(a: str, b: str) -> str:
    return "".join(x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _marked(training: _Training, tokenizer: Any) -> np.ndarray:
    """id * 2 + whether the assistant says it, int64 [length]; a token belongs to where it begins."""
    (encoding,) = tokenizer.backend_tokenizer.encode_batch([training.text], add_special_tokens=False)
    begins = np.array([offset[0] for offset in encoding.offsets], np.int64)
    said = np.zeros(len(begins), bool)
    for first, last in training.spans:
        said |= (begins >= first) & (begins < last)
    return np.array(encoding.ids, np.int64) * 2 + said
