"""Bounded, strict reads of files that strangers wrote: JSON and safetensors.

It decides whether a file may be read, how much of it, and whether its structure is sound; every complaint names the
file. It knows nothing of models: what a field or a tensor means is for its callers, the formats of this folder.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from kllama.checkpoints.files.positioned_reads import read_array
from kllama.errors import CheckpointError, MissingFileError, ResourceError, UnsupportedError

JSON_LIMIT = 16 * 2**20
JSON_DEPTH = 64
LISTED = 10
FLOAT_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}

_UNITS = ("B", "kB", "MB", "GB", "TB")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST_HEADER = 100_000_000  # bytes: the library refuses more
_LONGEST_INTEGER = 64  # digits; tokenizer_config.json writes "no limit" as an integer of 31
# A string (closed or not, so that the scan stays linear) or one bracket.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


def shown(value: object) -> str:
    """Return a value from a file as JSON, cut to a length that suits a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(items: Iterable[str], separator: str = ", ") -> str:
    """Join the first ten items, and say how many more there are."""
    items = list(items)
    more = [f"and {len(items) - LISTED} more"] if len(items) > LISTED else []
    return separator.join(items[:LISTED] + more)


def size_text(num_bytes: int) -> str:
    """Write a number of bytes for people, in powers of 1000."""
    unit = min(max(len(str(num_bytes)) - 1, 0), 3 * len(_UNITS) - 1) // 3
    return f"{num_bytes / 1000**unit:.{0 if unit == 0 else 1}f} {_UNITS[unit]}"


def check_file_name(name: object, field: str) -> str:
    """Return `name` if it is a plain file name: nothing that could lead out of the directory.

    Args:
        name: what the file says, of any JSON type.
        field: the file and field it was found in, for the message.

    Raises:
        CheckpointError: not a string, empty, a path, `.` or `..`, unprintable (NUL), or longer than 255 bytes.
    """
    plain = isinstance(name, str) and name.isprintable() and not re.search(r"[/\\:]", name)
    if not plain or name in ("", ".", "..") or len(name.encode()) > 255:
        raise CheckpointError(f"{field} = {shown(name)}; expected a plain file name inside the model directory.")
    return name


def check_file(path: Path, directory: Path | None = None) -> int:
    """Return the size in bytes of a regular file that really lies in a directory, or below it.

    A snapshot of a Hugging Face hub cache links to the blob store beside it (`snapshots/<revision>/x` to
    `blobs/<hash>`); no other link out of the directory is followed.

    Args:
        path: the file.
        directory: where it has to lie. Defaults to the file's own directory.

    Raises:
        MissingFileError: nothing is there.
        CheckpointError: a link to the outside, a directory, a pipe, a device, or unreadable.
    """
    try:
        directory = Path(os.path.realpath(directory or path.parent, strict=True))
        real = Path(os.path.realpath(path, strict=True))
        status = real.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"{path}: the file does not exist.", str(path)) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}, errno {error.errno}).") from error
    snapshots = next((folder for folder in directory.parents if folder.name == "snapshots"), None)
    blobs = snapshots.parent / "blobs" if snapshots else directory
    if not real.is_relative_to(directory) and real.parent != blobs:
        raise CheckpointError(f"{path}: a link to {real}; expected a file inside {directory}.")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file ({stat.filemode(status.st_mode)}).")
    return status.st_size


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict:
    """Read a JSON object, strictly.

    Args:
        path: the file; see `check_file` for what may stand there.
        limit: the largest size in bytes that is read.

    Returns:
        The object, with finite numbers only.

    Raises:
        MissingFileError: nothing is there.
        CheckpointError: too large, not UTF-8, a byte order mark, not JSON, nested deeper than 64, a key given twice, a
            number that is not finite, or not an object.
    """
    text = read_text(path, limit)
    _check_depth(path, text)
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _object(path, pairs), parse_int=_parse_integer)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: top level = {shown(content)}; expected an object.")
    return content


