"""The directory of a zip file whose members are stored as they are: where each one lies, and nothing read of it.

It takes only what `torch.save` writes: no compression, no encryption, no comment, no second copy of a member, and a
directory that ends the file. Every size and place is checked against the file before it is used, and what the directory
says is compared with the header before each member. `archive.py` calls it.
"""

import struct
from pathlib import Path
from typing import NamedTuple

from kllama.checkpoints.files.positioned_reads import read_bytes_at
from kllama.checkpoints.files.reader import check_file, read_bytes, shown
from kllama.errors import CheckpointError, UnsupportedError

DIRECTORY_LIMIT = 4 * 2**20

_PLACEHOLDER_SIZE = 1024  # an empty file and a Git LFS pointer are smaller, an archive with a tensor is not much larger

# All little-endian. The names are those of the fields that are used; the others are skipped.
_END = struct.Struct("<4s4H2LH")  # signature, disk, first disk, entries here, entries, size, start, comment length
_END64_PLACE = struct.Struct("<4sLQL")  # signature, disk, start of _END64, disks
_END64 = struct.Struct(
    "<4sQ2H2L4Q"
)  # signature, its size, versions, disk, first disk, entries here, entries, size, start
_ENTRY = struct.Struct("<4s2xBx2H4xLLLHHHH2x4xL")
_HEADER = struct.Struct("<4s2x2H4x4xLLHH")
_EXTRA = struct.Struct("<HH")  # kind, length
_TAIL_SIZE = _END64.size + _END64_PLACE.size + _END.size  # in this order; a short file has the last one only
_NEWEST = 45  # version 4.5 of the format, which has numbers of 64 bits
_WIDE = 0xFFFFFFFF  # the number is too large for its place and stands in the extra field of kind 1
_ENCRYPTED, _SIZES_FOLLOW = 0x2041, 0x8  # bits of the flags: three kinds of encryption; sizes stand behind the data


class Member(NamedTuple):
    """A member of an archive.

    Attributes:
        start: where its bytes begin in the file.
        size: how many there are.
        checksum: their CRC-32; 0 where the writer did not compute it.
    """

    start: int
    size: int
    checksum: int


def read_members(path: Path) -> dict[str, Member]:
    """Return the members of a zip file by name, in the order of its directory.

    Raises:
        MissingFileError: nothing is there.
        UnsupportedError: compressed or encrypted members.
        CheckpointError: no zip file, a damaged one, or one whose members share a name or bytes.
    """
    size = check_file(path)
    if size < _PLACEHOLDER_SIZE:
        read_bytes(path, _PLACEHOLDER_SIZE)
    start, end, num_entries = _find_directory(path, size)
    directory = read_bytes_at(path, "the directory", start, end - start)
    members, extents, at = {}, [], 0
    for _ in range(num_entries):
        entry, at = _read_entry(path, directory, at)
        if entry.name in members:
            raise CheckpointError(f"{path}: two members are called {shown(entry.name)}; expected each name once.")
        members[entry.name] = member = _find_member(path, entry, start)
        extents.append((entry.header, member.start + member.size, entry.name))
    if at != len(directory):
        raise _damaged(path, "length of the directory", len(directory), f"{at}, the sum of its {num_entries} entries")
    _check_overlap(path, extents)
    return members


class _Entry(NamedTuple):
    name: str
    flags: int
    checksum: int
    size: int
    header: int  # where the header before the member begins


def _damaged(path: Path, field: str, received: object, expected: object) -> CheckpointError:
    return CheckpointError(f"{path}: {field} = {received}; expected {expected}. Download it again.")


def _find_directory(path: Path, size: int) -> tuple[int, int, int]:
    """Return where the directory begins and ends, and how many entries it has."""
    tail_size = min(size, _TAIL_SIZE)
    tail = read_bytes_at(path, "the end of the file", size - tail_size, tail_size)
    end = size - _END.size
    if end < 0 or tail[-_END.size :][:4] != b"PK\5\6" or tail[-2:] != b"\0\0":
        raise CheckpointError(
            f"{path}: not a complete archive of torch.save, which ends with the directory of a zip file. "
            "Download it again."
        )
    _, *numbers, _ = _END.unpack(tail[-_END.size :])
    if tail_size == _TAIL_SIZE and tail[_END64.size :][:4] == b"PK\6\7":
        narrow, numbers = numbers, _read_wide_end(path, tail, size)
        for given, value, most in zip(narrow, numbers, (*[0xFFFF] * 4, _WIDE, _WIDE), strict=True):
            if given not in (value, most):
                raise _damaged(path, "the end of the directory", given, f"{value}, as its wide form says")
        end -= _END64_PLACE.size + _END64.size
    disk, first_disk, here, num_entries, length, start = numbers
    if (disk, first_disk) != (0, 0) or here != num_entries:
        raise _damaged(path, "parts of the archive", f"{here} of {num_entries} members", "all in this file")
    if start + length != end or length > DIRECTORY_LIMIT or num_entries * _ENTRY.size > length:
        received = f"{num_entries} members in {length} bytes at {start}"
        raise _damaged(path, "the directory", received, f"at most {DIRECTORY_LIMIT} bytes, which end at {end}")
    return start, end, num_entries


