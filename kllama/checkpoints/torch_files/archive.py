"""A file that `torch.save` wrote, `.pth` or `pytorch_model.bin`: what it holds at once, its tensors one at a time.

PyTorch is not needed, and nothing of the file is run: `stored_zip.py` finds the members of the archive,
`program.py` what they mean. Here the two are compared, and a tensor's numbers are read where they lie. The format
before PyTorch 1.6, which is no zip file, is refused, and so is a program of TorchScript. Called by the formats of this
folder, in the place of `SafetensorsFile`.
"""

import math
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kllama.checkpoints.files.positioned_reads import read_array, read_bytes_at
from kllama.checkpoints.files.reader import FLOAT_DTYPES, check_file, listed, shown
from kllama.checkpoints.torch_files.program import ITEM_SIZES, PickledTensor, Storage, read_tensors
from kllama.checkpoints.torch_files.stored_zip import Member, read_members
from kllama.errors import CheckpointError, UnsupportedError

PICKLE_LIMIT = 2**20  # 8000 tensors; those of a model of 126 layers take 150 kB
MOST_AXES = 8

_PROGRAM, _BYTE_ORDER, _VERSION, _STORAGE = "data.pkl", "byteorder", "version", "data/"
# How the archive is laid out, and an id by which PyTorch counts saves: none of it says anything of the numbers.
_IGNORED = (".format_version", ".storage_alignment", ".data/serialization_id")
_VERSIONS = re.compile(rb"([1-9]|10)\n?")
_OLD_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_PIECE = 2**24  # bytes of which a checksum is computed at once