def read_text(path: Path, limit: int) -> str:
    """Read a file of UTF-8 text.

    Args:
        path: the file; see `check_file` for what may stand there.
        limit: the largest size in bytes that is read.

    Raises:
        MissingFileError: nothing is there.
        CheckpointError: empty, too large, a Git LFS pointer, a byte order mark, or not UTF-8.
    """
    return _decode(path, read_bytes(path, limit))


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a whole file that is small; arguments and errors are those of `read_text`."""
    size = check_file(path)
    if size > limit:
        raise CheckpointError(f"{path}: size = {size} bytes; expected at most {limit}.")
    data = _read_bytes(path, 0, limit)
    _refuse_placeholder(path, data)
    return data


def check_finite(array: np.ndarray, field: str) -> None:
    """Refuse NaN and infinity: both have all exponent bits set, and bfloat16 needs no cast to see it.

    Args:
        array: float32, float16 or bfloat16, any shape.
        field: the file and tensor, for the message.

    Raises:
        CheckpointError: naming `field` and the number of such values.
    """
    info = ml_dtypes.finfo(array.dtype)
    bits = array.reshape(-1).view(f"<u{array.itemsize}")
    exponent = bits.dtype.type((2 ** int(info.nexp) - 1) << int(info.nmant))
    # In pieces that stay in the processor's cache: no second copy of a large tensor, and three times as fast.
    pieces = (bits[i : i + 2**16] for i in range(0, bits.size, 2**16))
    count = sum(np.count_nonzero((piece & exponent) == exponent) for piece in pieces)
    if count:
        raise CheckpointError(f"{field} = NaN or infinity in {count} of {array.size} values; expected finite numbers.")


class StoredTensor(NamedTuple):
    """Where and how a safetensors file stores one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class SafetensorsFile:
    """One `.safetensors` file: what it holds at once, its tensors one at a time.

    The structure (header, offsets without holes or overlap, sizes) is checked by the safetensors library. Tensors are
    read with positioned reads instead of its memory map, so a file that shrinks meanwhile is an error, not a SIGBUS.

    Args:
        path: the file; see `check_file` for what may stand there.

    Attributes:
        path: the same.
        tensors: `StoredTensor` by name; dtypes are those of the format: "F32", "BF16", "I8", ...

    Raises:
        MissingFileError: nothing is there.
        CheckpointError: empty, a Git LFS pointer, truncated or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        check_file(path)
        _refuse_placeholder(path, _read_bytes(path, 0, 512))
        header_size = min(int.from_bytes(_read_bytes(path, 0, 8), "little"), _LARGEST_HEADER)
        head = _read_bytes(path, 0, 8 + header_size)
        try:
            with safe_open(path, framework="numpy"):
                is_checked = head == _read_bytes(path, 0, 8 + header_size)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a complete safetensors file ({error}). Download it again.") from error
        if not is_checked:  # by the library, which reads the file itself
            raise CheckpointError(f"{path}: the file changed while it was opened. Open it again.")
        header = json.loads(head[8:], object_pairs_hook=lambda pairs: _object(path, pairs))
        header.pop("__metadata__", None)
        self.tensors = {name: self._stored_tensor(name, entry, 8 + header_size) for name, entry in header.items()}

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in its stored float dtype and shape; its values may be anything.

        Raises:
            UnsupportedError: the tensor is not stored as F32, F16 or BF16.
            CheckpointError: the file has become shorter.
            ResourceError: no memory, or the disk failed.
        """
        stored = self.tensors[name]
        if stored.dtype not in FLOAT_DTYPES:
            raise UnsupportedError(f"{self.path}: {name} = {stored.dtype}; expected {', '.join(FLOAT_DTYPES)}.")
        data = read_array(self.path, name, stored.start, np.uint8, stored.num_bytes)
        return data.view(FLOAT_DTYPES[stored.dtype]).reshape(stored.shape)

    def _stored_tensor(self, name: str, entry: object, data_start: int) -> StoredTensor:
        if not isinstance(entry, dict):  # the library also takes the three fields as a list
            raise CheckpointError(f"{self.path}: {shown(name)} = {shown(entry)}; expected an object.")
        begin, end = entry["data_offsets"]
        return StoredTensor(entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)


def _read_bytes(path: Path, start: int, size: int) -> bytes:
    """Read at most `size` bytes from `start`."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)
    except (OSError, MemoryError) as error:
        raise ResourceError(f"{path}: reading {size} bytes at {start} failed: {error}") from error


def _refuse_placeholder(path: Path, head: bytes) -> None:
    if not head:
        raise CheckpointError(f"{path}: the file is empty. Download it again.")
    if head.startswith(_LFS_POINTER):
        digest = re.search(rb"sha256:[0-9a-f]+", head)
        name = digest[0].decode() if digest else "no sha256"
        raise CheckpointError(f"{path}: a Git LFS pointer ({name}), not the file itself. Run `git lfs pull`.")


def _decode(path: Path, data: bytes) -> str:
    if data.startswith(b"\xef\xbb\xbf"):
        raise CheckpointError(f"{path}: line 1, column 1: a byte order mark; expected plain UTF-8.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _place(data[: error.start].decode("utf-8"))
        raise CheckpointError(f"{path}: {place}: byte 0x{data[error.start]:02x}; expected UTF-8.") from error


def _check_depth(path: Path, text: str) -> None:
    """Refuse deep nesting before the parser, which would recurse, sees it."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        depth += (match[0] in "[{") - (match[0] in "]}")
        if depth > JSON_DEPTH:
            raise CheckpointError(f"{path}: {_place(text[: match.start()])}: nesting > {JSON_DEPTH}.")


def _place(before: str) -> str:
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def _parse_integer(text: str) -> int | float:
    return int(text) if len(text) <= _LONGEST_INTEGER else math.inf


def _object(path: Path, pairs: list[tuple[str, object]]) -> dict:
    content = {}
    for key, value in pairs:
        if key in content:
            raise CheckpointError(f"{path}: the key {shown(key)} stands twice in one object.")
        if not _is_finite(value):
            name = shown(key).strip('"')  # on one line, whatever is in it
            raise CheckpointError(f"{path}: {name} = {shown(value)}; expected finite numbers.")
        content[key] = value
    return content


def _is_finite(value: object) -> bool:
    """Whether a number, or every number in a list, is finite; objects were checked when they were built."""
    if isinstance(value, list):
        return all(_is_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)
