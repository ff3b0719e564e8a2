"""Loading a directory that is replaced meanwhile: the load starts anew, so it gives the whole old or the whole new one.

A save replaces a directory in one step, but a load reads one file after another. `from_preset` of the models and the
tokenizer is wrapped in this.
"""

import functools
import os
from collections.abc import Callable
from typing import TypeVar

from kllama.checkpoints.files import manifest
from kllama.errors import CheckpointError, ResourceError

T = TypeVar("T")

_ATTEMPTS = 10


def undisturbed(load: Callable[..., T]) -> Callable[..., T]:
    """Wrap a class method `load(cls, preset, ...)` so that what it reads is of one save.

    Args:
        load: the method. It may be called several times.

    Returns:
        A method with the same arguments. It raises a `ResourceError` if the directory is replaced time and again.
    """

    @functools.wraps(load)
    def load_undisturbed(cls, preset, *args, **kwargs):
        for _ in range(_ATTEMPTS):
            before = _identity(preset)
            try:
                loaded = load(cls, preset, *args, **kwargs)
            except (CheckpointError, ResourceError):
                if _identity(preset) == before:
                    raise
                continue
            if _identity(preset) == before:
                return loaded
        raise ResourceError(
            f"{preset}: replaced {_ATTEMPTS} times while it was read; expected it to stay. Load it when nobody saves."
        )

    return load_undisturbed


def _identity(preset: str | os.PathLike) -> tuple | None:
    """Tell the directories of two saves apart; None for what no save of ours has made."""
    try:
        path = os.path.expanduser(preset)
        directory, saved = os.stat(path), os.stat(os.path.join(path, manifest.NAME))
    except (OSError, ValueError, TypeError):
        return None
    # The number of a directory that is gone is given again, but a later save has written its manifest later.
    return directory.st_dev, directory.st_ino, saved.st_ino, saved.st_mtime_ns
