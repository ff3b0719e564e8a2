"""The hidden directory beside a target, in which `writer` prepares what will take the target's place.

    .NAME.saving-1f0c83a2/       beside NAME, on the same file system
        save.incomplete          locked by the saver while it lives; the last thing to go
        new/NAME                 what is being written; after the exchange, what NAME was before
        old/NAME                 only where two directories cannot be exchanged in one step: NAME, for a moment

What a dead saver left is removed by the next save to the same target, except the only copy of what was there: that is
moved back.
"""

import errno
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kllama.errors import CheckpointError, ResourceError

try:
    import fcntl
except ImportError:  # Windows: nobody can tell a dead saver from a live one, so nothing of theirs is removed
    fcntl = None

MARKER = "save.incomplete"
NEW, OLD = "new", "old"
_LONGEST_NAME = 200  # bytes of NAME in the name of the hidden directory; a name has 255 at most
_ATTEMPTS = 100


@contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """Make the hidden directory beside a target, and remove it at the end, whatever is in it then.

    Args:
        path: the target, absolute and without links.

    Raises:
        OSError: it cannot be made.
    """
    _remove_leftovers(path)
    work, lock = _make(path)
    try:
        os.mkdir(work / NEW)
        yield work
    finally:
        _discard(work, lock, path)


def refuse_interrupted(path: Path) -> None:
    """Refuse what a saver is writing, or a dead saver left.

    Raises:
        CheckpointError: `path` is a hidden directory of a save that has not come to its end, or is in one.
    """
    real = Path(os.path.realpath(path))
    if any((directory / MARKER).exists() for directory in (real, *real.parents[:2])):
        raise CheckpointError(
            f"{path}: {MARKER} = found; expected none. An interrupted save left this directory. Load the one that was "
            "saved to, or save again."
        )


def recover(path: Path) -> bool:
    """Move a directory back that a dead saver had moved away, where the system could not exchange directories.

    Args:
        path: of what is missing.

    Returns:
        Whether it is there now.

    Raises:
        ResourceError: it could not be moved; the message says where it is.
    """
    try:
        path = Path(os.path.realpath(path))
    except (OSError, ValueError):  # what cannot be a path at all
        return False
    moved_away = [old for work in _list(path) if (old := work / OLD / path.name).exists()]
    if moved_away:
        _wait_for(path)
    for old in moved_away:
        with _left_behind(old.parents[1]) as is_dead:
            if is_dead and old.exists() and not path.exists():
                _move_back(old, path)
    return os.path.exists(path)  # which is false for a name that is too long, where Path.exists raises


def sync(path: str | os.PathLike) -> None:
    """Write a file, or the names in a directory, to the disk."""
    if os.path.isdir(path) and os.name != "posix":  # Windows cannot open a directory
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove(directory: Path) -> None:
    """Remove a directory with all that is in it; somebody else may be doing the same."""
    shutil.rmtree(directory, onerror=_unless_missing)


def _unless_missing(function, path, failure):
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


def _list(path: Path) -> list[Path]:
    """List the hidden directories beside a target, of live and of dead savers."""
    try:
        names = os.listdir(path.parent)
    except OSError:  # then there are none
        return []
    return [path.with_name(name) for name in sorted(names) if name.startswith(_prefix(path))]


def _prefix(path: Path) -> str:
    name = os.fsencode(path.name)[:_LONGEST_NAME].decode(errors="ignore")
    return f".{name}.saving-"


def _make(path: Path) -> tuple[Path, int]:
    """Make and lock a hidden directory; one that a neighbour takes for a leftover before it is locked is given up."""
    for _ in range(_ATTEMPTS):
        work = path.with_name(_prefix(path) + secrets.token_hex(4))
        os.mkdir(work)
        try:
            lock = os.open(work / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            continue
        except OSError:
            os.rmdir(work)
            raise
        if _lock(lock) is not False and _is_at(lock, work / MARKER):
            return work, lock
        os.close(lock)
    raise OSError(errno.EAGAIN, "other savers keep removing the hidden directory", str(path.parent))


def _lock(file: int) -> bool | None:
    """Lock an open file: True if that worked, False if another process has it, None if nothing can be locked here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _left_behind(work: Path) -> Iterator[bool]:
    """Tell whether the saver of a hidden directory is dead, and keep others from it meanwhile."""
    try:
        lock = os.open(work / MARKER, os.O_RDWR)
    except FileNotFoundError:  # about to be marked, or all but removed
        yield False
        return
    try:
        yield _lock(lock) is True and _is_at(lock, work / MARKER)
    finally:
        os.close(lock)


def _remove_leftovers(path: Path) -> None:
    for work in _list(path):
        try:
            with _left_behind(work) as is_dead:
                if is_dead:
                    _empty(work, path)
            if not (work / MARKER).exists():
                os.rmdir(work)  # which fails unless it is empty
        except OSError:  # somebody else's, or somebody else was quicker: the save does not depend on it
            continue


def _discard(work: Path, lock: int, path: Path) -> None:
    try:
        try:
            _empty(work, path)
        finally:
            os.close(lock)  # before the directory goes: on NFS an open file stays in it
        os.rmdir(work)
    except OSError as error:
        warnings.warn(f"{work}: could not be removed ({error}). Remove it by hand.", stacklevel=2)


def _empty(work: Path, path: Path) -> None:
    """Remove what is in a hidden directory, unless it is the only copy; as long as anything is, its marker is."""
    if (work / OLD / path.name).exists() and not path.exists():
        _move_back(work / OLD / path.name, path)
    remove(work / NEW)
    remove(work / OLD)
    (work / MARKER).unlink(missing_ok=True)


def _move_back(old: Path, path: Path) -> None:
    try:
        os.rename(old, path)
        sync(path.parent)
    except OSError as error:
        raise ResourceError(
            f"{path}: a save was interrupted, and what was there is now {old}; moving it back failed: "
            f"{error.strerror}. Move it back by hand."
        ) from error


def _wait_for(path: Path, seconds: float = 0.2) -> None:
    """Give a live saver the moment that it needs between moving the old directory away and the new one in."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
