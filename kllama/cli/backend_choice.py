"""Chooses the Keras backend for a command, before Keras is imported.

Keras alone would take TensorFlow wherever nothing is said, and KerasHub installs TensorFlow: someone who installed
`kllama[jax]` would run on TensorFlow without a word.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import NamedTuple

BACKENDS = ("jax", "torch", "tensorflow")

# Keras writes this file by itself when it is first imported, whatever backend it runs on: it is nobody's choice.
_WRITTEN_BY_KERAS = {
    "floatx": "float32",
    "epsilon": 1e-07,
    "backend": "tensorflow",
    "image_data_format": "channels_last",
}


class BackendChoice(NamedTuple):
    """A backend that is installed, and where the choice comes from."""

    name: str
    source: str


def choose_backend(option: str | None = None) -> BackendChoice:
    """Choose among the installed backends.

    Args:
        option: the value of `--backend`. Without it `KERAS_BACKEND` decides, then keras.json if its owner has changed
            it, then the first that is installed of jax, torch and tensorflow.

    Returns:
        The choice. Nothing is set yet.

    Raises:
        ValueError: if the backend is unknown or not installed.
    """
    for choice in (
        BackendChoice(option, "--backend"),
        BackendChoice(os.environ.get("KERAS_BACKEND"), "KERAS_BACKEND"),
        _from_keras_json(),
    ):
        if choice.name:
            return _validate(choice)
    for name in BACKENDS:
        if _is_installed(name):
            return BackendChoice(name, "the first installed")
    raise ValueError(
        'backend: none is installed; expected one of jax, torch, tensorflow. Run: pip install "kllama[jax]"'
    )


def use_backend(choice: BackendChoice) -> None:
    """Make Keras, which must not be imported yet, run on the chosen backend, and TensorFlow keep its logs to itself."""
    os.environ["KERAS_BACKEND"] = choice.name
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _from_keras_json() -> BackendChoice:
    path = Path(os.environ.get("KERAS_HOME", "~/.keras"), "keras.json").expanduser()
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # as Keras does: a file that it cannot read says nothing
        settings = None
    if not isinstance(settings, dict) or settings == _WRITTEN_BY_KERAS:
        return BackendChoice(None, str(path))
    return BackendChoice(settings.get("backend"), str(path))


def _validate(choice: BackendChoice) -> BackendChoice:
    if choice.name not in BACKENDS:
        raise ValueError(f"{choice.source}: backend = {choice.name!r}; expected one of jax, torch, tensorflow.")
    if not _is_installed(choice.name):
        raise ValueError(
            f"{choice.source}: backend = {choice.name!r}, which is not installed. "
            f'Run: pip install "kllama[{choice.name}]"'
        )
    return choice


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
