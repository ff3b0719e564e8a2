"""What callers may train on and prompt with, brought to one form: texts, prompts with responses, or conversations.

It checks types and names the row that is wrong; it knows no tokenizer and no template. The preprocessor and `training/`
call it.
"""

import reprlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kllama.text.inputs import as_texts

EXPECTED = (
    "expected a str, a list of str, {'prompts': ..., 'responses': ...}, {'messages': ...}, or a list of rows such as "
    "{'text': ...}, {'prompt': ..., 'response': ...} or {'messages': [...]}"
)
# How the rows of files spell the columns.
_COLUMNS = {"text": "texts", "prompt": "prompts", "response": "responses"}
_COLUMNS |= {"completion": "responses", "completions": "responses"}
_KINDS = ({"messages"}, {"prompts", "responses"}, {"texts"})


class Samples(NamedTuple):
    """A batch of samples, as columns of one length.

    Attributes:
        columns: `{"texts"}`, or `{"prompts", "responses"}`, each a list of str; or `{"messages", "tools"}`, the
            conversations, each a list of messages, and for each the list of its tools or None.
        is_batch: False where the caller passed a single sample.
    """

    columns: dict[str, list]
    is_batch: bool

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def kind(self) -> str:
        """What they are: `"texts"`, `"prompts"` or `"messages"`."""
        return next(iter(self.columns))

    def part(self, start: int, stop: int) -> list[str] | dict[str, list]:
        """Give some of the samples in a form that a preprocessor takes."""
        part = {name: column[start:stop] for name, column in self.columns.items()}
        return part["texts"] if self.kind == "texts" else part


def read_samples(x) -> Samples:
    """Read texts, prompts with responses, or conversations.

    Args:
        x: a str, or a list, tuple, array or eager string tensor of them; `{"prompts", "responses"}` of such;
            `{"messages": one conversation or a list of them}`, with `"tools"` beside it if there are any: one list for
            all, or a list of lists. A conversation is a list of `{"role", "content"}`; a batch of them may also come
            as columns, `{"role": [[...]], "content": [[...]]}`. Or one conversation, or a list of them, without the
            key. Or a list of rows with the keys `"text"`, or `"prompt"` and `"response"` (or `"completion"`), or
            `"messages"` (and `"tools"`, in some rows or in all). Other keys are not looked at.

    Raises:
        TypeError: for anything else; the message has the row.
        ValueError: columns of different lengths, or rows with different keys.
    """
    if _is_conversation(x) or (isinstance(x, list | tuple) and x and all(map(_is_conversation, x))):
        x = {"messages": x}
    if isinstance(x, list | tuple) and x and all(isinstance(row, Mapping) for row in x):
        x = _columns(x)
    if not isinstance(x, str | list | tuple | Mapping) and not hasattr(x, "dtype"):  # arrays and tensors have one
        raise TypeError(f"x = {reprlib.repr(x)} ({type(x).__name__}); {EXPECTED}.")
    if not isinstance(x, Mapping):
        texts, is_batch = as_texts(x)
        return Samples({"texts": texts}, is_batch)
    columns = {_COLUMNS.get(name, name): column for name, column in x.items()}
    kind = _kind(columns, f"x has the keys {sorted(map(str, x))}")
    if kind == {"messages"}:
        return _read_conversations(columns["messages"], columns.get("tools"))
    if kind == {"texts"}:
        return Samples({"texts": as_texts(columns["texts"])[0]}, not isinstance(columns["texts"], str))
    return _read_pairs(columns["prompts"], columns["responses"])


def _is_conversation(x) -> bool:
    """Tell whether `x` is a list of messages: of dicts that say whose turn it is."""
    return (
        isinstance(x, list | tuple) and len(x) > 0 and all(isinstance(turn, Mapping) and "role" in turn for turn in x)
    )


def _kind(columns: Mapping, received: str) -> set[str]:
    """Give the columns that samples are read from; data may come with others, ids and sources for example."""
    kinds = [kind for kind in _KINDS if kind <= columns.keys()]
    if len(kinds) != 1:
        raise TypeError(f"{received}; {EXPECTED}.")
    return kinds[0]


