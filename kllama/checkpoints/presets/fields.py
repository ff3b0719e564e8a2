"""The closed schema of a preset's JSON files: which class they hold, which fields it has, and of what type they are.

Fields are read one by one; nothing is handed to Keras' deserializer, so a preset cannot name a class to import. It does
not know which fields there are: that is for the formats, `reading.py` and `keras_hub.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kllama.checkpoints.files.reader import listed, read_json, shown
from kllama.errors import CheckpointError, UnsupportedError

POLICIES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
"""The dtype policies of a model that is not quantised."""

_REQUIRED = object()


class Kind(NamedTuple):
    """What a field may hold."""

    expected: str
    accepts: Callable[[object], bool]
    default: object = _REQUIRED  # what it means to lack the key

    def since(self, default: object) -> "Kind":
        """Return this kind for a key that came later; presets without it mean the default."""
        return self._replace(default=default)

    def or_null(self) -> "Kind":
        """Return a kind that accepts null, too."""
        return Kind(f"{self.expected}, or null", lambda value: value is None or self.accepts(value))


COUNT = Kind("an integer of at least 1", lambda value: type(value) is int and value >= 1)
NUMBER = Kind("a number", lambda value: type(value) in (int, float))
FLAG = Kind("true or false", lambda value: type(value) is bool)
STRING = Kind("a string", lambda value: type(value) is str)
LIST = Kind("a list", lambda value: type(value) is list)
OBJECT = Kind("an object", lambda value: type(value) is dict)

LAYER_KEYS = ("name", "trainable", "dtype", "config_file", "tokenizer")
"""What the config of a tokenizer or a preprocessor holds besides its own fields."""

PREPROCESSOR_FIELDS = {"sequence_length": COUNT, "add_start_token": FLAG, "add_end_token": FLAG}


def read_object(path: Path, *names: str) -> dict:
    """Read the config of a serialized Keras object that must be of one of some classes.

    Args:
        path: the file.
        *names: the registered names of the classes.

    Raises:
        UnsupportedError: it is of another class.
        CheckpointError: the file is damaged, or has no config.
    """
    content = read_json(path)
    if content.get("registered_name") not in names:
        raise UnsupportedError(
            f"{path}: registered_name = {shown(content.get('registered_name'))}; expected "
            f"{' or '.join(map(shown, names))}. This preset holds another model."
        )
    if not isinstance(content.get("config"), dict):
        raise CheckpointError(f"{path}: config = {shown(content.get('config'))}; expected an object.")
    return dict(content["config"])


def read_fields(path: Path, config: dict, fields: dict[str, Kind], ignored: tuple[str, ...] = ()) -> dict:
    """Take the fields out of a config that must have them all, but for later ones, and no others but the ignored.

    Raises:
        CheckpointError: keys that are unknown or missing, or values of the wrong type.
    """
    config = {**{name: kind.default for name, kind in fields.items() if kind.default is not _REQUIRED}, **config}
    unknown, missing = sorted(config.keys() - fields.keys() - set(ignored)), sorted(fields.keys() - config.keys())
    if unknown:
        raise CheckpointError(f"{path}: unknown keys: {listed(map(shown, unknown))}; expected {', '.join(fields)}.")
    if missing:
        raise CheckpointError(f"{path}: missing keys: {listed(missing)}.")
    wrong = [name for name, kind in fields.items() if not kind.accepts(config[name])]
    if wrong:
        received = listed((f"{name} = {shown(config[name])}; expected {fields[name].expected}" for name in wrong), ". ")
        raise CheckpointError(f"{path}: {received}.")
    return {name: config[name] for name in fields}
