"""What callers pass as a conversation, checked and copied into plain JSON values.

The copy is what a template sees: no object of the caller's with methods of its own, nothing that the template could
change. Each string goes through the function that marks special tokens. `chat` calls this module.
"""

import reprlib
from collections.abc import Callable, Mapping, Sequence

ROLES = ("system", "user", "assistant", "tool", "ipython", "function", "developer")
# The result of a tool may be any JSON value; everyone else writes text.
RESULT_ROLES = ("tool", "ipython", "function")
MAX_DEPTH = 64


def copy_messages(messages: Sequence[Mapping], mark: Callable[[str, bool], str]) -> list[dict]:
    """Return a checked copy of one conversation.

    A content that is a list of `{"type": "text", "text": ...}` becomes the text of its parts, one behind the other.

    Args:
        messages: the conversation, `{"role", "content", ...}` each.
        mark: applied to every string but the roles, as in `copy_json`.

    Raises:
        TypeError: a message, a role or a content is of the wrong type.
        ValueError: no messages, an unknown role, no content, or two system messages.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages = {reprlib.repr(messages)}; expected a list of dicts with 'role' and 'content'.")
    if not messages:
        raise ValueError("messages = []; expected at least one message.")
    copies = [_copy_message(message, f"messages[{index}]", mark) for index, message in enumerate(messages)]
    systems = [index for index, message in enumerate(copies) if message["role"] == "system"]
    if len(systems) > 1:
        raise ValueError(f"messages[{systems[1]}]['role'] = 'system'; expected at most one system message.")
    return copies


def _copy_message(message, path, mark):
    if not isinstance(message, Mapping):
        raise TypeError(f"{path} = {reprlib.repr(message)}; expected a dict with 'role' and 'content'.")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{path}['role'] = {reprlib.repr(role)}; expected one of {', '.join(ROLES)}.")
    content = message.get("content")
    # What is None is left out, as Hugging Face does: templates ask what is defined, and would write "None".
    others = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    copied = copy_json(others, path, mark)
    copied = {"role": role, **copied}
    if content is not None:
        copied["content"] = _copy_content(content, role, f"{path}['content']", mark)
    _check_calls(copied, path)
    if content is None and not (role == "assistant" and copied.get("tool_calls")):
        raise ValueError(
            f"{path}['content'] = None; expected a str. Only an assistant's message with 'tool_calls' has none."
        )
    return copied


def _copy_content(content, role, path, mark):
    if isinstance(content, list | tuple) and content and all(map(_is_text_part, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str | None) and role not in RESULT_ROLES:
        raise TypeError(
            f"{path} = {reprlib.repr(content)}; expected a str, or a list of {{'type': 'text', 'text': str}}."
        )
    return copy_json(content, path, mark)


def _is_text_part(part):
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _check_calls(message, path):
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise TypeError(f"{path}['tool_calls'] = {reprlib.repr(calls)}; expected a list of dicts.")


def copy_dicts(values: Sequence[Mapping] | None, name: str, mark: Callable[[str, bool], str]) -> list[dict] | None:
    """Return a copy of the tools or documents.

    Raises:
        TypeError: they are not a list of dicts.
    """
    if values is None:
        return None
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise TypeError(f"{name} = {reprlib.repr(values)}; expected a list of dicts.")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            hint = " Pass the JSON schema of a function, not the function." if callable(value) else ""
            raise TypeError(f"{name}[{index}] = {reprlib.repr(value)}; expected a dict.{hint}")
    return copy_json(values, name, mark)


def copy_json(value, path: str, mark: Callable[[str, bool], str], depth: int = 0):
    """Return a deep copy of a JSON value.

    Args:
        value: str, int, float, bool, None, and lists, tuples and dicts of them.
        path: where the value stands, for the message of an error.
        mark: applied to every string, keys included; its second argument says whether the string is a key that a
            template may look up by name.
        depth: int. How deep the value lies in what is copied.

    Raises:
        TypeError: a value is of another type, or the key of a dict is not a str.
        ValueError: the value is nested too deeply, or holds itself.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{path[:80]}: nested more than {MAX_DEPTH} deep.")
    if isinstance(value, str):
        return mark(value, False)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        # A subclass, such as an enum, may have methods and a text of its own.
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{path}: key {reprlib.repr(key)}; expected a str.")
        return {
            mark(key, key.isidentifier()): copy_json(part, f"{path}[{key!r}]", mark, depth + 1)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [copy_json(part, f"{path}[{index}]", mark, depth + 1) for index, part in enumerate(value)]
    raise TypeError(
        f"{path} = {reprlib.repr(value)} ({type(value).__name__}); expected a str, a number, a bool, None, or lists "
        "and dicts of them."
    )