def _columns(rows) -> dict[str, list]:
    rows = [{_COLUMNS.get(name, name): value for name, value in row.items()} for row in rows]
    kind = _kind(rows[0], f"x[0] has the keys {sorted(map(str, rows[0]))}")
    for index, row in enumerate(rows):
        if missing := sorted(kind - row.keys()):
            raise ValueError(f"x[{index}] has the keys {sorted(map(str, row))}; expected {missing} too, as x[0] has.")
    if kind == {"messages"} and any(row.get("tools") for row in rows):
        return {"messages": [row["messages"] for row in rows], "tools": [row.get("tools") for row in rows]}
    return {name: [row[name] for row in rows] for name in sorted(kind)}


def _read_pairs(prompts, responses) -> Samples:
    (prompts, is_batch), (responses, is_other_batch) = as_texts(prompts, "prompts"), as_texts(responses, "responses")
    if len(prompts) != len(responses) or is_batch != is_other_batch:
        raise ValueError(f"x has {len(prompts)} prompts and {len(responses)} responses; expected one for each.")
    return Samples({"prompts": prompts, "responses": responses}, is_batch)


def _read_conversations(messages, tools) -> Samples:
    if isinstance(messages, Mapping):
        messages = _conversations_of_columns(messages)
    if not isinstance(messages, list | tuple):
        raise TypeError(f"messages = {reprlib.repr(messages)} ({type(messages).__name__}); expected a list.")
    is_batch = not (messages and isinstance(messages[0], Mapping))
    conversations = list(messages) if is_batch else [messages]
    for row, conversation in enumerate(conversations):
        if not isinstance(conversation, list | tuple) or not all(isinstance(turn, Mapping) for turn in conversation):
            raise TypeError(
                f"messages[{row}] = {reprlib.repr(conversation)} ({type(conversation).__name__}); expected a "
                "conversation, a list of {'role', 'content'}."
            )
        collated = [turn["role"] for turn in conversation if isinstance(turn.get("role"), list | tuple)]
        if collated:
            raise TypeError(
                f"messages[{row}]: role = {reprlib.repr(collated[0])}; expected a str. A DataLoader joins the rows of "
                "a batch turn by turn unless it is given collate_fn=list."
            )
    conversations = [list(conversation) for conversation in conversations]
    return Samples({"messages": conversations, "tools": _tools_of_rows(tools, len(conversations))}, is_batch)


def _tools_of_rows(tools, num_rows: int) -> list:
    if tools is None:
        return [None] * num_rows
    if not isinstance(tools, list | tuple):
        raise TypeError(f"tools = {reprlib.repr(tools)} ({type(tools).__name__}); expected a list.")
    if not any(row is None or isinstance(row, list | tuple) for row in tools):
        return [list(tools)] * num_rows
    if len(tools) != num_rows:
        raise ValueError(f"x has {num_rows} conversations and tools for {len(tools)}; expected one list for each.")
    return [row and list(row) for row in tools]


def _conversations_of_columns(columns: Mapping) -> list:
    if columns.keys() != {"role", "content"}:
        raise TypeError(f"messages has the columns {sorted(columns)}; expected 'role' and 'content'.")
    roles, contents = (_as_lists(columns[name]) for name in ("role", "content"))
    is_batch = not roles or not all(isinstance(role, str) for role in roles)
    if not is_batch:
        roles, contents = [roles], [contents]
    conversations = []
    for row, (turns, texts) in enumerate(zip(roles, contents, strict=True)):
        if len(turns) != len(texts):
            raise ValueError(
                f"messages[{row}] has {len(turns)} roles and {len(texts)} contents; expected one for each."
            )
        conversations.append([{"role": role, "content": text} for role, text in zip(turns, texts, strict=True)])
    return conversations if is_batch else conversations[0]


def _as_lists(values):
    """Give the strings of nested lists, arrays or (ragged) tensors as nested lists of str."""
    if isinstance(values, bytes):
        return values.decode("utf-8", "replace")
    if isinstance(values, str):
        return values
    if not isinstance(values, list | tuple):
        values = values.to_list() if hasattr(values, "to_list") else np.asarray(values).tolist()  # ragged tensors
    return [_as_lists(value) for value in values]
