"""The header of one GGUF file: metadata, and where each tensor lies.

Every count, length and offset is compared with the bytes that are left before anything is allocated or counted through,
so the cost of a hostile file is bounded by its size. What the metadata mean, and the tensors' values, are not for this
file; `file.py` calls it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from kllama.checkpoints.files.reader import check_file, shown
from kllama.errors import CheckpointError, ResourceError, UnsupportedError

MAGIC = b"GGUF"
# What llama.cpp wrote before August 2023: "ggml", "ggmf" and "ggjt" in the order of a little-endian machine.
OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg")
VERSIONS = (2, 3)
MAX_ENTRIES = 2**16  # of metadata, and of tensors
MAX_STRING = 16 * 2**20
MAX_NAME = 255
MAX_HEADER = 64 * 2**20
MAX_STRINGS = 2**21  # in all arrays together: a quarter of a million tokens come with half a million merges
MAX_ALIGNMENT = 2**20
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class GgmlType(NamedTuple):
    """How values are stored: in blocks of so many, each of so many bytes."""

    name: str
    block: int
    num_bytes: int


# fmt: off
GGML_TYPES = {number: GgmlType(*row) for number, row in {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}.items()}
"""The types of tensors that are read, by their numbers in the file."""

_OTHER_TYPES = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 40: "NVFP4", 41: "Q1_0"}
# fmt: on

_NUMBERS = {
    number: np.dtype(name)
    for number, name in enumerate("u1 i1 <u2 <i2 <u4 <i4 <f4 bool str list <u8 <i8 <f8".split())
    if name not in ("bool", "str", "list")
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LEAST_ENTRY = 8 + 1 + 4 + 1  # bytes of an entry of metadata: a key of one letter, and a byte
_LEAST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # bytes that describe a tensor: a name of one letter, and one axis


class GgufTensor(NamedTuple):
    """Where and how a tensor is stored.

    Attributes:
        file: the file, one of several where a model is split.
        type: a name of `GGML_TYPES`.
        shape: as NumPy has it, (out, in) for a matrix; the file lists the axes from the last to the first.
        start: place of the first byte in the file.
        num_bytes: how many there are.
    """

    file: Path
    type: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class GgufHeader(NamedTuple):
    """What a file says before its tensors.

    Attributes:
        metadata: by key: int, float, bool, str, a list of str, or an array of numbers.
        tensors: `GgufTensor` by name.
    """

    metadata: dict[str, object]
    tensors: dict[str, GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a file.

    Raises:
        MissingFileError: nothing is there.
        CheckpointError: truncated, damaged, or no GGUF file.
        UnsupportedError: another version, a file of a big-endian machine, or a type of tensor that is not read.
        ResourceError: the disk failed.
    """
    size = check_file(path)
    try:
        with open(path, "rb") as file:
            return _read_header(_Reader(file, path, size), size)
    except OSError as error:
        raise ResourceError(f"{path}: reading the header failed: {error}.") from error


