import logging
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from kllama.checkpoints.checkpoint import Strictness
from kllama.checkpoints.huggingface.reading import HuggingFaceCheckpoint
from kllama.checkpoints.llama2c import Llama2cCheckpoint, is_llama2c
from kllama.errors import CheckpointError, KllamaError, MissingFileError
from tests.checkpoints.damage import refuses
from tests.checkpoints.mutation import mutate

pytestmark = pytest.mark.backend_independent

DIM, HIDDEN, LAYERS, HEADS, KEY_HEADS, VOCABULARY, LENGTH, GROUP = 16, 24, 2, 4, 2, 10, 6, 8
FIELDS = (DIM, HIDDEN, LAYERS, HEADS, KEY_HEADS, VOCABULARY, LENGTH)
MAGIC = 0x616B3432
HALF = DIM // HEADS // 2
KINDS = [(version, shared) for version in (0, 1, 2) for shared in (True, False)]


# === Writing, and reading the slow and simple way ===


def order(version: int, fields: tuple, shared: bool) -> list[tuple[str, tuple[int, ...], bool]]:
    """List name, shape and whether it is quantised of each tensor in a file, in their order."""
    dim, hidden, layers, heads, key_heads, vocabulary, length = fields
    key_dim = dim // heads * key_heads
    per_layer = lambda name, *shape: [(f"{i}.{name}", shape, version == 2) for i in range(layers)]  # noqa: E731
    norms = {name: [(f"{i}.{name}", (dim,), False) for i in range(layers)] for name in ("att_norm", "ffn_norm")}
    attention = per_layer("wq", dim, dim) + per_layer("wk", key_dim, dim) + per_layer("wv", key_dim, dim)
    attention += per_layer("wo", dim, dim)
    feed_forward = per_layer("w1", hidden, dim) + per_layer("w2", dim, hidden) + per_layer("w3", hidden, dim)
    table, norm = [("tok_emb", (vocabulary, dim), version == 2)], [("norm", (dim,), False)]
    head = [] if shared else [("output", (vocabulary, dim), version == 2)]
    if version:
        return norms["att_norm"] + norms["ffn_norm"] + norm + table + attention + feed_forward + head
    frequencies = [(name, (length, dim // heads // 2), False) for name in ("cos", "sin")]
    return table + norms["att_norm"] + attention + norms["ffn_norm"] + feed_forward + norm + frequencies + head


def random_tensors(version: int, shared: bool) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)
    return {name: numbers.normal(size=shape).astype("f4") for name, shape, _ in order(version, FIELDS, shared)}


def header(version: int, shared: bool, fields: tuple = FIELDS, group: int = GROUP, magic: int = MAGIC) -> bytes:
    if version == 0:
        vocabulary = fields[5] if shared else -fields[5]
        return struct.pack("<7i", *fields[:5], vocabulary, fields[6])
    data = struct.pack("<Ii7iB", magic, version, *fields, shared)
    return (data + (struct.pack("<i", group) if version == 2 else b"")).ljust(256, b"\0")


def encode(array: np.ndarray, is_quantized: bool) -> bytes:
    if not is_quantized:
        return array.astype("<f4").tobytes()
    groups = array.reshape(-1, GROUP)
    scales = (np.abs(groups).max(axis=1) / 127).astype("<f4")
    return np.round(groups / scales[:, None]).astype("i1").tobytes() + scales.tobytes()


def write(path: Path, version: int, shared: bool) -> Path:
    tensors = random_tensors(version, shared)
    body = b"".join(encode(tensors[name], quantized) for name, _, quantized in order(version, FIELDS, shared))
    path.write_bytes(header(version, shared) + body)
    return path


def read_slowly(data: bytes) -> tuple[dict[str, np.ndarray], tuple]:
    """Say what the bytes of a sound file mean, in llama2.c's own order, and the numbers of its header."""
    version, group, at, fields = 0, 0, 28, struct.unpack_from("<7i", data)
    shared = fields[5] > 0
    if struct.unpack_from("<I", data)[0] == MAGIC:
        version, *fields, shared = struct.unpack_from("<4xi7iB", data)
        at, group = 256, struct.unpack_from("<37xi", data)[0]
    fields = (*fields[:5], abs(fields[5]), fields[6])
    tensors = {}
    for name, shape, quantized in order(version, fields, bool(shared)):
        count = int(np.prod(shape))
        array, size = np.frombuffer(data, "<f4", count, at) if not quantized else None, 4 * count
        if quantized:
            values, scales = (
                np.frombuffer(data, "i1", count, at),
                np.frombuffer(data, "<f4", count // group, at + count),
            )
            array = np.array([values[i] * scales[i // group] for i in range(count)], "f4")
            size = count + 4 * len(scales)
        tensors[name], at = array.reshape(shape), at + size
    assert at == len(data)
    return tensors, (fields, bool(shared))


def turned(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Put the rows of q or k into the order of Hugging Face, number by number."""
    size = len(array) // num_heads
    return array[[n * size + 2 * i + j for n in range(num_heads) for j in range(2) for i in range(size // 2)]]


def in_kllama(tensors: dict[str, np.ndarray], fields: tuple = FIELDS) -> dict[str, np.ndarray]:
    dim, _, layers, heads, key_heads, _, _ = fields
    size = dim // heads
    expected = {
        "token_embedding/embeddings": tensors["tok_emb"],
        "sequence_output_layernorm/scale": tensors["norm"],
    }
    if "output" in tensors:
        expected["token_embedding/reverse_embeddings"] = tensors["output"].T
    for i in range(layers):
        wq, wk, wv, wo, w1, w2, w3 = (tensors[f"{i}.{name}"] for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"))
        layer, attention = f"transformer_layer_{i}", f"transformer_layer_{i}/self_attention"
        expected |= {
            f"{attention}_layernorm/scale": tensors[f"{i}.att_norm"],
            f"{attention}/query/kernel": turned(wq, heads).T.reshape(dim, heads, size),
            f"{attention}/key/kernel": turned(wk, key_heads).T.reshape(dim, key_heads, size),
            f"{attention}/value/kernel": wv.T.reshape(dim, key_heads, size),
            f"{attention}/attention_output/kernel": wo.T.reshape(heads, size, dim),
            f"{layer}/feedforward_layernorm/scale": tensors[f"{i}.ffn_norm"],
            f"{layer}/feedforward_gate_dense/kernel": w1.T,
            f"{layer}/feedforward_intermediate_dense/kernel": w3.T,
            f"{layer}/feedforward_output_dense/kernel": w2.T,
        }
    return expected


def assert_same(tensors: dict, expected: dict) -> None:
    assert tensors.keys() == expected.keys()
    for path, array in tensors.items():
        np.testing.assert_array_equal(array, expected[path], strict=True, err_msg=path)


# === What is read ===


@pytest.mark.parametrize("version, shared", KINDS)
def test_tensors_and_header(tmp_path, version, shared):
    path = write(tmp_path / "a.bin", version, shared)
    assert is_llama2c(path)
    checkpoint = Llama2cCheckpoint(path)
    assert_same(dict(checkpoint.tensors()), in_kllama(read_slowly(path.read_bytes())[0]))
    assert checkpoint.backbone_config == {
        "vocabulary_size": VOCABULARY,
        "num_layers": LAYERS,
        "num_query_heads": HEADS,
        "hidden_dim": DIM,
        "intermediate_dim": HIDDEN,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": DIM // HEADS,
        "layer_norm_epsilon": 1e-5,
        "rope_max_wavelength": 10000.0,
        "rope_scaling": None,
        "max_sequence_length": LENGTH,
        "tie_word_embeddings": shared,
        "attention_bias": False,
        "attention_output_bias": False,
        "qk_norm": False,
        "mlp_bias": False,
    }
    assert checkpoint.generation_config == {"stop_token_ids": [1, 2]}
    assert (checkpoint.dtype, checkpoint.tokenizer_config) == ("float32", None)
    frequencies = 0 if version else 2 * 4 * LENGTH * HALF
    head = len(header(version, shared))
    assert sum(checkpoint.stored_bytes.values()) == path.stat().st_size - head - frequencies
    assert list(checkpoint.stored_bytes) == (["float32", "int8"] if version == 2 else ["float32"])


@pytest.mark.parametrize("name", ["stories260K.bin", "stories260K_v1.bin"])
def test_real_model_equals_that_of_hugging_face(assets, name):
    checkpoint = Llama2cCheckpoint(assets / "models/stories260K/llama2c" / name)
    reference = HuggingFaceCheckpoint(assets / "models/stories260K")
    assert_same(dict(checkpoint.tensors()), dict(reference.tensors()))
    assert checkpoint.backbone_config.items() <= reference.backbone_config.items()
    assert checkpoint.generation_config == reference.generation_config
    tokenizer = assets / "models/stories260K/llama2c/tok512.bin"
    assert checkpoint.tokenizer_config == {"tokenizer": str(tokenizer)}


def test_real_int8_model_is_within_half_a_step(assets):
    path = assets / "models/stories260K/llama2c/stories260K_v2_q80.bin"
    exact, _ = read_slowly((path.parent / "stories260K_v1.bin").read_bytes())
    rounded, (fields, _) = read_slowly(path.read_bytes())
    for name, array in exact.items():
        groups = array.reshape(-1, 8)
        step = 0 if "norm" in name else np.abs(groups).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(rounded[name].reshape(-1, 8) - groups) <= step * 0.5001)
    assert_same(dict(Llama2cCheckpoint(path).tensors()), in_kllama(rounded, fields))


def test_other_files_are_none(assets, tmp_path):
    recognised = [file.name for file in assets.rglob("*") if file.is_file() and is_llama2c(file)]
    assert sorted(recognised) == ["stories260K.bin", "stories260K_v1.bin", "stories260K_v2_q80.bin"]
    assert not is_llama2c(tmp_path) and not is_llama2c(tmp_path / "nothing")
    (tmp_path / "zeros").write_bytes(bytes(1000))
    (tmp_path / "short").write_bytes(bytes(5))
    assert not is_llama2c(tmp_path / "zeros") and not is_llama2c(tmp_path / "short")


def tokenizer_bin(num_tokens: int) -> bytes:
    return struct.pack("<I", 3) + b"".join(struct.pack("<fi", 0.0, 3) + b"abc" for _ in range(num_tokens))


TOKENIZERS = {
    "by its number": (["tok10.bin", "tokenizer.bin", "tokenizer.model"], "tok10.bin"),
    "of another number": (["tok11.bin"], None),
    "by its name": (["tokenizer.bin", "tokenizer.model"], "tokenizer.bin"),
    "SentencePiece": (["tokenizer.model"], "tokenizer.model"),
    "none": ([], None),
}


@pytest.mark.parametrize("names, expected", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizer_beside_the_file(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).write_bytes(tokenizer_bin(VOCABULARY))
    found = Llama2cCheckpoint(write(tmp_path / "a.bin", 1, True)).tokenizer_config
    assert found == (expected and {"tokenizer": str(tmp_path / expected)})


@pytest.mark.parametrize("content", [tokenizer_bin(9), tokenizer_bin(11), bytes(10**5)])
def test_a_tokenizer_of_another_model(tmp_path, content, caplog):
    (tmp_path / "tokenizer.bin").write_bytes(content)
    assert Llama2cCheckpoint(write(tmp_path / "a.bin", 1, True)).tokenizer_config is None
    assert caplog.record_tuples[0][1] == logging.WARNING and "tokenizer.bin" in caplog.text


# === Faults ===


def with_field(name: str, value: int) -> tuple:
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    return tuple(value if name == field else given for field, given in zip(names, FIELDS, strict=True))


FIELD_FAULTS = {
    "negative dim": ("dim", -16, "dim = -16; expected 1 to"),
    "no layers": ("n_layers", 0, "n_layers = 0"),
    "many layers": ("n_layers", 2**31 - 1, "n_layers = 2147483647"),
    "a large dim": ("dim", 2**30, "dim = 1073741824"),
    "no heads": ("n_heads", 0, "n_heads = 0"),
    "heads that do not divide dim": ("n_heads", 3, "dim = 16; expected a multiple of 2 * n_heads (6)"),
    "an odd head": ("n_heads", 16, "expected a multiple of 2 * n_heads (32)"),
    "key heads that do not divide heads": ("n_kv_heads", 3, "n_heads = 4; expected a multiple of n_kv_heads (3)"),
    "no tokens": ("vocab_size", 0, "vocab_size = 0"),
    "other heads": ("n_kv_heads", 4, "n_kv_heads = 4"),
    "fewer layers": ("n_layers", 1, "n_layers = 1"),
    "more positions": ("max_seq_len", 2**24, "max_seq_len = 16777216"),
}


@pytest.mark.parametrize("version, shared", KINDS)
@pytest.mark.parametrize("field, value, message", FIELD_FAULTS.values(), ids=FIELD_FAULTS)
def test_numbers_of_the_header(tmp_path, version, shared, field, value, message):
    path = write(tmp_path / "a.bin", version, shared)
    data, fields = path.read_bytes(), with_field(field, value)
    head = header(version, shared, fields)
    path.write_bytes(head + data[len(head) :])
    if version and field == "max_seq_len":  # nothing else in these versions depends on it
        assert Llama2cCheckpoint(path).backbone_config["max_sequence_length"] == value
        return
    with refuses(CheckpointError, path, message):
        Llama2cCheckpoint(path)


@pytest.mark.parametrize("version, shared", KINDS)
@pytest.mark.parametrize("change", [-1, 1, -256, 10**6])
def test_size_is_exact(tmp_path, version, shared, change):
    path = write(tmp_path / "a.bin", version, shared)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes().ljust(size + change, b"\0")[: size + change])
    head = "a shared classifier" if shared else "a classifier of its own"
    with refuses(CheckpointError, f"size = {size + change} bytes; expected {size}", f"version {version}", head):
        Llama2cCheckpoint(path)


@pytest.mark.parametrize("version, shared", KINDS)
def test_sign_of_the_shared_classifier(tmp_path, version, shared):
    """A flag that says the opposite makes the size wrong."""
    path = write(tmp_path / "a.bin", version, shared)
    data, head = path.read_bytes(), header(version, not shared)
    path.write_bytes(head + data[len(head) :])
    with refuses(CheckpointError, f"size = {len(data)} bytes; expected"):
        Llama2cCheckpoint(path)


@pytest.mark.parametrize("version, shared", KINDS)
def test_swapped_bytes(tmp_path, version, shared):
    path = write(tmp_path / "a.bin", version, shared)
    swapped = np.frombuffer(path.read_bytes()[: path.stat().st_size // 4 * 4], "<u4").byteswap().tobytes()
    path.write_bytes(swapped)
    assert is_llama2c(path)
    with refuses(CheckpointError, path, "looks byte-swapped"):
        Llama2cCheckpoint(path)


def put(at: int, value: bytes):
    return lambda data: data[:at] + value + data[at + len(value) :]


HEADER_FAULTS = {
    "version 3": (put(4, b"\3\0\0\0"), "version = 3; expected 1 or 2"),
    "version 0": (put(4, b"\0\0\0\0"), "version = 0; expected 1 or 2"),
    "version -1": (put(4, b"\xff\xff\xff\xff"), "version = -1"),
    "a flag of 2": (put(36, b"\2"), "shared classifier = 2; expected 0 or 1"),
    "no groups": (put(37, b"\0\0\0\0"), "group_size = 0"),
    "negative groups": (put(37, b"\xff\xff\xff\xff"), "group_size = -1"),
    "large groups": (put(37, b"\0\0\0\x40"), "group_size = 1073741824"),
    "groups that do not divide": (
        put(37, b"\3\0\0\0"),
        "group_size = 3; expected a divisor of the 160 numbers of tok_emb",
    ),
    "other groups": (put(37, b"\x10\0\0\0"), "expected"),
    "a negative vocabulary": (put(28, b"\xf6\xff\xff\xff"), "vocab_size = 0; expected 1 to"),
    "bytes behind the fields": (put(255, b"\1"), "bytes behind the fields of the header = "),
    "another magic number": (put(0, b"ggml"), "dim = 1819109223"),
    "cut in the header": (lambda data: data[:255], "size = 255 bytes; expected a header of 256"),
    "cut in the integers": (lambda data: data[:27], "size = 27 bytes; expected a header of 28"),
    "empty": (lambda data: b"", "the file is empty"),
    "a Git LFS pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
}


@pytest.mark.parametrize("change, message", HEADER_FAULTS.values(), ids=HEADER_FAULTS)
def test_headers_of_version_2(tmp_path, change, message):
    path = write(tmp_path / "a.bin", 2, True)
    path.write_bytes(change(path.read_bytes()))
    with refuses(CheckpointError, path, message):
        Llama2cCheckpoint(path)


def test_files_that_are_none(tmp_path):
    with refuses(MissingFileError, "does not exist"):
        Llama2cCheckpoint(tmp_path / "nothing.bin")
    with refuses(CheckpointError, "not a regular file"):
        Llama2cCheckpoint(tmp_path)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_values_that_are_not_finite(tmp_path, version):
    path = write(tmp_path / "a.bin", version, True)
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<f", np.inf))
    if version == 0:  # where the tables of RoPE are last, which are not read
        path.write_bytes(put(28, struct.pack("<f", np.nan))(path.read_bytes()))
    with refuses(CheckpointError, "NaN or infinity in"):
        dict(Llama2cCheckpoint(path).tensors())
    tensors = dict(Llama2cCheckpoint(path, Strictness(check_finite=False)).tensors())
    assert sum(not np.isfinite(array).all() for array in tensors.values()) == 1


def test_a_file_that_shrinks(tmp_path):
    path = write(tmp_path / "a.bin", 1, True)
    checkpoint = Llama2cCheckpoint(path)
    os.truncate(path, path.stat().st_size - 4)
    with refuses(CheckpointError, "1.w3 = ", "has become shorter"):
        dict(checkpoint.tensors())


# === Mutants ===


def check_mutants(path: Path, count: int) -> dict[str, int]:
    """Read mutants of all versions: each is refused, or its numbers are those that its bytes mean."""
    sound = [write(path, version, shared).read_bytes() for version, shared in KINDS]
    outcomes = {"refused": 0, "read": 0, "peak": 0}
    for seed in range(count):
        data = mutate(sound[seed % len(sound)], seed, [range(41)])
        path.write_bytes(data)
        tracemalloc.start()
        try:
            is_llama2c(path)
            checkpoint = Llama2cCheckpoint(path)
            found = dict(checkpoint.tensors())
        except KllamaError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        finally:
            outcomes["peak"] = max(outcomes["peak"], tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        expected, (fields, shared) = read_slowly(data)
        assert_same(found, in_kllama(expected, fields))
        config = checkpoint.backbone_config
        assert (config["max_sequence_length"], config["tie_word_embeddings"]) == (fields[6], shared)
        outcomes["read"] += 1
    return outcomes


def test_mutants(tmp_path):
    outcomes = check_mutants(tmp_path / "a.bin", 150)
    assert outcomes["refused"] > 75 and outcomes["read"] > 5 and outcomes["peak"] < 2**18


@pytest.mark.slow
def test_many_mutants(tmp_path):
    outcomes = check_mutants(tmp_path / "a.bin", 2000)
    print(outcomes)
    assert outcomes["peak"] < 2**18
