"""Saves are whole or not there: a saver is stopped before each of its operations, and the disk fails at each."""

import errno
import io
import os
import stat
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest

from kllama.checkpoints.files import manifest, swap, workspace, writer
from kllama.checkpoints.files.workspace import MARKER, recover, refuse_interrupted
from kllama.checkpoints.files.writer import staged_directory, staged_file
from kllama.errors import CheckpointError, ResourceError

pytestmark = pytest.mark.backend_independent

OPERATIONS = ("mkdir", "open", "rename", "replace", "rmdir", "unlink", "chmod", "fsync")
OLD, NEW = {"a.txt": "old", "sub/b.txt": "old, too"}, {"a.txt": "new", "sub/c.txt": "new, too"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody cuts the power: what is said to be synced need not be."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


class Killed(BaseException):
    """Stands for the death of the process: no operation works after it."""


class Saver:
    """Stands for the operations of the system, of which the one of a given number fails.

    Args:
        fails_at: its number, counted from 1; None only counts.
        failure: what is raised. After `Killed` all operations fail.
        swaps: whether two directories can be exchanged in one step.
    """

    def __init__(self, fails_at: int | None, failure: BaseException | None, swaps: bool):
        self.fails_at, self.failure, self.swaps = fails_at, failure, swaps
        self.names, self.synced, self.opened = [], set(), []
        self.is_dead = False

    def __enter__(self):
        self._stack = ExitStack()
        for name in OPERATIONS:
            self._patch(os, name, self._counted(name, getattr(os, name)))
        self._patch(io, "open", self._counted("open", io.open))
        self._patch(writer, "exchange", self._counted("exchange", swap.exchange if self.swaps else lambda *_: False))
        self._patch(workspace, "fcntl", workspace.fcntl)
        return self

    def __exit__(self, *_):
        self._stack.close()
        for file in self.opened if self.is_dead else []:  # as the kernel does; with them go the locks
            try:
                os.close(file)
            except OSError:
                pass

    def _patch(self, module, name, replacement):
        self._stack.enter_context(mock.patch.object(module, name, replacement))

    def _counted(self, name, function):
        def run(*args, **kwargs):
            self.names.append(name)
            if self.is_dead or len(self.names) == self.fails_at:
                self.is_dead = isinstance(self.failure, Killed)
                raise self.failure
            if name in ("rename", "replace", "exchange"):
                self._check_synced(Path(args[0]), self.swaps or name != "exchange")
            result = function(*args, **kwargs)
            if name == "fsync":
                self.synced.add(os.fstat(args[0]).st_ino)
            if name == "open" and isinstance(result, int):
                self.opened.append(result)
            return result

        return run

    def _check_synced(self, staged: Path, happens: bool):
        """What takes a place must be on the disk: a power failure keeps nothing else."""
        if happens and staged.parent.name == "new":
            for path in (staged, *staged.rglob("*")):
                assert path.stat().st_ino in self.synced, path


def save(target: Path, files: dict, overwrite: bool = True) -> None:
    with staged_directory(target, overwrite) as staging:
        (staging / "sub").mkdir()
        for name, text in files.items():
            (staging / name).write_text(text)


def content(target: Path) -> dict | None:
    """The files of a directory that its manifest finds whole; None where there is none."""
    if not recover(target):
        return None
    return {name: (target / name).read_text() for name, _ in manifest.verify(target)}


def leftovers(target: Path) -> list[Path]:
    return [path for path in target.parent.iterdir() if path.name != target.name]


def refuses_leftovers(target: Path) -> None:
    for path in leftovers(target):
        for staged in path.glob("*/*"):
            with pytest.raises(CheckpointError, match="interrupted save"):
                refuse_interrupted(staged)


def count_operations(target: Path, swaps: bool, write=save) -> int:
    with Saver(None, None, swaps) as saver:
        write(target, NEW)
    return len(saver.names)


def every_operation(folder: Path, swaps: bool, old: dict | None, make_failure):
    """Save over `old` once for each operation of a save, which fails there; yield the target and the double."""
    (folder / "count").mkdir()
    if old is not None:
        save(folder / "count" / "target", old)
    total = count_operations(folder / "count" / "target", swaps)
    assert total > 15
    for number in range(1, total + 1):
        target = folder / str(number) / "target"
        target.parent.mkdir()
        if old is not None:
            save(target, old)
        with Saver(number, make_failure(), swaps) as saver, warnings.catch_warnings(record=True):
            try:
                save(target, NEW)
                raised = None
            except BaseException as error:
                raised = error
        yield target, saver, raised


# A saver dies


@pytest.mark.parametrize("swaps", [True, False], ids=["exchange", "two steps"])
@pytest.mark.parametrize("old", [None, OLD], ids=["new", "overwrite"])
def test_killed_before_each_operation(tmp_path, old, swaps):
    seen = []
    for target, _, raised in every_operation(tmp_path, swaps, old, Killed):
        assert isinstance(raised, Killed)
        refuses_leftovers(target)
        seen.append(content(target))
        assert seen[-1] in (old, NEW)
        save(target, OLD)
        assert content(target) == OLD and not leftovers(target)
    assert seen == sorted(seen, key=lambda files: files == NEW)  # the old one up to some operation, then the new one
    assert NEW in seen


@pytest.mark.parametrize("swaps", [True, False], ids=["exchange", "two steps"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_the_disk_fails_at_each_operation(tmp_path, code, swaps):
    for target, saver, raised in every_operation(tmp_path, swaps, OLD, lambda: OSError(code, os.strerror(code))):
        assert content(target) in (OLD, NEW)
        assert raised is None or isinstance(raised, ResourceError) and os.strerror(code) in str(raised)
        if "exchange" not in saver.names[: saver.fails_at - 1]:  # later it only tidies up
            assert raised is not None or saver.fails_at == 1  # the directory above is there already
            assert content(target) == (NEW if raised is None else OLD) and not leftovers(target)
        save(target, OLD)
        assert content(target) == OLD and not leftovers(target)


@pytest.mark.parametrize("swaps", [True, False], ids=["exchange", "two steps"])
def test_interrupted_at_each_operation(tmp_path, swaps):
    for target, _, raised in every_operation(tmp_path, swaps, OLD, KeyboardInterrupt):
        assert isinstance(raised, KeyboardInterrupt)
        assert content(target) in (OLD, NEW)


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError, SystemExit])
def test_an_error_while_writing_leaves_the_old_one_and_nothing_else(tmp_path, error):
    target = tmp_path / "target"
    save(target, OLD)
    with pytest.raises(error), staged_directory(target, overwrite=True) as staging:
        (staging / "a.txt").write_text("half")
        raise error
    assert content(target) == OLD and not leftovers(target)


def test_a_file_killed_before_each_operation(tmp_path):
    def write(target, text):
        with staged_file(target, overwrite=True) as path:
            path.write_text(text)

    total = count_operations(tmp_path / "file", True, lambda target, _: write(target, "x"))
    seen = []
    for number in range(1, total + 1):
        target = tmp_path / str(number) / "file.lora.h5"
        target.parent.mkdir()
        write(target, "old")
        with Saver(number, Killed(), True), pytest.raises(Killed):
            write(target, "new")
        seen.append(target.read_text())
        refuses_leftovers(target)
        write(target, "third")
        assert target.read_text() == "third" and not leftovers(target)
    assert set(seen) == {"old", "new"} and seen == sorted(seen, reverse=True)


# What a dead saver left


def dead_saver(target: Path, swaps: bool, last: str) -> None:
    """Let a saver die just before the last operation of some kind."""
    save(target.with_name("count"), OLD)
    with Saver(None, None, swaps) as saver:
        save(target.with_name("count"), NEW)
    number = max(i for i, name in enumerate(saver.names, 1) if name == last)
    with Saver(number, Killed(), swaps), pytest.raises(Killed):
        save(target, NEW)


def test_the_loader_moves_the_only_copy_back(tmp_path):
    target = tmp_path / "target"
    save(target, OLD)
    dead_saver(target, swaps=False, last="rename")
    assert not target.exists()
    assert recover(target)
    assert content(target) == OLD


def test_the_only_copy_cannot_be_moved_back(tmp_path, monkeypatch):
    target = tmp_path / "target"
    save(target, OLD)
    dead_saver(target, swaps=False, last="rename")
    monkeypatch.setattr(os, "rename", mock.Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(ResourceError, match="by hand") as caught:
        recover(target)
    old = next(target.parent.glob(".target.saving-*/old/target"))
    assert str(old) in str(caught.value)
    assert manifest.verify(old)


def test_a_save_without_overwrite_finds_it_first(tmp_path):
    target = tmp_path / "target"
    save(target, OLD)
    dead_saver(target, swaps=False, last="rename")
    with pytest.raises(ValueError, match="overwrite=True"):
        save(target, NEW, overwrite=False)
    assert content(target) == OLD


def test_what_a_live_saver_writes_stays(tmp_path):
    target = tmp_path / "target"
    with staged_directory(target) as first:
        (first / "a.txt").write_text("slow")
        save(target, NEW)
        assert (first / "a.txt").exists()
        assert content(target) == NEW
    assert content(target) == {"a.txt": "slow"} or content(target) == NEW


def test_nothing_there_to_recover(tmp_path):
    assert not recover(tmp_path / "target")
    assert not recover(tmp_path / "no" / "target")
    assert not recover(Path("a\0b"))
    assert not recover(tmp_path / ("x" * 300))


# Where it is written to


def test_a_directory_and_those_above_it(tmp_path):
    save(tmp_path / "a" / "b" / "target", NEW, overwrite=False)
    assert content(tmp_path / "a" / "b" / "target") == NEW


def test_an_empty_directory_is_nothing(tmp_path):
    (tmp_path / "target").mkdir(mode=0o700)
    save(tmp_path / "target", NEW, overwrite=False)
    assert content(tmp_path / "target") == NEW


def test_a_directory_that_is_not_empty(tmp_path):
    save(tmp_path / "target", OLD)
    with pytest.raises(ValueError, match=r"target: holds a\.txt, .*overwrite=True"):
        save(tmp_path / "target", NEW, overwrite=False)
    assert content(tmp_path / "target") == OLD and not leftovers(tmp_path / "target")


def test_a_link_stays(tmp_path):
    save(tmp_path / "disk" / "real", OLD)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    save(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "disk" / "real") == NEW


def test_a_link_to_nothing_yet(tmp_path):
    (tmp_path / "link").symlink_to("later")
    save(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "later") == NEW


def test_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(Path("~/target"), NEW)
    assert content(tmp_path / "target") == NEW


def test_the_current_directory(tmp_path, monkeypatch):
    save(tmp_path / "target", OLD)
    monkeypatch.chdir(tmp_path / "target")
    with pytest.raises(ValueError, match="current directory or a mount point"):
        save(Path("."), NEW)
    assert content(tmp_path / "target") == OLD


def test_a_mount_point(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "target")
    save_nothing = tmp_path / "target"
    save_nothing.mkdir()
    with pytest.raises(ValueError, match="mount point"):
        save(save_nothing, NEW)


@pytest.mark.parametrize("path", ["", "a\0b", 3, None])
@pytest.mark.parametrize("stage", [staged_directory, staged_file])
def test_no_path(path, stage):
    with pytest.raises((ValueError, TypeError), match=r"path \(.*must"), stage(path):
        pass


@pytest.mark.parametrize("name", ["x" * 256, "ä" * 128, "file/target", "file/a/target"])
def test_a_name_that_cannot_be(tmp_path, name):
    (tmp_path / "file").write_text("")
    for stage in (staged_directory, staged_file):
        with pytest.raises(ResourceError, match="cannot be written"), stage(tmp_path / name):
            raise AssertionError("nothing must be written in vain")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, ".", "a[b]*?{x}", "a\nb", " ", "-rf"])