class ArchivedTensor(NamedTuple):
    """Where and how an archive stores one tensor.

    Attributes:
        dtype: as safetensors spells it: "F32", "F16", "BF16", ...
        shape: its shape.
        num_bytes: of its numbers.
        start: where in the file the first of them lies.
        strides: how many numbers further the next one along each axis lies; 0 for an axis of 1.
        member: the member of the archive that holds them.
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    start: int
    strides: tuple[int, ...]
    member: Member

    @property
    def span(self) -> int:
        """How many numbers lie from the first to the last of the tensor, those between that are not its own, too."""
        return _span(self.shape, self.strides)


class TorchArchive:
    """One file of `torch.save`, in the zip format.

    Args:
        path: the file; see `reader.check_file` for what may stand there.

    Attributes:
        path: the same.
        tensors: `ArchivedTensor` by name. Several may share their numbers.

    Raises:
        MissingFileError: nothing is there.
        UnsupportedError: a file of another kind that PyTorch writes, or tensors of a kind that kllama does not read.
        CheckpointError: anything else, or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self._checked: set[Member] = set()
        _refuse_other_kinds(path)
        members = self._without_folder(read_members(path))
        self._check_layout(members)
        program = self._read_member(members, _PROGRAM, PICKLE_LIMIT)
        tensors = read_tensors(program, str(path))
        self.tensors = {name: self._place(name, tensor, members) for name, tensor in tensors.items()}
        self._check_members(members, {tensor.storage for tensor in tensors.values()})

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in its stored float dtype and shape; its values may be anything.

        Raises:
            UnsupportedError: the tensor is not stored as F32, F16 or BF16.
            CheckpointError: the bytes are not those that were saved, or the file has become shorter.
            ResourceError: no memory, or the disk failed.
        """
        return self.read_rows(name, 0, None)

    def read_rows(self, name: str, first: int, end: int | None) -> np.ndarray:
        """Return `read(name)[first:end]`, reading no more than that.

        The bytes are compared with their checksum when the whole of a tensor is read.
        """
        stored = self.tensors[name]
        if stored.dtype not in FLOAT_DTYPES:
            raise UnsupportedError(f"{self.path}: {name} = {stored.dtype}; expected {', '.join(FLOAT_DTYPES)}.")
        dtype, rows = FLOAT_DTYPES[stored.dtype], stored
        if end is not None:
            start = stored.start + first * stored.strides[0] * dtype.itemsize
            rows = stored._replace(start=start, shape=(end - first, *stored.shape[1:]))
        data = read_array(self.path, name, rows.start, np.uint8, rows.span * dtype.itemsize)
        if end is None:
            self._check_bytes(name, stored, data)
        strides = [stride * dtype.itemsize for stride in rows.strides]
        return np.ndarray(rows.shape, dtype, data, strides=strides)

    def _check_bytes(self, name: str, stored: ArchivedTensor, data: np.ndarray) -> None:
        """Compare the member of a tensor with its checksum, if that was not done before."""
        member = stored.member
        if member in self._checked or member.checksum == 0:
            return
        checksum, at = 0, 0
        if data.size == member.size:
            checksum, at = zlib.crc32(data), member.size
        while at < member.size:  # the tensor is a part of it
            piece = read_bytes_at(self.path, name, member.start + at, min(_PIECE, member.size - at))
            checksum, at = zlib.crc32(piece, checksum), at + len(piece)
        if checksum != member.checksum:
            raise CheckpointError(
                f"{self.path}: {name}: CRC-32 = {checksum:08x}; expected {member.checksum:08x}, as it was saved. "
                "Download it again."
            )
        self._checked.add(member)

    def _without_folder(self, members: dict[str, Member]) -> dict[str, Member]:
        """Take off the name of the folder that all members lie in: the name that the file once had."""
        folders = {name.split("/", 1)[0] for name in members}
        if len(folders) != 1 or any("/" not in name for name in members):
            raise CheckpointError(
                f"{self.path}: members in the folders {listed(map(shown, sorted(folders)))}; expected one folder, as "
                "torch.save writes it. Is this another kind of zip file?"
            )
        return {name.split("/", 1)[1]: member for name, member in members.items()}

    def _check_layout(self, members: dict[str, Member]) -> None:
        if "constants.pkl" in members or any(name.startswith("code/") for name in members):
            raise UnsupportedError(
                f"{self.path}: a program of TorchScript; expected what torch.save(state_dict) writes."
            )
        if _PROGRAM not in members:
            raise CheckpointError(f"{self.path}: no {_PROGRAM} in the archive; expected what torch.save writes.")
        if _BYTE_ORDER in members:
            order = self._read_member(members, _BYTE_ORDER, 16)
            if order != b"little":
                raise UnsupportedError(f'{self.path}: byteorder = {shown(order.decode("latin-1"))}; expected "little".')
        if _VERSION in members:
            version = self._read_member(members, _VERSION, 16)
            if not _VERSIONS.fullmatch(version):
                received = shown(version.decode("latin-1"))
                raise UnsupportedError(f"{self.path}: version = {received}; expected 1 to 10. Is it newer than kllama?")

    def _read_member(self, members: dict[str, Member], name: str, limit: int) -> bytes:
        member = members[name]
        if member.size > limit:
            raise CheckpointError(f"{self.path}: {name} = {member.size} bytes; expected at most {limit}.")
        data = read_bytes_at(self.path, name, member.start, member.size)
        if zlib.crc32(data) != member.checksum != 0:
            raise CheckpointError(
                f"{self.path}: {name}: CRC-32 = {zlib.crc32(data):08x}; expected {member.checksum:08x}. "
                "Download it again."
            )
        return data

    def _place(self, name: str, tensor: PickledTensor, members: dict[str, Member]) -> ArchivedTensor:
        """Find a tensor in the file: its storage must be there and hold all of it."""
        field, storage = f"{self.path}: {shown(name)}", tensor.storage
        member = members.get(_STORAGE + storage.key)
        item_size = ITEM_SIZES[storage.dtype]
        if member is None or member.size != storage.num_items * item_size:
            found = "no bytes" if member is None else f"{member.size} bytes"
            raise CheckpointError(f"{field} = {found}; expected {storage.num_items} numbers of {storage.dtype}.")
        strides = _checked_strides(field, tensor)
        span = _span(tensor.shape, strides)
        if tensor.offset + span > storage.num_items:
            raise CheckpointError(
                f"{field} = numbers {tensor.offset} to {tensor.offset + span - 1} of its storage; expected numbers "
                f"below {storage.num_items}."
            )
        num_bytes = math.prod(tensor.shape) * item_size
        start = member.start + tensor.offset * item_size
        return ArchivedTensor(storage.dtype, tensor.shape, num_bytes, start, strides, member)

    def _check_members(self, members: dict[str, Member], storages: set[Storage]) -> None:
        keys = [storage.key for storage in storages]
        if len(keys) != len(set(keys)):
            raise CheckpointError(f"{self.path}: one storage with numbers of two types; expected one type for each.")
        known = {_PROGRAM, _BYTE_ORDER, _VERSION, *_IGNORED, *(_STORAGE + key for key in keys)}
        unknown = sorted(members.keys() - known)
        if unknown:
            raise CheckpointError(
                f"{self.path}: members that no tensor uses: {listed(map(shown, unknown))}; expected none."
            )


def _refuse_other_kinds(path: Path) -> None:
    head = read_bytes_at(path, "its first bytes", 0, min(check_file(path), len(_OLD_MAGIC)))
    if head == _OLD_MAGIC:
        raise UnsupportedError(
            f"{path}: the format of torch.save before PyTorch 1.6; expected the zip format. "
            "Load it with PyTorch and save it again."
        )
    if head[:1] == b"\x80":
        raise UnsupportedError(f"{path}: a bare pickle; expected an archive that torch.save wrote.")


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _checked_strides(field: str, tensor: PickledTensor) -> tuple[int, ...]:
    """Return the strides of a tensor of which no two numbers lie at one place, those of axes of 1 as 0.

    A transposed tensor and a slice of another one are such; then a tensor has at most as many numbers as its storage.
    """
    if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > MOST_AXES or 0 in tensor.shape:
        raise CheckpointError(
            f"{field} = {len(tensor.strides)} strides for shape {shown(tensor.shape)}; expected one for each axis, at "
            f"most {MOST_AXES} axes, and no axis of 0."
        )
    strides = tuple(0 if n == 1 else stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    covered = 1
    for stride, size in sorted(zip(strides, tensor.shape, strict=True)):
        if size > 1 and stride < covered:
            raise CheckpointError(
                f"{field} = strides {shown(tensor.strides)} for shape {shown(tensor.shape)}; expected numbers that do "
                "not overlap. Save a contiguous copy."
            )
        covered += (size - 1) * stride
    return strides
