"""GGUF files for tests.

Written byte by byte, with any number in them, and read again without any check; and whole models, written by
llama.cpp's own library.
"""

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf as library
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from kllama.checkpoints.name_map import GGUF_LLAMA, GGUF_QWEN, expected_tensors

FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY = 7, 8, 9
KINDS = {bool: BOOL, int: 4, float: 6, str: STRING}
ALIGNMENT = 32


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def typed(value: object, kind: int | None = None) -> bytes:
    """Return the type of a value, and the value; a list has the type of its first element."""
    if isinstance(value, bytes):  # written by the test itself
        return value
    if isinstance(value, list):
        kind = KINDS[type(value[0])] if kind is None else kind
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(plain(item, kind) for item in value)
    kind = KINDS[type(value)] if kind is None else kind
    return struct.pack("<I", kind) + plain(value, kind)


def plain(value: object, kind: int) -> bytes:
    return text(value) if kind == STRING else struct.pack(f"<{FORMATS[kind]}", value)


def tensor_info(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """Describe a tensor; `dims` are in the order of the file."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(
    entries: Mapping[str, object] | bytes = b"",
    infos: bytes = b"",
    data: bytes = b"",
    num_entries: int | None = None,
    num_tensors: int = 0,
    version: int = 3,
    alignment: int = ALIGNMENT,
) -> bytes:
    """Return a file of these parts."""
    if isinstance(entries, Mapping):
        num_entries = len(entries) if num_entries is None else num_entries
        entries = b"".join(text(key) + typed(value) for key, value in entries.items())
    header = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries or 0) + entries + infos
    return header + bytes(-len(header) % alignment) + data if data else header


def toy(alignment: int = ALIGNMENT) -> bytes:
    """Return a small file with a value of each kind, and with float and quantised tensors."""
    random = np.random.default_rng(0)
    entries = {
        "general.architecture": "llama",
        "general.alignment": alignment,
        "a.flag": True,
        "a.number": 1.5,
        "a.signed": typed(-3, 5),
        "a.long": typed(2**40, 10),
        "a.double": typed(0.1, 12),
        "a.texts": ["", "two", "drei ▁"],
        "a.numbers": [0.5, -1.0],
        "a.bytes": typed([1, 2, 255], 0),
        "a.flags": [True, False],
    }
    scales = random.normal(size=(6, 1)).astype("<f2").view(np.uint8)
    blocks = np.hstack([scales, random.integers(0, 256, (6, 32), np.uint8)]).tobytes()
    stored = {
        "f32": ((3, 2), 0, random.normal(size=6).astype("<f4").tobytes()),
        "f16": ((5,), 1, random.normal(size=5).astype("<f2").tobytes()),
        "q8": ((64, 3), 8, blocks),
        "last": ((2,), 0, b"\0\0\x80\x3f" * 2),
    }
    infos, data = b"", b""
    for name, (dims, kind, content) in stored.items():
        infos += tensor_info(name, dims, kind, len(data))
        data += content + bytes(-len(content) % alignment)
    return gguf(entries, infos, data, num_tensors=len(stored), alignment=alignment)


class SlowReader:
    """Reads a file as the specification says, field by field, and believes all of it.

    Attributes:
        metadata: values by key, lists for arrays.
        tensors: by name: shape as NumPy has it, the number of the type, and where the bytes start.
        data_start: of the tensors.
    """

    def __init__(self, data: bytes):
        self._data, self._at = data, 4
        version, num_tensors, num_entries = self._take("I"), self._take("Q"), self._take("Q")
        self.metadata = {self._text(): self._value(self._take("I")) for _ in range(num_entries)}
        infos = [self._info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        self.data_start = (self._at + alignment - 1) // alignment * alignment
        self.tensors = {name: (shape, kind, self.data_start + offset) for name, shape, kind, offset in infos}
        assert version in (2, 3) and data[:4] == b"GGUF"

    def _take(self, kind: str):
        (value,) = struct.unpack_from(f"<{kind}", self._data, self._at)
        self._at += struct.calcsize(kind)
        return value

    def _text(self) -> str:
        length = self._take("Q")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int):
        if kind == ARRAY:
            kind, count = self._take("I"), self._take("Q")
            return [self._value(kind) for _ in range(count)]
        if kind == STRING:
            return self._text()
        value = self._take(FORMATS[kind])
        return bool(value) if kind == BOOL else value

    def _info(self):
        name = self._text()
        dims = [self._take("Q") for _ in range(self._take("I"))]
        return name, tuple(dims[::-1]), self._take("I"), self._take("Q")


# === Models ===

CONFIG = {
    "vocabulary_size": 40,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 64,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
}
"""The shapes of a small model."""

KEYS = {
    "context_length": 128,
    "embedding_length": 32,
    "block_count": 2,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 8,
}
"""What its file says, without the architecture."""

SPECIAL = ("<unk>", "<s>", "</s>")
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [
        *SPECIAL,
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz",
        "\u2581a",
        "bc",
        "<pad>",
        *"012345",
        "[X]",
    ],
    "tokenizer.ggml.scores": [0.0] * 3 + [-float(place) for place in range(37)],
    "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 29 + [3] + [1] * 6 + [4],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 32,
}
"""A tokenizer that fits it."""


def random_tensors(architecture: str = "llama", **changes) -> tuple[dict, dict]:
    """Return random weights of the small model: by the names of GGUF as stored, and by path as in kllama."""
    naming = GGUF_LLAMA if architecture == "llama" else GGUF_QWEN
    random = np.random.default_rng(0)
    stored, own = {}, {}
    for tensor in expected_tensors({**CONFIG, **changes}, naming):
        stored[tensor.name] = random.normal(size=tensor.stored_shape).astype("float32")
        own[tensor.path] = tensor.to_kllama(stored[tensor.name])
    return stored, own


def write_model(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    keys: Mapping[str, object] | None = None,
    architecture: str = "llama",
    entries: Mapping[str, object] | None = None,
    kind: str | None = None,
    **options,
) -> Path:
    """Write a model with llama.cpp's library.

    Args:
        path: the file.
        tensors: by name, of any dtype that NumPy has.
        keys: changes of `KEYS`, None leaves one out.
        architecture: what the keys begin with.
        entries: further keys, whole.
        kind: how matrices are quantised, None for not at all.
        **options: of `gguf.GGUFWriter`.
    """
    writer = library.GGUFWriter(path, architecture, **options)
    said = {f"{architecture}.{key}": value for key, value in {**KEYS, **(keys or {})}.items()}
    for key, value in {**said, **(entries or {})}.items():
        if value is not None:
            _add(writer, key, value)
    for name, array in tensors.items():
        if kind is not None and array.ndim == 2:
            number = GGMLQuantizationType[kind]
            writer.add_tensor(name, library.quants.quantize(array, number), raw_dtype=number)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: library.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
        writer.add_key_value(key, value, kinds.get(type(value), GGUFValueType.STRING))
