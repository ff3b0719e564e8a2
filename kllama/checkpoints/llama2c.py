"""A model file of llama2.c, `.bin`: a header and bare numbers, float32 in versions 0 and 1, int8 in version 2.

The header says where every tensor lies, so its numbers are checked against the size of the file, which must be exact.
RoPE is interleaved; `name_map` puts it in order. Epsilon and theta are constants of llama2.c and stand in no file. The
tables of RoPE in version 0 are skipped, as llama2.c skips them. `models/` opens a checkpoint through it.
"""

import logging
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kllama.checkpoints.checkpoint import STRICT, Checkpoint, Strictness
from kllama.checkpoints.files.positioned_reads import read_array, read_bytes_at
from kllama.checkpoints.files.reader import check_file, check_finite, read_bytes
from kllama.checkpoints.name_map import LLAMA2C, ExpectedTensor, expected_tensors
from kllama.errors import CheckpointError

LAYER_NORM_EPSILON, ROPE_THETA = 1e-5, 10000.0
TOKENIZER_MODEL = "tokenizer.model"
STOP_TOKEN_IDS = (1, 2)  # llama2.c ends a text on the start token too: between two stories of the training data is one

_MAGIC = 0x616B3432  # "ak42"
_HEADER_SIZE = 256  # of versions 1 and 2; version 0 has the seven integers alone
_PLACEHOLDER_SIZE = 1024
_TOKENIZER_LIMIT = 2**26
_INTEGERS = struct.Struct("<7i")
_VERSIONED = struct.Struct("<Ii7iB")
_GROUP_AT = 37  # where the size of the groups stands in version 2
_LOGGER = logging.getLogger(__name__)
_INT8, _FLOAT = np.dtype(np.int8), np.dtype("<f4")

# The order of the tensors in a file. Of those with a dot, each layer's follow one another; the rest are there once.
_ATTENTION, _FEED_FORWARD = (".wq", ".wk", ".wv", ".wo"), (".w1", ".w2", ".w3")
_FREQUENCIES = ("freqs_cos", "freqs_sin")
_NORMS = (".att_norm", ".ffn_norm", "norm")
_ORDER = {
    0: ("tok_emb", ".att_norm", *_ATTENTION, ".ffn_norm", *_FEED_FORWARD, "norm", *_FREQUENCIES, "output"),
    1: (*_NORMS, "tok_emb", *_ATTENTION, *_FEED_FORWARD, "output"),
    2: (*_NORMS, "tok_emb", *_ATTENTION, *_FEED_FORWARD, "output"),
}

# Far more than any model has, and so little that a file of something else hardly looks like a header.
_LIMITS = {
    "dim": 2**20,
    "hidden_dim": 2**22,
    "n_layers": 2**12,
    "n_heads": 2**12,
    "n_kv_heads": 2**12,
    "vocab_size": 2**24,
    "max_seq_len": 2**24,
}


class _Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        version: 0, 1 or 2.
        fields: the seven integers by name; `vocab_size` is positive.
        is_tied: whether the classifier is the embedding.
        group_size: how many int8 values share a scale; 0 in versions 0 and 1.
        size: of the header in bytes.
    """

    version: int
    fields: dict[str, int]
    is_tied: bool
    group_size: int
    size: int


def is_llama2c(path: str | Path) -> bool:
    """Whether a file begins as a model of llama2.c does, possibly with the bytes of its integers swapped."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size < _INTEGERS.size:
        return False
    head = read_bytes_at(path, "the header", 0, _INTEGERS.size)
    swapped = _swap(head)
    return any(_magic(data) == _MAGIC or not _faults(_integers(data)) for data in (head, swapped))


