"""A GGUF model as files: metadata, and tensors that are read one at a time, whole or quantised, from one file or parts.

Our own header reader bounds what a file may cost (`header.py`); blocks of quantised values are turned into numbers
by llama.cpp's `gguf` package. What the metadata mean for a model is in `reading.py`, for a vocabulary in
`text/formats`.
"""

import re
from pathlib import Path

import numpy as np

from kllama.checkpoints.files.reader import FLOAT_DTYPES, listed, shown
from kllama.checkpoints.files.reader import check_finite as refuse_non_finite
from kllama.checkpoints.gguf.header import GGML_TYPES, GgufTensor, read_header
from kllama.errors import CheckpointError, MissingFileError, ResourceError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_SPLIT_KEYS = {"split.no": 0, "split.count": 1, "split.tensors.count": None}  # and what they are where they are absent
_MAX_PARTS = 10**4
# Bytes dequantised in one step, which needs several times as much beside the result: it fits a processor's cache.
_PIECE = 2**16


class GgufFile:
    """An opened GGUF model: its metadata at once, its tensors one at a time.

    A model that is split (`name-00001-of-00003.gguf`) is opened by its first part; the others lie beside it. Tensors
    are read with positioned reads, so that a file that shrinks meanwhile is an error.

    Args:
        path: the file, or the first of the parts.

    Attributes:
        path: the same.
        metadata: values by key: int, float, bool, str, a list of str, or an array of numbers.
        tensors: `GgufTensor` by name, of all parts.

    Raises:
        MissingFileError: the file or one of its parts is not there.
        CheckpointError: truncated, damaged, no GGUF file, or parts that do not belong together.
        UnsupportedError: another version, a big-endian file, or a type of tensor that is not read.

    Example:

    ```python
    file = GgufFile("model.gguf")
    file.metadata["general.architecture"]  # "llama"
    file.read("blk.0.attn_q.weight")  # float32 (out, in)
    ```
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        header = read_header(self.path)
        self.metadata = header.metadata
        self.tensors = header.tensors
        number, count, num_tensors = _split(self.metadata, self.path)
        if count > 1:
            self.tensors = {**self.tensors, **_read_parts(self.path, number, count, set(self.tensors))}
        if num_tensors is not None and num_tensors != len(self.tensors):
            raise CheckpointError(
                f"{self.path}: split.tensors.count = {num_tensors}; expected {len(self.tensors)}, the number of "
                "tensors. The parts belong to different models, or are damaged: download them again."
            )

    def read(self, name: str, check_finite: bool = True) -> np.ndarray:
        """Return one tensor: float32, float16 or bfloat16 as it is stored, float32 where it is quantised.

        Args:
            name: one of `tensors`.
            check_finite: refuse NaN and infinity.

        Raises:
            CheckpointError: the file has become shorter, or a value is not finite.
            ResourceError: no memory, or the disk failed.
        """
        tensor = self.tensors[name]
        try:
            if tensor.type in FLOAT_DTYPES:
                array = _read_bytes(tensor, name, 0, tensor.num_bytes).view(FLOAT_DTYPES[tensor.type])
            else:
                array = _dequantize(tensor, name)
        except (OSError, MemoryError) as error:
            raise ResourceError(f"{tensor.file}: reading {shown(name)} failed: {error}.") from error
        if check_finite:
            refuse_non_finite(array, f"{tensor.file}: {name}")
        return array.reshape(tensor.shape)


def _read_bytes(tensor: GgufTensor, name: str, start: int, count: int) -> np.ndarray:
    data = np.fromfile(tensor.file, np.uint8, count=count, offset=tensor.start + start)
    if data.size != count:
        raise CheckpointError(
            f"{tensor.file}: {shown(name)} = {start + data.size} bytes; expected {tensor.num_bytes}. The file became "
            "shorter: open it again."
        )
    return data


def _dequantize(tensor: GgufTensor, name: str) -> np.ndarray:
    """Return the values of a quantised tensor, flat; the blocks are read and dequantised piece by piece."""
    # Imported here: files of floats do without.
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = next(kind for kind in GGML_TYPES.values() if kind.name == tensor.type)
    num_blocks = tensor.num_bytes // kind.num_bytes
    values = np.empty((num_blocks, kind.block), np.float32)
    step = _PIECE // kind.num_bytes
    for block in range(0, num_blocks, step):
        piece = values[block : block + step]
        data = _read_bytes(tensor, name, block * kind.num_bytes, len(piece) * kind.num_bytes)
        with np.errstate(all="ignore"):  # scales that are not finite: for `check_finite` to say
            piece[...] = dequantize(data, GGMLQuantizationType[kind.name]).reshape(piece.shape)
    return values.reshape(-1)


def _split(metadata: dict, path: Path) -> tuple[int, int, int | None]:
    """Return which part of how many a file is, and how many tensors they hold; `(0, 1, None)` for a whole model."""
    number, count, num_tensors = split = tuple(metadata.get(key, default) for key, default in _SPLIT_KEYS.items())
    for key, value in zip(_SPLIT_KEYS, split, strict=True):
        if key in metadata and type(value) is not int:
            raise CheckpointError(f"{path}: {key} = {shown(str(value))}; expected an integer.")
    if not 0 <= number < count <= _MAX_PARTS:
        raise CheckpointError(
            f"{path}: split.no = {number}, split.count = {count}; expected the first below the second, which is at "
            f"most {_MAX_PARTS}."
        )
    return number, count, num_tensors


def _read_parts(path: Path, number: int, count: int, names: set[str]) -> dict[str, GgufTensor]:
    """Read the headers of the other parts of a model; return what they hold.

    Args:
        path: the first part.
        number: the `split.no` that it has.
        count: how many parts there are.
        names: of the tensors in the first part.
    """
    parts = _part_paths(path, number, count)
    missing = [part for part in parts if not part.exists()]
    if missing:
        raise MissingFileError(f"{path}: missing parts: {listed(part.name for part in missing)}.", str(missing[0]))
    tensors = {}
    for place, part in enumerate(parts, start=1):
        header = read_header(part)
        if _split(header.metadata, part)[:2] != (place, count):
            raise CheckpointError(
                f"{part}: split.no = {_split(header.metadata, part)[0]}; expected {place}, of {count}. It is not part "
                f"{place + 1} of {path.name}."
            )
        twice = sorted(header.tensors.keys() & (names | tensors.keys()))
        if twice:
            raise CheckpointError(f"{part}: tensors that an earlier part holds: {listed(map(shown, twice))}.")
        tensors |= header.tensors
    return tensors


def _part_paths(path: Path, number: int, count: int) -> list[Path]:
    """Return the paths of all parts but the first, whose name says theirs."""
    name = _PART.fullmatch(path.name)
    if name is None or int(name[3]) != count or int(name[2]) != number + 1:
        raise CheckpointError(
            f"{path}: the file says that it is part {number + 1} of {count}; expected a name that ends in "
            f"-{number + 1:05}-of-{count:05}.gguf, by which the others are found."
        )
    part_names = [f"{name[1]}-{place:05}-of-{count:05}.gguf" for place in range(1, count + 1)]
    if number:
        raise CheckpointError(f"{path}: part {number + 1} of {count}; expected the first. Open {part_names[0]}.")
    return [path.with_name(part) for part in part_names[1:]]


def is_later_part(name: str) -> bool:
    """Whether a file name is that of a part of a split model, but not of its first."""
    part = _PART.fullmatch(name)
    return part is not None and int(part[2]) != 1
