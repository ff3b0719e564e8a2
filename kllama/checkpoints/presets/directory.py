"""Replacing a preset directory, or a part of one, so that it is whole at every instant.

A model replaces the whole directory. KerasHub's users also save a backbone, then a tokenizer, into one directory: a
part replaces its own files and keeps the others. Neither touches a directory in which somebody else's files lie, unless
told to. What is written is up to KerasHub's saver, which the caller runs inside the `with` block; the saver saves a
model part by part, and the parts then find that their directory is staged already.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path

from kllama.arguments import check_flag
from kllama.checkpoints.files import manifest
from kllama.checkpoints.files.reader import LISTED, listed
from kllama.checkpoints.files.workspace import recover
from kllama.checkpoints.files.writer import resolve, staged_directory

_BACKBONE = r"config\.json|metadata\.json|model\.weights\.(h5|json)|model_\d+\.weights\.h5"
_TASK = r"task\.json|task\.weights\.h5"
_PREPROCESSING = r"preprocessor\.json|tokenizer\.json"
_ASSETS = r"assets/|assets/[^/]+/(tokenizer\.json|vocabulary\.json|vocabulary\.spm|merges\.txt)?"
_PRESET = f"{_BACKBONE}|{_TASK}|{_PREPROCESSING}|{_ASSETS}|{re.escape(manifest.NAME)}|.DS_Store"

BACKBONE = f"{_BACKBONE}|{_TASK}"
"""The files that a new backbone replaces: its own, and those that describe the model around the old one."""

_staging: ContextVar[Path | None] = ContextVar("staging", default=None)


def layer_files(*config_files: str) -> str:
    """Give the pattern of the files of preprocessing layers: their configurations, and what KerasHub puts beside them.

    Args:
        *config_files: the names of the configurations.
    """
    folders = (re.escape(name.split(".")[0]) for name in config_files)
    return "|".join([*map(re.escape, config_files), *(f"assets/{folder}/.*" for folder in folders)])


@contextmanager
def staged_preset(
    directory: str | os.PathLike,
    part: str | None = None,
    overwrite: bool = False,
    needed_bytes: int = 0,
    max_shard_size: float | None = None,
) -> Iterator[Path]:
    """Write a preset, or a part of one, that appears whole or not at all; see `writer.staged_directory`.

    Args:
        directory: the preset. One that is there is replaced.
        part: a regular expression: the other files of the directory are kept. None replaces all of it.
        overwrite: whether files that no preset has may lie there. A part keeps them; a whole preset replaces them, too.
        needed_bytes: how much will be written, at least.
        max_shard_size: the largest size of a file of that, in GB; None for one file.

    Yields:
        The directory to write to, which holds what is kept. Inside the block, it is also what saving another part to
        it gives.

    Raises:
        ValueError: the directory holds files that no preset has, and `overwrite` is false.
        ResourceError: the disk is full, failing or read-only, or a directory may not be written to.
    """
    path = resolve(directory)
    if _staging.get() == path:
        yield path
        return
    check_flag("overwrite", overwrite)
    recover(path)
    if os.path.isdir(path) and not overwrite:
        _refuse_others_files(path, part)
    kept = [] if part is None else [name for name in _walk(path) if not _matches(f"{part}|{manifest.NAME}", name)]
    known = {name: saved for name, saved in (manifest.read(path) or {}).items() if name in kept} if kept else {}
    with staged_directory(path, overwrite=True, needed_bytes=needed_bytes, known=known) as staging:
        for name in kept:
            _keep(path / name, staging / name)
        _try_size(staging, needed_bytes if max_shard_size is None else min(needed_bytes, int(max_shard_size * 2**30)))
        token = _staging.set(staging)
        try:
            yield staging
        finally:
            _staging.reset(token)


def _try_size(directory: Path, size: int) -> None:
    """Have the system refuse a file that is too large for it: the HDF5 library would end the process on the way."""
    probe = directory / "probe"
    with open(probe, "wb") as file:
        file.truncate(size)
    probe.unlink()


def _refuse_others_files(path: Path, part: str | None) -> None:
    ours = _PRESET if part is None else f"{_PRESET}|{part}"
    others = list(islice((name for name in _walk(path) if not _matches(ours, name)), LISTED + 1))
    if others:
        effect = "replace them, too" if part is None else "keep them there"
        raise ValueError(
            f"{path}: holds {listed(others)}, which no preset has; expected a preset, an empty directory, or nothing. "
            f"Save to another directory, or pass overwrite=True to {effect}."
        )


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name) is not None


def _walk(path: Path) -> Iterator[str]:
    """Yield the names of all files and links in a directory and below, and with a slash those of its directories."""
    for folder, directories, files in os.walk(path):
        for name in (*sorted(directories), *sorted(files)):
            entry = Path(folder, name)
            slash = "/" if entry.is_dir() and not entry.is_symlink() else ""
            yield f"{entry.relative_to(path).as_posix()}{slash}"


def _keep(file: Path, staged: Path) -> None:
    """Give a file of the old directory a name in the new one, too; nothing may write to either."""
    if file.is_dir():
        os.symlink(os.readlink(file), staged) if file.is_symlink() else staged.mkdir()
        return
    try:
        os.link(os.path.realpath(file), staged)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(file, staged)