def test_a_strange_name(tmp_path, name):
    target = tmp_path / "sub" / name
    if name == ".":
        target = tmp_path / "sub" / "." / "."
    save(target, OLD)
    save(target, NEW)
    assert content(target) == NEW


def test_a_file_in_place_of_a_directory_and_the_reverse(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "directory").mkdir()
    with pytest.raises(ValueError, match="a file; expected a directory"):
        save(tmp_path / "file", NEW)
    with pytest.raises(ValueError, match="a directory; expected a file"), staged_file(tmp_path / "directory", True):
        pass


# Files


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pipe_is_not_replaced(tmp_path, overwrite):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a device, a pipe or a socket"), staged_file(tmp_path / "pipe", overwrite):
        pytest.fail("nothing may be written")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_a_file_there_already(tmp_path):
    (tmp_path / "a.bin").write_text("old")
    with pytest.raises(ValueError, match="overwrite=True"), staged_file(tmp_path / "a.bin"):
        pass
    assert (tmp_path / "a.bin").read_text() == "old"
    with staged_file(tmp_path / "a.bin", overwrite=True) as path:
        assert path.name == "a.bin"
        path.write_text("new")
    assert (tmp_path / "a.bin").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_file_needs_its_directory(tmp_path):
    with pytest.raises(ResourceError, match="No such file or directory"), staged_file(tmp_path / "no" / "a.bin"):
        pass


