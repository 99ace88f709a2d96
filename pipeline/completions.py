"""Examples of which only the completion is predicted: rows of a table, laid out by a template.

`prompt_completion`: prompt and completion exactly as they are, nothing between them (a separator
belongs into the data), then end-of-text; both it and the completion are predicted.

`messages`: turn by turn `System: `, `User: ` or `Assistant: ` and the content, stripped of white
space around it; a line feed ends a turn, end-of-text one of the assistant. Predicted is what the
assistant says, each time, with that end-of-text:

    User: What is 3 + 4?
    Assistant: 7<|endoftext|>

The space after `Assistant:` is predicted, too: it is a part of the word after it. What is said
after the last turn of the assistant teaches nothing and is left out.
"""

import reprlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pipeline.recipe import InputError

COLUMNS = {"prompt_completion": ("prompt", "completion"), "messages": ("messages",)}
SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}

# The same for `tokenizer.apply_chat_template`. Between the words of `generation` is what is
# predicted, as TRL and transformers' `return_assistant_tokens_mask` know it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] or message.content is not string %}"
    "{{ raise_exception('a role is system, user or assistant, and its content is text') }}"
    "{% endif %}"
    "{{ message.role | capitalize + ':' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ ' ' + message.content | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message.content | trim + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class Example(str):
    """The text of an example, without end-of-text, that knows what of it is predicted.

    Attributes:
        pieces: by turns what is given and what is predicted; each is encoded by itself.
        ids: marked ids (see `marks`) of the same, with the end-of-text at their end, if known.
    """

    pieces: tuple[str, ...]
    ids: np.ndarray | None

    def __new__(cls, pieces: Iterable[str], ids: np.ndarray | None = None) -> "Example":
        """Lay the pieces end to end."""
        pieces = tuple(pieces)
        example = super().__new__(cls, "".join(pieces))
        example.pieces, example.ids = pieces, ids
        return example

    def mapped(self, change: Callable[[str], str]) -> "Example":
        """Return the example with every piece changed."""
        return Example(map(change, self.pieces))


def example_of(row: dict[str, Any], kind: str, where: str) -> Example:
    """Return a row's example; `where` names the row.

    Raises:
        InputError: a value is not what the format asks for, or there is nothing to predict.
    """
    if kind == "messages":
        return Example(_turns(row["messages"], where))
    prompt, completion = row["prompt"], row["completion"]
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            chat = "; of lists of messages make data.format messages" if _is_chat(value) else ""
            raise InputError(f"{where}: the {name} is {reprlib.repr(value)} and not text{chat}")
    if not completion:
        raise InputError(
            f"{where}: the completion is empty, so that there is nothing to predict; take the row "
            "out"
        )
    return Example((prompt, completion))


def format_of(columns: Iterable[str]) -> str | None:
    """Return the format of a table with these columns, None for text."""
    found = {*columns}
    return next((kind for kind, wanted in COLUMNS.items() if found.issuperset(wanted)), None)


def _turns(messages: Any, where: str) -> list[str]:
    if isinstance(messages, np.ndarray):
        messages = messages.tolist()
    if not isinstance(messages, list):
        raise InputError(
            f"{where}: messages is {reprlib.repr(messages)} and not a list of messages with role "
            "and content"
        )
    pieces, given = [], ""
    for number, message in enumerate(messages, 1):
        here = f"{where}: message {number}"
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            raise InputError(
                f"{here} is {reprlib.repr(message)}; a message has a role and a content"
            )
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in SPEAKERS:
            raise InputError(f"{here} has the role {role!r}; known: {', '.join(SPEAKERS)}")
        if not isinstance(content, str):
            parts = "; join its parts" if isinstance(content, list) else ""
            raise InputError(f"{here}: its content is {reprlib.repr(content)} and not text{parts}")
        content, speaker = content.strip(), SPEAKERS[role]
        if role != "assistant":
            given += f"{speaker}: {content}\n"
            continue
        if not content:
            raise InputError(
                f"{here}: the assistant says nothing, so that there is nothing to predict; take "
                "the message out"
            )
        pieces += [f"{given}{speaker}:", f" {content}"]
        given = ""
    if not pieces:
        raise InputError(
            f"{where}: no message is the assistant's, so that there is nothing to predict; take "
            "the row out"
        )
    return pieces


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, dict) for one in value)