def _read_wide_end(path: Path, tail: bytes, size: int) -> list[int]:
    """Read the end of a directory whose numbers have 64 bits; it stands before the one with 32."""
    _, disk, place, disks = _END64_PLACE.unpack(tail[_END64.size :][: _END64_PLACE.size])
    signature, length, _, _, *numbers = _END64.unpack(tail[: _END64.size])
    expected = size - len(tail)
    if (disk, place) != (0, expected) or disks > 1 or signature != b"PK\6\6" or length != _END64.size - 12:
        raise _damaged(path, "place of the end of the directory", place, expected)
    return numbers


def _read_entry(path: Path, directory: bytes, at: int) -> tuple[_Entry, int]:
    """Read the entry at a place of the directory; return it and the place behind it."""
    if len(directory) - at < _ENTRY.size:
        raise _damaged(path, "the directory", f"{len(directory) - at} bytes for an entry", f"{_ENTRY.size} or more")
    signature, needed, flags, method, checksum, packed, size, *lengths, disk, header = _ENTRY.unpack_from(directory, at)
    end = at + _ENTRY.size + sum(lengths)
    if signature != b"PK\1\2" or end > len(directory) or disk != 0 or needed > _NEWEST:
        raise _damaged(path, f"entry at {at} of the directory", f"{signature.hex()}, {end - at} bytes", "a zip entry")
    name, extra, _ = _split(directory[at + _ENTRY.size : end], lengths)
    name = _decode(path, name)
    if flags & _ENCRYPTED or method != 0:
        kind = "encrypted" if flags & _ENCRYPTED else f"compressed with method {method}"
        raise UnsupportedError(f"{path}: {shown(name)} = {kind}; expected plain bytes, as torch.save stores them.")
    size, packed, header = _widen(path, name, [size, packed, header], extra)
    if packed != size:
        raise _damaged(path, shown(name), f"{packed} bytes stored for {size}", "the same number")
    return _Entry(name, flags, checksum, size, header), end


def _find_member(path: Path, entry: _Entry, limit: int) -> Member:
    """Compare an entry with the header before its member; return where the bytes of the member lie."""
    name = shown(entry.name)
    if entry.header + _HEADER.size + entry.size > limit:
        raise _damaged(path, name, f"{entry.size} bytes at {entry.header}", f"an end before {limit}, the directory")
    header = read_bytes_at(path, name, entry.header, _HEADER.size)
    signature, flags, method, packed, size, *lengths = _HEADER.unpack(header)
    start = entry.header + _HEADER.size + sum(lengths)
    if signature != b"PK\3\4" or (flags, method) != (entry.flags, 0) or start + entry.size > limit:
        raise _damaged(path, f"{name}: the header before it", header.hex(), "one that agrees with the directory")
    rest = read_bytes_at(path, name, entry.header + _HEADER.size, sum(lengths))
    own_name, extra = _split(rest, lengths)
    if _decode(path, own_name) != entry.name:
        raise _damaged(path, f"{name}: the header before it", shown(_decode(path, own_name)), "the same name")
    if not (flags & _SIZES_FOLLOW and (packed, size) == (0, 0)):
        received = _widen(path, entry.name, [size, packed], extra)
        if received != [entry.size, entry.size]:
            raise _damaged(path, f"{name}: size in the header before it", received, entry.size)
    return Member(start, entry.size, entry.checksum)


def _split(data: bytes, lengths: list[int]) -> list[bytes]:
    parts, at = [], 0
    for length in lengths:
        parts.append(data[at : at + length])
        at += length
    return parts


def _decode(path: Path, name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, "name of a member", name[:80].hex(), "UTF-8") from error


def _widen(path: Path, name: str, values: list[int], extra: bytes) -> list[int]:
    """Replace the numbers that stand in the extra field, in their order, where 32 bits are too few for them."""
    if _WIDE not in values:
        return values
    at, wide = 0, b""
    while len(extra) - at >= _EXTRA.size:
        kind, length = _EXTRA.unpack_from(extra, at)
        at += _EXTRA.size + length
        if kind == 1:
            wide = extra[at - length : at]
            break
    numbers = iter(value for (value,) in struct.iter_unpack("<Q", wide[: len(wide) // 8 * 8]))
    widened = [next(numbers, None) if value == _WIDE else value for value in values]
    if None in widened:
        raise _damaged(path, f"{shown(name)}: extra field", extra[:80].hex(), "its size and place in 64 bits")
    return widened


def _check_overlap(path: Path, extents: list[tuple[int, int, str]]) -> None:
    extents = sorted(extents)
    for (_, end, name), (start, _, other) in zip(extents, extents[1:], strict=False):
        if start < end:
            raise _damaged(path, shown(other), f"begins at {start}", f"{end} or more, the end of {shown(name)}")
