"""Saves that cannot be half done: files are written beside their target, synced, and put in its place in one step.

Whatever kills a saver, and whenever, the target is the whole old or the whole new thing. There is no lock between
savers: each is whole, and the last one wins. `workspace` says where the files are meanwhile, `swap` is the step.

It knows nothing of what is saved. A directory gets a manifest (`manifest`); what may be replaced is for the callers:
`presets/directory.py` and the exports.
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kllama.arguments import check_flag
from kllama.checkpoints.files import manifest
from kllama.checkpoints.files.reader import listed
from kllama.checkpoints.files.swap import exchange
from kllama.checkpoints.files.workspace import NEW, OLD, recover, remove, sync, workspace
from kllama.errors import ResourceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAILING = (*_FULL, errno.EIO, errno.EROFS)
# How h5py, and libraries written in Rust, name an error of the system.
_ERRNO = re.compile(r"\berrno = (\d+)|\(os error (\d+)\)")
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
_ATTEMPTS = 100


@contextmanager
def staged_directory(
    target: str | os.PathLike,
    overwrite: bool = False,
    needed_bytes: int | None = None,
    known: Mapping[str, manifest.SavedFile] | None = None,
) -> Iterator[Path]:
    """Write a directory that appears whole, with a manifest, or not at all.

    Args:
        target: where it shall be; directories above it are made. Of a link, what it points to is replaced.
        overwrite: whether a directory that is there and holds anything is replaced, whole. It stays as it was until
            the new one is complete.
        needed_bytes: how much will be written, at least; checked against the free space before anything is.
        known: what the manifest shall say of files that are not new, by name.

    Yields:
        An empty directory of the same name in a hidden place beside it, to write to. When the `with` block ends, it
        takes the target's place; when it ends with an exception, it is removed.

    Raises:
        TypeError: `target` is no path, or `overwrite` no bool.
        ValueError: `target` is a file, holds something and `overwrite` is false, or cannot be replaced because it is
            the current directory or a mount point.
        ResourceError: the disk is full, failing or read-only, or a directory may not be written to.
    """
    path = resolve(target)
    check_flag("overwrite", overwrite)
    with _disk_errors(path):
        recover(path)
        _check_directory(path, overwrite)
        os.makedirs(path.parent, exist_ok=True)
    with _checked_workspace(path, needed_bytes) as work:
        staged = work / NEW / path.name
        with _disk_errors(path):
            os.mkdir(staged)
        with _full_disk_errors(path, needed_bytes):
            yield staged
            manifest.write(staged, known)
        with _disk_errors(path):
            _settle(staged, path)
            _replace_directory(staged, path, work)


@contextmanager
def staged_file(target: str | os.PathLike, overwrite: bool = False, needed_bytes: int | None = None) -> Iterator[Path]:
    """Write a file that appears whole or not at all.

    Args:
        target: where it shall be, in a directory that is there. Of a link, what it points to is replaced.
        overwrite: whether a file that is there is replaced.
        needed_bytes: as of `staged_directory`.

    Yields:
        A path of the same name in a hidden place beside it, at which the block has to write a file.

    Raises:
        TypeError: `target` is no path, or `overwrite` no bool.
        ValueError: `target` is a directory, or is there and `overwrite` is false.
        ResourceError: as of `staged_directory`.
    """
    path = resolve(target)
    check_flag("overwrite", overwrite)
    with _disk_errors(path):
        _check_file(path, overwrite)
    with _checked_workspace(path, needed_bytes) as work:
        staged = work / NEW / path.name
        with _full_disk_errors(path, needed_bytes):
            yield staged
        with _disk_errors(path):
            _settle(staged, path)
            os.replace(staged, path)
            sync(path.parent)


def resolve(target: str | os.PathLike) -> Path:
    """Return the absolute path that is written to: links are followed, and `~` is the home directory.

    Raises:
        TypeError: no path.
        ValueError: empty, or with a null character.
    """
    if not isinstance(target, str | os.PathLike):
        raise TypeError(f"path ({target!r}) must be a string or a path.")
    if not os.fspath(target) or "\0" in os.fsdecode(target):
        raise ValueError(f"path ({target!r}) must not be empty, nor hold a null character.")
    return Path(os.path.realpath(os.path.expanduser(os.fsdecode(target))))


@contextmanager
def _checked_workspace(path: Path, needed_bytes: int | None) -> Iterator[Path]:
    """Make the hidden directory where there is space for what comes."""
    with ExitStack() as stack:
        with _disk_errors(path):
            _check_free_space(path, needed_bytes)
            work = stack.enter_context(workspace(path))
        yield work


# Putting it in place


def _settle(staged: Path, path: Path) -> None:
    """Set the modes that the umask, or the target that is there, asks for, and write everything to the disk."""
    if not staged.exists():
        raise FileNotFoundError(errno.ENOENT, "nothing was written", str(staged))
    allowed = stat.S_IMODE(os.stat(staged.parent).st_mode)
    for directory, _, names in os.walk(staged, topdown=False):
        for file in (Path(directory, name) for name in names):
            _settle_file(file, allowed)
        sync(directory)
    if staged.is_file():
        _settle_file(staged, allowed)
    if path.exists():
        os.chmod(staged, stat.S_IMODE(os.stat(path).st_mode))
        sync(staged)


def _settle_file(file: Path, allowed: int) -> None:
    # Not what is linked from elsewhere: its mode is that of the other name, too.
    if os.stat(file).st_nlink == 1:
        os.chmod(file, allowed & 0o666)
    sync(file)


def _replace_directory(staged: Path, path: Path, work: Path) -> None:
    for _ in range(_ATTEMPTS):  # once, unless another saver puts something there, or takes it away, in between
        try:
            if not path.exists():
                os.rename(staged, path)
            elif not exchange(staged, path):
                _replace_in_two_steps(staged, path, work / OLD)
            sync(path.parent)
            return
        except OSError as error:
            if error.errno not in (*_NOT_EMPTY, errno.ENOENT) or not staged.exists():
                raise
    raise OSError(errno.EAGAIN, "other savers keep replacing the directory")


def _replace_in_two_steps(staged: Path, path: Path, old: Path) -> None:
    """Move the old directory away and the new one in; `workspace` moves it back when only the first has happened."""
    remove(old)  # of the last attempt, which somebody came between
    os.mkdir(old)
    os.rename(path, old / path.name)
    os.rename(staged, path)


# What can be wrong


def _check_directory(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path}: a file; expected a directory, or nothing. Save under another name.")
    if path.samefile(os.curdir) or path.is_mount():
        raise ValueError(
            f"{path}: the current directory or a mount point; expected a directory that can be replaced whole. Save to "
            "a directory inside it."
        )
    names = sorted(os.listdir(path))
    if names and not overwrite:
        raise ValueError(
            f"{path}: holds {listed(names)}; expected an empty directory, or nothing. Pass overwrite=True to replace "
            "the whole directory."
        )


def _check_file(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: a directory; expected a file, or nothing. Save under another name.")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: a device, a pipe or a socket; expected a file, or nothing. Save under another name.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: there is a file already. Pass overwrite=True to replace it.")


def _check_free_space(path: Path, needed_bytes: int | None) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed_bytes is not None and needed_bytes > free:
        raise ResourceError(
            f"{path}: needs {needed_bytes} bytes, and {free} are free on the disk. Free some, or save elsewhere."
        )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says to the operations of this file into a `ResourceError`."""
    try:
        yield
    except ResourceError:
        raise
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written: {error.strerror} (errno {error.errno}, {error.filename}). Nothing is "
            "half written. Saving needs write permission for the directory it is in."
        ) from error


@contextmanager
def _full_disk_errors(path: Path, needed_bytes: int | None) -> Iterator[None]:
    """Turn a full or failing disk into a `ResourceError`, whatever a library that writes makes of it."""
    try:
        yield
    except ResourceError:
        raise
    except Exception as error:
        code = _error_code(error)
        if code not in _FAILING:
            raise
        need = "" if needed_bytes is None else f" {needed_bytes} bytes are needed,"
        free = shutil.disk_usage(path.parent).free
        raise ResourceError(
            f"{path}: writing failed: {os.strerror(code)} (errno {code});{need} {free} bytes are free. What was there "
            "is as it was."
        ) from error


def _error_code(error: Exception) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _ERRNO.search(str(error))
    return int(found[1] or found[2]) if found else None
