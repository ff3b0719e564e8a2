"""Archives of `torch.save` for the tests: written byte by byte, changed, and read the slow and simple way."""

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}


class Entry(NamedTuple):
    """A member as a zip file describes it; what is None is as it should be."""

    name: str
    data: bytes
    flags: int = 0
    method: int = 0
    size: int | None = None  # in the directory
    packed: int | None = None  # the size when compressed
    own_size: int | None = None  # in the header before the member
    own_name: str | None = None
    checksum: int | None = None
    header: int | None = None  # where the directory says that the header before the member is
    is_wide: bool = False  # sizes and place as 64 bits in the extra field


def write_zip(path: Path, entries: list[Entry], behind: bytes = b"", num_entries: int | None = None) -> None:
    body, directory = b"", b""
    for entry in entries:
        checksum = zlib.crc32(entry.data) if entry.checksum is None else entry.checksum
        size = len(entry.data) if entry.size is None else entry.size
        own_size = size if entry.own_size is None else entry.own_size
        name, own_name = (
            text.encode("utf-8", "surrogateescape") for text in (entry.name, entry.own_name or entry.name)
        )
        place = len(body) if entry.header is None else entry.header
        extra, own_extra = b"", b""
        if entry.is_wide:
            own_extra = struct.pack("<HHQQ", 1, 16, own_size, own_size)
            extra = struct.pack("<HH3sHHQQQ", 7, 3, b"any", 1, 24, size, size, place)
            size = own_size = place = 2**32 - 1
        numbers = (entry.flags, entry.method, 0, 0, checksum, own_size, own_size, len(own_name), len(own_extra))
        body += struct.pack("<4s5HL2L2H", b"PK\3\4", 20, *numbers) + own_name + own_extra + entry.data
        packed = size if entry.packed is None else entry.packed
        numbers = (entry.flags, entry.method, 0, 0, checksum, packed, size, len(name), len(extra), 0, 0, 0, 0, place)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, *numbers) + name + extra
    count = len(entries) if num_entries is None else num_entries
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)
    path.write_bytes(body + directory + end + behind)


def read_entries(path: Path) -> list[Entry]:
    with zipfile.ZipFile(path) as archive:
        return [Entry(name, archive.read(name)) for name in archive.namelist()]


def change_entries(path: Path, **changes: bytes | dict | None) -> None:
    """Write an archive again with other members: other bytes, other fields of `Entry`, or None for none.

    A member is named by its path inside the folder, with `_` for `/` and `.`.
    """
    entries = []
    for entry in read_entries(path):
        change = changes.get(entry.name.split("/", 1)[1].replace("/", "_").replace(".", "_"), {})
        if change is None:
            continue
        entries.append(entry._replace(**change) if isinstance(change, dict) else entry._replace(data=change))
    write_zip(path, entries)


class _Called(NamedTuple):
    function: str
    arguments: tuple


class Described(NamedTuple):
    """A tensor as a pickle may describe it, sound or not."""

    storage: str = "0"
    kind: str = "FloatStorage"
    num_items: int = 6
    offset: object = 0
    shape: object = (2, 3)
    strides: object = (3, 1)
    hooks: object = OrderedDict()
    more: tuple = ()


class _Reference(NamedTuple):
    identity: tuple


class _DescribingPickler(pickle.Pickler):
    """Writes a `Described` as PyTorch writes a tensor."""

    def persistent_id(self, value):
        return value.identity if type(value) is _Reference else None

    def reducer_override(self, value):
        import torch

        if type(value) is not Described:
            return NotImplemented
        kind = getattr(torch, value.kind)
        storage = _Reference(("storage", kind, value.storage, "cpu", value.num_items))
        arguments = (storage, value.offset, value.shape, value.strides, False, value.hooks, *value.more)
        return torch._utils._rebuild_tensor_v2, arguments


def pickled(content: object, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    _DescribingPickler(file, protocol).dump(content)
    return file.getvalue()


def write_described(path: Path, content: object, storages: dict[str, bytes]) -> None:
    """Write an archive whose tensors are described in `content`."""
    entries = [Entry("archive/data.pkl", pickled(content)), Entry("archive/byteorder", b"little")]
    entries += [Entry(f"archive/data/{key}", data) for key, data in storages.items()]
    write_zip(path, [*entries, Entry("archive/version", b"3\n")])


class _SlowUnpickler(pickle.Unpickler):
    """Understands what PyTorch writes for tensors; calls nothing but the functions here."""

    def __init__(self, program: bytes, storages: dict[str, bytes]):
        super().__init__(io.BytesIO(program))
        self._storages = storages

    def find_class(self, module, name):
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        known = {"_rebuild_tensor_v2": self._tensor, "_rebuild_parameter": lambda tensor, *_: tensor}
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module != "torch._utils" or name not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[name]

    def persistent_load(self, identity):
        _, dtype, key, _, num_items = identity
        return np.frombuffer(self._storages[key], dtype)[:num_items]

    @staticmethod
    def _tensor(storage, offset, shape, strides, *_):
        array = np.empty(shape, storage.dtype)
        for index in np.ndindex(*shape):
            array[index] = storage[offset + sum(i * stride for i, stride in zip(index, strides, strict=True))]
        return array


def read_slowly(path: Path) -> dict[str, np.ndarray]:
    """Read an archive by other means, number by number; what it raises on a damaged one is any exception."""
    with zipfile.ZipFile(path) as archive:
        members = {}
        for info in archive.infolist():
            checksum, info.CRC = info.CRC, None
            data = archive.read(info)
            if checksum not in (0, zlib.crc32(data)) and "/." not in info.filename:
                raise ValueError(f"{info.filename}: checksum")
            members[info.filename.split("/", 1)[1]] = data
    storages = {name.removeprefix("data/"): data for name, data in members.items()}
    return _SlowUnpickler(members["data.pkl"], storages).load()
