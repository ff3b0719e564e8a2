"""How the tests of this folder damage a sound preset, and what they expect of the error."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest


def change_json(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_config(file: Path, **changes) -> None:
    change_json(file, lambda content: content["config"].update(changes))


def replace(file: Path, name: str, array, **options) -> None:
    """Store something else under the name of a dataset."""
    with h5py.File(file, "r+") as opened:
        if name in opened:
            del opened[name]
        opened.create_dataset(name, data=array, **options)


def refuses(error: type, *parts: object):
    """Expect an error of exactly this class, with a message of one line that says every part."""

    def is_sound(raised):
        return type(raised) is error and "\n" not in str(raised) and str(raised)[-1] in ".?"

    return pytest.raises(error, match="".join(f"(?=.*{re.escape(str(part))})" for part in parts), check=is_sound)


# What may be wrong with any JSON file, and what the message says.
JSON_FAULTS = {
    "empty": (b"", "empty"),
    "truncated": (b'{"registered_name": ', "line 1, column 21"),
    "not UTF-8": (b'{\n"a": "\xff"}', "line 2, column 7"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "a list": (b"[1]", "expected an object"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nesting > 64"),
    "huge": (b" " * (16 * 2**20 + 1), "expected at most"),
    "a key twice": (b'{"a": 1, "a": 2}', '"a"'),
    "NaN": (b'{"a": NaN}', "a = NaN"),
    "infinity": (b'{"a": 1e999}', "a = Infinity"),
}
