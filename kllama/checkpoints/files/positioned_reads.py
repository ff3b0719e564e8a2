"""Positioned reads of a part of a large file, each checked against its length.

A memory map would do with less, but a file that shrinks under one ends the process; here it is an error. The readers of
archives and of files of bare numbers call it, after they have checked where things lie.
"""

from pathlib import Path

import numpy as np

from kllama.errors import CheckpointError, ResourceError


def read_array(path: Path, field: str, start: int, dtype: np.dtype | str, count: int) -> np.ndarray:
    """Return `count` numbers, which begin at byte `start`, as a flat array of its own.

    Args:
        path: the file.
        field: what is read, for messages.
        start: where it begins; the caller has checked that it ends inside the file, which bounds the memory.
        dtype: of the numbers, with its byte order.
        count: how many there are.

    Raises:
        CheckpointError: the file has become shorter.
        ResourceError: no memory, or the disk failed.
    """
    try:
        array = np.fromfile(path, dtype, count=count, offset=start)
    except (OSError, MemoryError) as error:
        size = count * np.dtype(dtype).itemsize
        raise ResourceError(f"{path}: reading {field} ({size} bytes) failed: {error}.") from error
    if array.size != count:
        raise CheckpointError(
            f"{path}: {field} = {array.nbytes} bytes; expected {count * array.itemsize}. The file has become shorter."
        )
    return array


def read_bytes_at(path: Path, field: str, start: int, size: int) -> bytes:
    """Return `size` bytes; arguments and errors are those of `read_array`."""
    return read_array(path, field, start, np.uint8, size).tobytes()