class Llama2cCheckpoint(Checkpoint):
    """An opened model file of llama2.c.

    Its tokenizer is the first of these that lies beside the file: `tok<vocab_size>.bin`; `tokenizer.bin` if it has as
    many tokens as the model; `tokenizer.model`. The int8 values of version 2 become float32.

    Args:
        path: the file.
        strictness: what is let pass.

    Attributes: those of `Checkpoint`.

    Raises:
        MissingFileError: nothing is there.
        CheckpointError: another version, numbers that fit neither each other nor the size of the file, or a file whose
            bytes are swapped.
    """

    format = "llama2.c"
    dtype = "float32"

    def __init__(self, path: str | Path, strictness: Strictness = STRICT):
        self.path = Path(path)
        self._strictness = strictness
        size = check_file(self.path)
        if size < _PLACEHOLDER_SIZE:
            read_bytes(self.path, _PLACEHOLDER_SIZE)  # an empty file and a Git LFS pointer are named as such
        header = _read_header(self.path, size)
        self.backbone_config = _backbone_config(header)
        shapes = _stored_shapes(header, self.backbone_config)
        _check_size(self.path, header, shapes, size)
        self._places = _place_tensors(header, shapes)
        self.stored_bytes = _count_bytes(header, shapes)
        self.tokenizer_config = _find_tokenizer(self.path.parent, header.fields["vocab_size"])
        self.generation_config = {"stop_token_ids": [i for i in STOP_TOKEN_IDS if i < header.fields["vocab_size"]]}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each variable's path and its array, in kllama's shape, float32, one at a time.

        Raises:
            CheckpointError: values that are not finite, or a file that changed since it was opened.
        """
        for tensor in expected_tensors(self.backbone_config, LLAMA2C):
            yield tensor.path, tensor.to_kllama(self._read(tensor))

    def _read(self, tensor: ExpectedTensor) -> np.ndarray:
        array = self._places[tensor.name].read(self.path, tensor.name)
        if self._strictness.check_finite:
            check_finite(array, f"{self.path}: {tensor.name}")
        return array.reshape(tensor.stored_shape)


class _Place(NamedTuple):
    """Where the numbers of a tensor lie: float32, or int8 with the scales of their groups behind them.

    Attributes:
        start: in the file.
        count: of the numbers.
        group_size: how many share a scale, or 0.
    """

    start: int
    count: int
    group_size: int

    def read(self, path: Path, name: str) -> np.ndarray:
        if not self.group_size:
            return read_array(path, name, self.start, _FLOAT, self.count)
        values = read_array(path, name, self.start, _INT8, self.count).reshape(-1, self.group_size)
        scales = read_array(path, f"{name}, scales", self.start + self.count, _FLOAT, len(values))
        with np.errstate(over="ignore", invalid="ignore"):  # an infinity is the caller's to refuse
            return values * scales[:, None]


def _num_bytes(count: int, group_size: int) -> int:
    return count * _FLOAT.itemsize if not group_size else count + count // group_size * _FLOAT.itemsize


def _magic(data: bytes) -> int:
    return int.from_bytes(data[:4], "little")


def _integers(data: bytes) -> tuple[int, ...]:
    return _INTEGERS.unpack_from(data)


def _swap(data: bytes) -> bytes:
    """Reverse the bytes of each integer of the header."""
    return struct.pack("<7I", *struct.unpack_from(">7I", data))


def _faults(values: tuple[int, ...]) -> list[str]:
    """List what is wrong with the seven integers, among themselves. A negative vocab_size is for the caller."""
    fields = dict(zip(_LIMITS, values, strict=True))
    wrong = [
        f"{name} = {value}; expected 1 to {_LIMITS[name]}"
        for name, value in fields.items()
        if not 1 <= (abs(value) if name == "vocab_size" else value) <= _LIMITS[name]
    ]
    if wrong:
        return wrong
    if fields["dim"] % (2 * fields["n_heads"]):
        wrong.append(f"dim = {fields['dim']}; expected a multiple of 2 * n_heads ({2 * fields['n_heads']})")
    if fields["n_heads"] % fields["n_kv_heads"]:
        wrong.append(f"n_heads = {fields['n_heads']}; expected a multiple of n_kv_heads ({fields['n_kv_heads']})")
    return wrong


def _read_header(path: Path, size: int) -> _Header:
    data = read_bytes_at(path, "the header", 0, min(size, _HEADER_SIZE))
    if len(data) < _INTEGERS.size:
        raise CheckpointError(f"{path}: size = {size} bytes; expected a header of {_INTEGERS.size} or more.")
    swapped = _swap(data)
    is_swapped_v0 = _faults(_integers(data)) and not _faults(_integers(swapped))
    if _magic(swapped) == _MAGIC or (_magic(data) != _MAGIC and is_swapped_v0):
        raise CheckpointError(
            f"{path}: looks byte-swapped: its integers make sense with their bytes reversed; expected a little-endian "
            "file. Export it on a little-endian machine."
        )
    header = _read_versioned(path, data) if _magic(data) == _MAGIC else _read_version_0(data)
    values = [*header.fields.values()]
    if header.version and header.fields["vocab_size"] < 1:
        values[list(_LIMITS).index("vocab_size")] = 0  # only version 0 says something by the sign
    faults = _faults(tuple(values))
    if faults:
        raise CheckpointError(f"{path}: {'. '.join(faults)}. Is it a model of llama2.c?")
    return header


def _read_version_0(data: bytes) -> _Header:
    """Read the header without a magic number, in which a negative vocab_size says that the classifier is not shared."""
    fields = dict(zip(_LIMITS, _integers(data), strict=True))
    is_tied = fields["vocab_size"] > 0
    return _Header(0, {**fields, "vocab_size": abs(fields["vocab_size"])}, is_tied, 0, _INTEGERS.size)


def _read_versioned(path: Path, data: bytes) -> _Header:
    if len(data) < _HEADER_SIZE:
        raise CheckpointError(f"{path}: size = {len(data)} bytes; expected a header of {_HEADER_SIZE}.")
    _, version, *values, shared = _VERSIONED.unpack_from(data)
    if version not in (1, 2):
        raise CheckpointError(f"{path}: version = {version}; expected 1 or 2, or the header of version 0.")
    if shared not in (0, 1):
        raise CheckpointError(f"{path}: shared classifier = {shared}; expected 0 or 1.")
    group_size, rest = 0, data[_GROUP_AT:]
    if version == 2:
        group_size, rest = int.from_bytes(rest[:4], "little", signed=True), rest[4:]
        if not 1 <= group_size <= _LIMITS["dim"]:
            raise CheckpointError(f"{path}: group_size = {group_size}; expected 1 to {_LIMITS['dim']}.")
    if any(rest):
        raise CheckpointError(
            f"{path}: bytes behind the fields of the header = {rest.rstrip(bytes(1)).hex()}; expected 0."
        )
    return _Header(version, dict(zip(_LIMITS, values, strict=True)), shared == 1, group_size, _HEADER_SIZE)


def _backbone_config(header: _Header) -> dict:
    fields = header.fields
    return {
        "vocabulary_size": fields["vocab_size"],
        "num_layers": fields["n_layers"],
        "num_query_heads": fields["n_heads"],
        "hidden_dim": fields["dim"],
        "intermediate_dim": fields["hidden_dim"],
        "num_key_value_heads": fields["n_kv_heads"],
        "head_dim": fields["dim"] // fields["n_heads"],
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "rope_max_wavelength": ROPE_THETA,
        "rope_scaling": None,
        "max_sequence_length": fields["max_seq_len"],
        "tie_word_embeddings": header.is_tied,
        **dict.fromkeys(("attention_bias", "attention_output_bias", "qk_norm", "mlp_bias"), False),
    }


def _stored_shapes(header: _Header, config: dict) -> dict[str, tuple[int, ...]]:
    """Return the shape of each kind of tensor, in the order of the file. Every layer has the same ones."""
    shapes = {"freqs_cos": (config["max_sequence_length"], config["head_dim"] // 2)}
    shapes["freqs_sin"] = shapes["freqs_cos"]
    for tensor in expected_tensors({**config, "num_layers": 1}, LLAMA2C):
        shapes[tensor.name.removeprefix("0")] = tensor.stored_shape
    return {kind: shapes[kind] for kind in _ORDER[header.version] if kind in shapes}


def _kinds(header: _Header, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, int, int, int]]:
    """Yield for each kind of tensor its name, how often it is there, the count of its numbers and their group size."""
    for kind, shape in shapes.items():
        times = header.fields["n_layers"] if kind.startswith(".") else 1
        yield kind, times, math.prod(shape), 0 if kind in _NORMS else header.group_size


def _check_size(path: Path, header: _Header, shapes: dict[str, tuple[int, ...]], size: int) -> None:
    """Compare the size of the file with what the header implies, before anything is made of that number."""
    expected = header.size
    for kind, times, count, group_size in _kinds(header, shapes):
        if group_size and count % group_size:
            raise CheckpointError(
                f"{path}: group_size = {group_size}; expected a divisor of the {count} numbers of {kind.lstrip('.')}."
            )
        expected += times * _num_bytes(count, group_size)
    if size != expected:
        fields = ", ".join(f"{name} = {value}" for name, value in header.fields.items())
        head = "a shared classifier" if header.is_tied else "a classifier of its own"
        raise CheckpointError(
            f"{path}: size = {size} bytes; expected {expected}, as its header says: version {header.version}, "
            f"{fields}, {head}. Download it again."
        )


def _place_tensors(header: _Header, shapes: dict[str, tuple[int, ...]]) -> dict[str, _Place]:
    places, at = {}, header.size
    for kind, times, count, group_size in _kinds(header, shapes):
        for layer in range(times):
            places[f"{layer}{kind}" if kind.startswith(".") else kind] = _Place(at, count, group_size)
            at += _num_bytes(count, group_size)
    return places


def _count_bytes(header: _Header, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Count the bytes by type, without the tables of RoPE."""
    counts = {"float32": 0, "int8": 0}
    for kind, times, count, group_size in _kinds(header, shapes):
        if kind not in _FREQUENCIES:
            num_int8 = times * count if group_size else 0
            counts["int8"] += num_int8
            counts["float32"] += times * _num_bytes(count, group_size) - num_int8
    return {dtype: count for dtype, count in counts.items() if count}


def _find_tokenizer(directory: Path, vocabulary_size: int) -> dict | None:
    found = directory / f"tok{vocabulary_size}.bin"
    if not found.exists():
        general = directory / "tokenizer.bin"
        found = general if _has_tokens(general, vocabulary_size) else directory / TOKENIZER_MODEL
    if not found.exists():
        return None
    check_file(found)
    return {"tokenizer": str(found)}


def _has_tokens(path: Path, expected: int) -> bool:
    """Whether a `tokenizer.bin`, which does not say how many tokens it has, has as many as the model.

    llama2.c would read the first ones of a longer one. Whether it is sound is for the tokenizer to tell.
    """
    if not path.exists():
        return False
    data, at, count = read_bytes(path, _TOKENIZER_LIMIT), 4, 0
    while at < len(data) and count <= expected:
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        at, count = at + 8 + length, count + 1
    if count != expected:
        _LOGGER.warning("%s: has not %d tokens, as the model beside it; it is not used.", path, expected)
    return count == expected
