"""`kllama_manifest.json`: the size and the SHA-256 of every file of a directory that kllama saved, written last.

    {"format": 1, "kllama_version": "...", "files": {"assets/tokenizer/tokenizer.json": {"size": ..., "sha256": "..."}}}

It tells a directory that is as it was saved from one that was damaged or edited since. A directory without a manifest
is not checked, and a file that the manifest does not list is none of its business. `writer` writes it; the formats
check it when they open a directory, and `kllama verify` checks all of it.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import NamedTuple, TypeVar

from kllama import __version__
from kllama.checkpoints import progress
from kllama.checkpoints.files.reader import check_file, check_file_name, read_json, shown
from kllama.errors import CheckpointError, MissingFileError, ResourceError, UnsupportedError

T = TypeVar("T")

NAME = "kllama_manifest.json"
FORMAT = 1
_KEYS = {"format", "kllama_version", "files"}
_SHA256 = re.compile("[0-9a-f]{64}")
# These are hashed while they are being read; all others when a directory is opened.
_WEIGHTS = (".h5", ".safetensors", ".gguf", ".bin", ".pth")
_PIECE = 2**18
_ADVICE = (
    f"The save was interrupted, or the file was damaged or edited since. Save or download it again, delete {NAME} if "
    "the change was meant, or load it all the same with verify=False."
)


class SavedFile(NamedTuple):
    """What the manifest says of a file."""

    size: int
    sha256: str


# Writing


def write(directory: Path, known: Mapping[str, SavedFile] | None = None) -> None:
    """Write the manifest of a directory: of all files in it and below.

    Args:
        directory: the directory, complete but for the manifest.
        known: what is known of some files, by name; they are not read.
    """
    known = known or {}
    sizes = {name: (directory / name).stat().st_size for name in _list_files(directory) if name != NAME}
    hashes = _hash(directory, {name: size for name, size in sizes.items() if name not in known}, "computing checksums")
    files = {name: known[name] if name in known else SavedFile(size, hashes[name]) for name, size in sizes.items()}
    content = {
        "format": FORMAT,
        "kllama_version": __version__,
        "files": {name: saved._asdict() for name, saved in files.items()},
    }
    (directory / NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _list_files(directory: Path) -> list[str]:
    paths = [Path(folder, name) for folder, _, names in os.walk(directory) for name in names]
    return sorted(path.relative_to(directory).as_posix() for path in paths)


def _hash(directory: Path, sizes: Mapping[str, int], description: str) -> dict[str, str]:
    """Give the SHA-256 of files by name, and show the progress; their sizes are for that."""
    hashes = {name: hashlib.sha256() for name in sizes}
    pieces = ((name, piece) for name in sizes for piece in _pieces(directory / name))
    for name, piece in progress.track(pieces, description, sum(sizes.values()), size=lambda item: len(item[1])):
        hashes[name].update(piece)
    return {name: digest.hexdigest() for name, digest in hashes.items()}


# Reading


def read(directory: Path) -> dict[str, SavedFile] | None:
    """Return what the manifest of a directory says of each file, by name; None where there is no manifest.

    Raises:
        UnsupportedError: a manifest of a later version of kllama.
        CheckpointError: it is damaged, or names a file outside the directory.
    """
    path = directory / NAME
    if not os.path.lexists(path):
        return None
    content = read_json(path)
    version = content.get("format")
    if type(version) is int and version > FORMAT:
        raise UnsupportedError(
            f"{path}: format = {version}, written by kllama {shown(content.get('kllama_version'))}; expected {FORMAT}. "
            "Install a newer kllama."
        )
    if type(version) is not int or version != FORMAT or set(content) != _KEYS or not isinstance(content["files"], dict):
        raise CheckpointError(
            f"{path}: format = {shown(version)}, keys = {shown(sorted(content))}; expected {FORMAT}, {sorted(_KEYS)} "
            "and an object of files."
        )
    return {_checked_name(name, path): _saved_file(name, entry, path) for name, entry in content["files"].items()}


def _checked_name(name: str, path: Path) -> str:
    for part in name.split("/"):
        check_file_name(part, f"{path}: files[{shown(name)}]")
    return name


def _saved_file(name: str, entry: object, path: Path) -> SavedFile:
    if isinstance(entry, dict) and set(entry) == {"size", "sha256"}:
        size, sha256 = entry["size"], entry["sha256"]
        if type(size) is int and size >= 0 and isinstance(sha256, str) and _SHA256.fullmatch(sha256):
            return SavedFile(size, sha256)
    raise CheckpointError(
        f"{path}: files[{shown(name)}] = {shown(entry)}; expected a size in bytes and a sha256 of 64 digits."
    )


class Verification:
    """The comparison of a directory with its manifest, of which the weights are left for later.

    Args:
        directory: the directory.
        files: what its manifest says.

    Attributes:
        names: those of the files that the manifest lists.

    Raises:
        MissingFileError: a listed file is missing.
        CheckpointError: a size differs, or the SHA-256 of a file that holds no weights.
    """

    def __init__(self, directory: Path, files: Mapping[str, SavedFile]):
        self._files = {directory / name: saved for name, saved in files.items()}
        for file, saved in self._files.items():
            _check_size(file, saved, directory)
        self.names = frozenset(files)
        self._weights = [file for file in self._files if file.suffix in _WEIGHTS]
        for file in self._files.keys() - set(self._weights):
            _check_digest(file, self._files[file], _pieces(file))

    def during(self, items: Iterable[T]) -> Iterator[T]:
        """Iterate over items that are read from the weight files, and hash these files in a thread meanwhile.

        Raises:
            CheckpointError: after the last item: a weight file is not what was saved.
        """
        given_up = Event()
        with ThreadPoolExecutor(1, thread_name_prefix="kllama-verify") as threads:
            hashing = threads.submit(self._check_weights, given_up.is_set)
            try:
                yield from items
                hashing.result()
            finally:
                given_up.set()

    def _check_weights(self, is_given_up: Callable[[], bool]) -> None:
        for file in self._weights:
            _check_digest(file, self._files[file], _pieces(file), is_given_up)


def check(directory: Path, with_weights: bool = True) -> Verification | None:
    """Compare a directory with its manifest, where it has one, as far as that takes no reading of weights.

    Args:
        directory: the directory.
        with_weights: whether the weight files have to be there. A tokenizer does not need them.

    Returns:
        What compares the weights while they are being read; None where there is no manifest.

    Raises:
        MissingFileError: a listed file is missing.
        CheckpointError: the manifest is damaged, a size differs, or the SHA-256 of a file that holds no weights.
    """
    files = read(directory)
    if files is None:
        return None
    if not with_weights:
        files = {name: saved for name, saved in files.items() if not name.endswith(_WEIGHTS)}
    return Verification(directory, files)


def verify(directory: Path) -> list[tuple[str, int]]:
    """Compare every file of a directory with its manifest.

    Args:
        directory: the directory.

    Returns:
        (name, size in bytes) of each file that the manifest lists.

    Raises:
        MissingFileError: there is no manifest, or a listed file is missing.
        CheckpointError: the manifest is damaged, or a size or a SHA-256 differs.
    """
    files = read(directory)
    if files is None:
        raise MissingFileError(
            f"{directory}: no {NAME}; expected one, as kllama's saves have. Without it nothing can be verified.",
            str(directory / NAME),
        )
    for name, saved in files.items():
        _check_size(directory / name, saved, directory)
    hashes = _hash(directory, {name: saved.size for name, saved in files.items()}, "verifying")
    for name, saved in files.items():
        _compare(directory / name, saved, hashes[name])
    return [(name, saved.size) for name, saved in files.items()]


def _check_size(file: Path, saved: SavedFile, directory: Path) -> None:
    size = check_file(file, directory)
    if size != saved.size:
        raise CheckpointError(f"{file}: size = {size} bytes; expected {saved.size}, as in {NAME}. {_ADVICE}")


def _check_digest(
    file: Path, saved: SavedFile, pieces: Iterable[memoryview], is_given_up: Callable[[], bool] = lambda: False
) -> None:
    digest = hashlib.sha256()
    for piece in pieces:
        if is_given_up():
            return
        digest.update(piece)
    _compare(file, saved, digest.hexdigest())


def _compare(file: Path, saved: SavedFile, sha256: str) -> None:
    if sha256 != saved.sha256:
        raise CheckpointError(f"{file}: checksum mismatch: {sha256}; expected {saved.sha256}, as in {NAME}. {_ADVICE}")


def _pieces(file: Path) -> Iterator[memoryview]:
    """Yield a file piece by piece, each in the memory of the one before: fresh memory would cost half as much again."""
    memory = memoryview(bytearray(_PIECE))
    try:
        with open(file, "rb", buffering=0) as opened:
            while size := opened.readinto(memory):
                yield memory[:size]
    except (OSError, MemoryError) as error:
        raise ResourceError(f"{file}: reading failed: {error}") from error