def test_a_block_that_writes_no_file(tmp_path):
    with pytest.raises(ResourceError, match="nothing was written"), staged_file(tmp_path / "a.bin"):
        pass


# Space and modes


def test_too_little_space(tmp_path):
    for stage in (staged_directory, staged_file):
        with pytest.raises(ResourceError, match=r"needs 1\d{30} bytes, and \d+ are free"):
            with stage(tmp_path / "target", needed_bytes=10**30):
                raise AssertionError("nothing must be written in vain")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("message", ["write failed: errno = 28, error message = 'x'", "I/O error: x (os error 28)"])
def test_a_full_disk_as_libraries_tell_it(tmp_path, message):
    with pytest.raises(ResourceError, match=r"No space left.* 5 bytes are needed, \d+ bytes are free"):
        with staged_directory(tmp_path / "target", needed_bytes=5):
            raise RuntimeError(message)
    assert not os.listdir(tmp_path)


def test_another_error_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), staged_directory(tmp_path / "target"):
        raise FileNotFoundError(errno.ENOENT, "elsewhere")


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    with umask(mask):
        with staged_directory(tmp_path / "target") as staging:
            (staging / "sub").mkdir()
            for file in (staging / "a", staging / "sub" / "b"):
                file.touch(mode=0o600)  # as safetensors does
        with staged_file(tmp_path / "file") as path:
            path.touch(mode=0o600)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    files = dict.fromkeys(["a", "b", "file", manifest.NAME], 0o666 & ~mask)
    assert modes == {**files, "target": 0o777 & ~mask, "sub": 0o777 & ~mask}