def _read_header(reader: "_Reader", size: int) -> GgufHeader:
    _check_magic(reader.take(4, "magic") if size >= 4 else b"", reader, size)
    _check_version(reader.integer("<u4", "version"), reader.path)
    num_tensors, num_entries = reader.integer("<u8", "number of tensors"), reader.integer("<u8", "number of keys")
    for name, count, least in (("tensors", num_tensors, _LEAST_TENSOR), ("keys", num_entries, _LEAST_ENTRY)):
        most = min(MAX_ENTRIES, reader.left // least)
        if count > most:
            raise reader.error(f"number of {name}", count, f"at most {most}")
    metadata = {}
    for _ in range(num_entries):
        key = reader.name(f"key {len(metadata)}", metadata)
        metadata[key] = reader.value(reader.integer("<u4", key), key)
    alignment = _alignment(metadata, reader)
    tensors = {}
    for _ in range(num_tensors):
        name = reader.name(f"tensor {len(tensors)}", tensors)
        tensors[name] = _read_tensor(reader, name)
    return GgufHeader(metadata, _placed(tensors, reader, alignment, size))


def _check_magic(magic: bytes, reader: "_Reader", size: int) -> None:
    if magic == MAGIC:
        return
    if magic in OLD_MAGICS:
        raise UnsupportedError(
            f"{reader.path}: magic = {magic[::-1].decode()!r}, a format older than GGUF; expected GGUF. Convert the "
            "original weights again with a newer llama.cpp."
        )
    if not size:
        raise CheckpointError(f"{reader.path}: the file is empty. Download it again.")
    if (magic + reader.take(min(reader.left, 64), "magic")).startswith(_LFS_POINTER):
        raise CheckpointError(f"{reader.path}: a Git LFS pointer, not the file itself. Run `git lfs pull`.")
    raise CheckpointError(
        f"{reader.path}: first bytes = {magic!r}; expected {MAGIC!r}, a GGUF file. Download it again."
    )


def _check_version(version: int, path: Path) -> None:
    if version in VERSIONS:
        return
    if version and not version % 2**16:
        raise UnsupportedError(
            f"{path}: version = {version}, that of a big-endian machine; expected a little-endian file. Convert it "
            "with `gguf_convert_endian.py` of llama.cpp."
        )
    raise UnsupportedError(
        f"{path}: version = {version}; expected 2 or 3. Convert the original weights again with a newer llama.cpp."
    )


def _alignment(metadata: dict, reader: "_Reader") -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise reader.error("general.alignment", alignment, f"a power of two up to {MAX_ALIGNMENT}")
    return alignment


def _read_tensor(reader: "_Reader", name: str) -> GgufTensor:
    """Read the description of a tensor; `start` counts from the data section, as in the file."""
    num_dims = reader.integer("<u4", name)
    if not 1 <= num_dims <= MAX_DIMS:
        raise reader.error(f"number of axes of {shown(name)}", num_dims, f"1 to {MAX_DIMS}")
    dims = [reader.integer("<u8", name) for _ in range(num_dims)]
    if 0 in dims:
        raise reader.error(f"axes of {shown(name)}", dims, "lengths of at least 1")
    number = reader.integer("<u4", name)
    if number not in GGML_TYPES:
        kind, supported = _OTHER_TYPES.get(number, number), ", ".join(kind.name for kind in GGML_TYPES.values())
        raise UnsupportedError(f"{reader.path}: type of {shown(name)} = {kind}; expected one of {supported}.")
    kind = GGML_TYPES[number]
    if dims[0] % kind.block:
        raise reader.error(
            f"axes of {shown(name)}", dims, f"the first a multiple of {kind.block}, a block of {kind.name}"
        )
    num_bytes = math.prod(dims) // kind.block * kind.num_bytes
    return GgufTensor(reader.path, kind.name, tuple(reversed(dims)), reader.integer("<u8", name), num_bytes)


def _placed(tensors: dict[str, GgufTensor], reader: "_Reader", alignment: int, size: int) -> dict[str, GgufTensor]:
    """Count the starts from the beginning of the file, and check that the tensors lie in it beside each other."""
    data_start = -(-reader.at // alignment) * alignment
    placed = {name: tensor._replace(start=data_start + tensor.start) for name, tensor in tensors.items()}
    end = data_start
    for name, tensor in sorted(placed.items(), key=lambda item: item[1].start):
        if tensor.start % alignment or tensor.start < end:
            expected = f"a multiple of {alignment} that no other tensor reaches over"
            raise reader.error(f"offset of {shown(name)}", tensor.start - data_start, expected)
        end = tensor.start + tensor.num_bytes
        if end > size:
            raise CheckpointError(
                f"{reader.path}: end of {shown(name)} = {end}; expected at most {size}, the size of the file. "
                "Download it again."
            )
    return placed


class _Reader:
    """Reads one value after the other, none beyond the end of the header's bytes.

    Attributes:
        path: the file, for messages.
        at: how many bytes have been read.
    """

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.path = path
        self.at = 0
        self._file = file
        self._size = min(size, MAX_HEADER)
        self._strings_left = MAX_STRINGS

    @property
    def left(self) -> int:
        """How many bytes are left of the file, or of what a header may take."""
        return self._size - self.at

    def error(self, what: str, received: object, expected: str) -> CheckpointError:
        """Return the error for a value that cannot be."""
        text = shown(received) if isinstance(received, int | float | str | list) else type(received).__name__
        return CheckpointError(f"{self.path}: {what} = {text}; expected {expected}. Download the file again.")

    def take(self, count: int, what: str) -> bytes:
        """Return the next bytes."""
        if count > self.left:
            raise self.error(f"bytes of {shown(what)}", count, f"at most {self.left}, all that are left")
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self.path}: the file became shorter while it was read. Open it again.")
        self.at += count
        return data

    def integer(self, dtype: str, what: str) -> int:
        """Return an unsigned integer."""
        return int.from_bytes(self.take(int(dtype[-1]), what), "little")

    def string(self, what: str, limit: int = MAX_STRING) -> str:
        """Return a text, which has its length before it."""
        length = self.integer("<u8", what)
        if length > limit:
            raise self.error(f"length of {shown(what)}", length, f"at most {limit}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"byte of {shown(what)}", error.object[error.start], "UTF-8") from error

    def name(self, what: str, others: dict) -> str:
        """Return a key, or the name of a tensor: a short text that stands once."""
        name = self.string(what, MAX_NAME)
        if not name or "\0" in name or name in others:
            raise self.error(what, name, "a name that is not empty and stands once")
        return name

    def value(self, kind: int, key: str) -> object:
        """Return a value of metadata."""
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self._array(key)
        return self._numbers(kind, 1, key)[0].item()

    def _array(self, key: str) -> list[str] | np.ndarray:
        kind, count = self.integer("<u4", key), self.integer("<u8", key)
        if kind != _STRING:
            return self._numbers(kind, count, key)
        most = min(self._strings_left, self.left // 8)
        if count > most:
            raise self.error(f"number of texts in {shown(key)}", count, f"at most {most}")
        self._strings_left -= count
        return [self.string(key) for _ in range(count)]

    def _numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        if kind not in _NUMBERS and kind != _BOOL:
            allowed = "a number, 0 to 7 or 10 to 12, a text, 8, or an array of these, 9"
            raise self.error(f"type of {shown(key)}", kind, allowed)
        dtype = _NUMBERS.get(kind, np.dtype("u1"))
        values = np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        if kind != _BOOL:
            return values
        if np.any(values > 1):
            raise self.error(key, int(values.max()), "0 or 1, as a bool")
        return values.view(bool)


def starts_like_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does, or as one of the formats before it; a missing file does not."""
    if not path.is_file():  # a pipe would wait for its other end
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) in (MAGIC, *OLD_MAGICS)
    except OSError:
        return False