def test_what_is_replaced_keeps_its_mode(tmp_path):
    save(tmp_path / "target", OLD)
    (tmp_path / "target").chmod(0o750)
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(0o640)
    save(tmp_path / "target", NEW)
    with staged_file(tmp_path / "file", overwrite=True) as path:
        path.touch()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"target": 0o750, "file": 0o640}


# The step itself


def test_exchange(tmp_path):
    save(tmp_path / "a", OLD)
    save(tmp_path / "b", NEW)
    if not swap.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system exchanges nothing")
    assert content(tmp_path / "a") == NEW and content(tmp_path / "b") == OLD
    with pytest.raises(FileNotFoundError):
        swap.exchange(tmp_path / "a", tmp_path / "c")


def test_a_system_that_cannot_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(swap, "_system_call", lambda: None)
    save(tmp_path / "target", OLD)
    save(tmp_path / "target", NEW)
    assert content(tmp_path / "target") == NEW and not leftovers(tmp_path / "target")


def test_without_locks_leftovers_stay_and_nothing_else_changes(tmp_path, monkeypatch):
    save(tmp_path / "target", OLD)
    dead_saver(tmp_path / "target", swaps=True, last="exchange")
    monkeypatch.setattr(workspace, "fcntl", None)
    save(tmp_path / "target", NEW)
    assert content(tmp_path / "target") == NEW
    assert [path for path in tmp_path.glob(f".target.saving-*/{MARKER}")]
