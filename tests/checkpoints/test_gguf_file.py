"""The reader of GGUF files: against llama.cpp's `gguf` package, and against files that lie."""

import os
import random
import struct
import time
import tracemalloc

import gguf as library
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import _type_traits

from kllama.checkpoints.gguf import file as gguf_file
from kllama.checkpoints.gguf.file import GgufFile
from kllama.checkpoints.gguf.header import GGML_TYPES
from kllama.errors import CheckpointError, KllamaError, MissingFileError, UnsupportedError
from tests.checkpoints.damage import refuses
from tests.checkpoints.gguf_files import SlowReader, gguf, tensor_info, text, toy, typed
from tests.checkpoints.mutation import mutate

pytestmark = pytest.mark.backend_independent

SMOLLM2 = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
REAL = [f"gguf/stories260K-{kind}.gguf" for kind in ("f32", "f16", "q8_0", "q4_0")]
QUANTISED = [kind.name for kind in GGML_TYPES.values() if kind.block > 1]


@pytest.fixture
def written(tmp_path):
    """Return a function that writes bytes to a file and gives its path."""

    def write(data: bytes, name: str = "toy.gguf"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


def assert_equals_library(path, names=None):
    file, reader = GgufFile(path), library.GGUFReader(path)
    own = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
    assert list(file.metadata) == [key for key in reader.fields if key not in own]
    for key, value in file.metadata.items():  # of a long list only the beginning: the library is slow
        value, field = plain(value), reader.fields[key]
        assert value[:100] == field.contents(slice(100)) if isinstance(value, list) else value == field.contents()
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        if names is None or tensor.name in names:
            array = file.read(tensor.name)
            assert array.shape == tuple(reversed(tensor.shape.tolist()))
            np.testing.assert_array_equal(
                array.astype("float32"), library.quants.dequantize(tensor.data, tensor.tensor_type)
            )


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_as_the_library_reads_them(assets, name):
    assert_equals_library(assets / name)


def test_a_file_of_4_bit_blocks_is_as_the_library_reads_it(assets):
    assert_equals_library(assets / SMOLLM2, ["blk.0.attn_norm.weight", "blk.7.attn_k.weight", "blk.29.ffn_down.weight"])


def test_floats_keep_their_dtype(assets):
    file = GgufFile(assets / "gguf/stories260K-f16.gguf")
    assert file.read("token_embd.weight").dtype == np.float16
    assert file.read("output_norm.weight").dtype == np.float32


def test_bfloat16(written):
    path = written(gguf(infos=tensor_info("x", (2,), 30, 0), data=b"\x80\x3f\x00\xc0", num_tensors=1))
    array = GgufFile(path).read("x")
    assert array.dtype.name == "bfloat16"
    assert array.tolist() == [1.0, -2.0]


def test_the_types_are_those_of_the_library():
    for number, kind in GGML_TYPES.items():
        name = GGMLQuantizationType(number)
        assert (kind.name, kind.block, kind.num_bytes) == (name.name, *library.GGML_QUANT_SIZES[name])
    # NVFP4 has scales in tensors of their own.
    assert {kind.name for kind in _type_traits} - {"NVFP4"} == {*QUANTISED, "BF16"}


@pytest.mark.parametrize("name", QUANTISED)
def test_blocks_of_any_bytes_are_dequantised_piece_by_piece(written, monkeypatch, name):
    number, kind = next((number, kind) for number, kind in GGML_TYPES.items() if kind.name == name)
    monkeypatch.setattr(gguf_file, "_PIECE", 3 * kind.num_bytes)
    blocks = np.random.default_rng(number).integers(0, 256, (2, 5, kind.num_bytes), np.uint8)
    infos = tensor_info("x", (5 * kind.block, 2), number, 0)
    array = GgufFile(written(gguf(infos=infos, data=blocks.tobytes(), num_tensors=1))).read("x", check_finite=False)
    assert array.shape == (2, 5 * kind.block)
    assert array.dtype == np.float32
    with np.errstate(all="ignore"):
        expected = library.quants.dequantize(blocks.reshape(2, -1), GGMLQuantizationType[name])
    np.testing.assert_array_equal(array, expected)


def test_values_that_are_not_finite(written):
    block = np.float16("inf").tobytes() + b"\1" * 32
    file = GgufFile(written(gguf(infos=tensor_info("x", (32,), 8, 0), data=block, num_tensors=1)))
    with refuses(CheckpointError, "x = NaN or infinity in 32 of 32"):
        file.read("x")
    assert np.all(np.isinf(file.read("x", check_finite=False)))


def test_a_file_that_shrinks_is_an_error(written):
    path = written(toy())
    file = GgufFile(path)
    path.write_bytes(toy()[:-40])
    with refuses(CheckpointError, "last", "shorter"):
        file.read("last")


# === Files that lie ===


def test_the_toy_is_sound(written):
    for alignment in (32, 64):
        reader = SlowReader(toy(alignment))
        file = GgufFile(written(toy(alignment)))
        assert {key: plain(value) for key, value in file.metadata.items()} == reader.metadata
        assert {name: (tensor.shape, tensor.start) for name, tensor in file.tensors.items()} == {
            name: (shape, start) for name, (shape, kind, start) in reader.tensors.items()
        }
        assert file.read("last").tolist() == [1, 1]
    assert GgufFile(written(gguf(version=2))).metadata == {}


def test_every_prefix_is_refused(written):
    data = toy().rstrip(b"\0")
    path = written(data)
    for size in reversed(range(len(data))):
        os.truncate(path, size)
        with pytest.raises(CheckpointError):
            GgufFile(path)


HUGE = 2**64 - 1
KEY = text("k")


def entry(value: bytes) -> bytes:
    return gguf(KEY + value, num_entries=1, data=bytes(32))


def one_tensor(dims=(4,), kind=0, offset=0, name="x", data=bytes(64)):
    return gguf(infos=tensor_info(name, dims, kind, offset), data=data, num_tensors=1)


def pair(first, second):
    infos = tensor_info("a", (8,), 0, first) + tensor_info("b", (8,), 0, second)
    return gguf(infos=infos, data=bytes(96), num_tensors=2)


FAULTS = {
    "empty": (b"", CheckpointError, "empty"),
    "magic": (b"GGUX" + toy()[4:], CheckpointError, "first bytes"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid", CheckpointError, "git lfs pull"),
    "GGJT": (b"tjgg" + toy()[4:], UnsupportedError, "'ggjt'"),
    "GGML": (b"lmgg" + toy()[4:], UnsupportedError, "'ggml'"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedError, "big-endian"),
    "version 0": (gguf(version=0), UnsupportedError, "version = 0"),
    "version 1": (gguf(version=1), UnsupportedError, "version = 1"),
    "version 99": (gguf(version=99), UnsupportedError, "version = 99"),
    "endless tensors": (gguf(num_tensors=HUGE), CheckpointError, f"number of tensors = {HUGE}"),
    "endless keys": (gguf(num_entries=HUGE), CheckpointError, f"number of keys = {HUGE}"),
    "70,000 tensors": (gguf(num_tensors=70_000, data=bytes(3 * 10**6)), CheckpointError, "at most 65536"),
    "a key without letters": (gguf(text("") + typed(1), num_entries=1), CheckpointError, 'key 0 = ""'),
    "a key of 2^63": (gguf(struct.pack("<Q", 2**63) + bytes(20), num_entries=1), CheckpointError, "at most 255"),
    "a key beyond the end": (gguf(struct.pack("<Q", 200) + bytes(20), num_entries=1), CheckpointError, "at most 20"),
    "a key of Latin-1": (gguf(text(b"\xe9") + typed(1), num_entries=1), CheckpointError, "expected UTF-8"),
    "a key twice": (gguf(2 * (KEY + typed(1)), num_entries=2), CheckpointError, 'key 1 = "k"'),
    "type 13": (entry(typed(b"\x0d\0\0\0\0\0\0\0")), CheckpointError, "= 13"),
    "type 255": (entry(typed(b"\xff\0\0\0\0\0\0\0")), CheckpointError, "= 255"),
    "a bool of 2": (entry(typed(b"\7\0\0\0\2")), CheckpointError, "k = 2"),
    "a text of 2^63": (entry(struct.pack("<IQ", 8, 2**63)), CheckpointError, "length of"),
    "a text that is not UTF-8": (entry(struct.pack("<I", 8) + text(b"\xff")), CheckpointError, "expected UTF-8"),
    "a list of 2^63 texts": (entry(struct.pack("<IIQ", 9, 8, 2**63)), CheckpointError, "number of texts"),
    "a list of 2^63 numbers": (entry(struct.pack("<IIQ", 9, 6, 2**63)), CheckpointError, "bytes of"),
    "a list of 2^62 numbers": (entry(struct.pack("<IIQ", 9, 4, 2**62)), CheckpointError, "bytes of"),
    "lists of lists": (entry(struct.pack("<IIQ", 9, 9, 1) * 1000), CheckpointError, "= 9"),
    "alignment 0": (gguf({"general.alignment": 0}), CheckpointError, "general.alignment = 0"),
    "alignment 3": (gguf({"general.alignment": 3}), CheckpointError, "general.alignment = 3"),
    "alignment 2^31": (gguf({"general.alignment": 2**31}), CheckpointError, "general.alignment"),
    "alignment in words": (gguf({"general.alignment": "32"}), CheckpointError, 'general.alignment = "32"'),
    "a tensor twice": (
        gguf(infos=2 * tensor_info("x", (4,), 0, 0), data=bytes(32), num_tensors=2),
        CheckpointError,
        'tensor 1 = "x"',
    ),
    "a name with NUL": (one_tensor(name="a\0b"), CheckpointError, "tensor 0"),
    "a name of 256 letters": (one_tensor(name="a" * 256), CheckpointError, "at most 255"),
    "no axes": (one_tensor(dims=()), CheckpointError, "= 0; expected 1 to 4"),
    "five axes": (one_tensor(dims=(1,) * 5), CheckpointError, "= 5; expected 1 to 4"),
    "a million axes": (
        gguf(infos=text("x") + struct.pack("<I", 10**6) + bytes(40), num_tensors=1),
        CheckpointError,
        "= 1000000",
    ),
    "an axis of 0": (one_tensor(dims=(4, 0)), CheckpointError, "lengths of at least 1"),
    "an axis of 2^63": (one_tensor(dims=(2**63,)), CheckpointError, "end of"),
    "a product that wraps": (one_tensor(dims=(2**32, 2**32)), CheckpointError, "end of"),
    "half a block": (one_tensor(dims=(48,), kind=2), CheckpointError, "multiple of 32"),
    "type I32": (one_tensor(kind=26), UnsupportedError, "= I32; expected one of F32, F16, BF16, Q4_0"),
    "type F64": (one_tensor(kind=28), UnsupportedError, "= F64"),
    "type 999": (one_tensor(kind=999), UnsupportedError, "= 999"),
    "an offset between": (one_tensor(offset=4), CheckpointError, "offset of"),
    "an offset beyond the end": (one_tensor(offset=2**40), CheckpointError, "end of"),
    "an offset that wraps": (one_tensor(offset=2**64 - 32), CheckpointError, "end of"),
    "one over the other": (pair(32, 32), CheckpointError, "no other tensor"),
    "a last tensor that is short": (one_tensor(dims=(17,)), CheckpointError, "end of"),
    "tensors without data": (one_tensor(data=b""), CheckpointError, "end of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_refused_by_name(written, fault):
    data, error, message = FAULTS[fault]
    with refuses(error, "toy.gguf", message):
        GgufFile(written(data))


@pytest.mark.parametrize("data", [gguf(num_tensors=HUGE), gguf(num_entries=HUGE), FAULTS["a list of 2^63 texts"][0]])
def test_a_lie_costs_nothing(written, data):
    path = written(data + bytes(100_000))
    times = []
    tracemalloc.start()
    for _ in range(3):
        start = time.perf_counter()
        with pytest.raises(CheckpointError):
            GgufFile(path)
        times.append(time.perf_counter() - start)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(times) < 0.01
    assert peak < 2**20


def test_a_file_of_short_texts_is_bounded(written, monkeypatch):
    monkeypatch.setattr("kllama.checkpoints.gguf.header.MAX_STRINGS", 4)
    assert GgufFile(written(gguf({"a": ["x", "y"], "b": ["", ""]}))).metadata["b"] == ["", ""]
    with refuses(CheckpointError, "number of texts", "at most 2"):
        GgufFile(written(gguf({"a": ["x", "y"], "b": ["", "", ""]})))


def test_a_header_is_bounded(written, monkeypatch):
    monkeypatch.setattr("kllama.checkpoints.gguf.header.MAX_HEADER", 64)
    with refuses(CheckpointError, "bytes of"):
        GgufFile(written(gguf({"a": "x" * 60}) + bytes(100)))


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None])
def test_what_is_no_file(tmp_path, make):
    make(tmp_path / "x.gguf")
    with refuses(CheckpointError if (tmp_path / "x.gguf").exists() else MissingFileError, "x.gguf"):
        GgufFile(tmp_path / "x.gguf")


# === Files in parts ===


def split_entries(number, count=3, num_tensors=3):
    return {"split.no": typed(number, 2), "split.count": typed(count, 2), "split.tensors.count": typed(num_tensors, 5)}


@pytest.fixture
def parts(written):
    """Write a model in three parts, each with a tensor; return a function that changes one, and gives the first."""

    def write(changes=None, count=3):
        for number in range(3):
            entries = {"general.name": "split"} if number == 0 else {}
            entries |= split_entries(number) | (changes or {}).get(number, {})
            info = tensor_info(f"t{number}", (2,), 0, 0)
            data = gguf(entries, info, np.full(2, number, "<f4").tobytes(), num_tensors=1)
            path = written(data, f"m-{number + 1:05}-of-00003.gguf")
        return path.with_name("m-00001-of-00003.gguf")

    return write


def test_parts_are_read_as_one(parts):
    file = GgufFile(parts())
    assert file.metadata["general.name"] == "split"
    assert [file.read(f"t{number}").tolist() for number in range(3)] == [[0, 0], [1, 1], [2, 2]]


def test_missing_parts_are_named(parts):
    first = parts()
    for number in (2, 3):
        first.with_name(f"m-0000{number}-of-00003.gguf").unlink()
    with refuses(MissingFileError, "m-00002-of-00003.gguf, m-00003-of-00003.gguf"):
        GgufFile(first)


def test_a_later_part_names_the_first(parts):
    with refuses(CheckpointError, "part 2 of 3", "Open m-00001-of-00003.gguf"):
        GgufFile(parts().with_name("m-00002-of-00003.gguf"))


def test_a_part_under_another_name(parts):
    first = parts()
    with refuses(CheckpointError, "-00001-of-00003.gguf"):
        GgufFile(first.rename(first.with_name("model.gguf")))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({1: {"split.no": typed(2, 2)}}, "split.no = 2; expected 1"),
        ({2: {"split.count": typed(4, 2)}}, "split.no = 2; expected 2, of 3"),
        ({0: {"split.count": typed(0, 2)}}, "split.count = 0"),
        ({0: {"split.count": typed(2**32 - 1, 4)}}, "at most 10000"),
        ({0: {"split.no": "0"}}, "split.no"),
        ({0: {"split.tensors.count": typed(4, 5)}}, "split.tensors.count = 4; expected 3"),
    ],
)
def test_parts_that_do_not_belong_together(parts, changes, message):
    with refuses(CheckpointError, message):
        GgufFile(parts(changes))


def test_parts_with_one_tensor_twice(parts):
    first = parts()
    second = gguf(split_entries(1), tensor_info("t0", (2,), 0, 0), bytes(8), num_tensors=1)
    first.with_name("m-00002-of-00003.gguf").write_bytes(second)
    with refuses(CheckpointError, 'earlier part holds: "t0"'):
        GgufFile(first)


# === Mutants ===


def check_mutants(write, count: int) -> int:
    """Open mutants of the toy; return how many were accepted, each of them as the slow reader reads it."""
    sound = toy()
    header = SlowReader(sound).data_start
    accepted = 0
    for seed in range(count):
        data = mutate(sound, seed, [range(header)])
        path = write(data)
        try:
            file = GgufFile(path)
            arrays = {name: file.read(name) for name in file.tensors}
        except KllamaError as error:
            assert "\n" not in str(error), seed
            continue
        accepted += 1
        assert_as_slow(file, arrays, data)
    return accepted


def assert_as_slow(file, arrays, data):
    slow = SlowReader(data)
    assert repr({key: plain(value) for key, value in file.metadata.items()}) == repr(slow.metadata)
    assert list(arrays) == list(slow.tensors)
    for name, (shape, number, start) in slow.tensors.items():
        kind = GGML_TYPES[number]
        stored = np.frombuffer(data, np.uint8, int(np.prod(shape)) // kind.block * kind.num_bytes, start)
        expected = library.quants.dequantize(stored, GGMLQuantizationType(number)).reshape(shape)
        np.testing.assert_array_equal(arrays[name].astype("float32"), expected)


def test_mutants_are_refused_or_read_right(written):
    tracemalloc.start()
    accepted = check_mutants(written, 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < accepted < 200
    assert peak < 2**22


@pytest.mark.slow
def test_many_mutants_are_refused_or_read_right(written):
    assert check_mutants(written, 2000) > 0


def test_bit_flips_of_the_header(written):
    sound = toy()
    header = SlowReader(sound).data_start
    for place in random.Random(0).sample(range(8 * header), 300):
        data = bytearray(sound)
        data[place // 8] ^= 1 << place % 8
        try:
            file = GgufFile(written(bytes(data)))
            arrays = {name: file.read(name) for name in file.tensors}
        except KllamaError:
            continue
        assert_as_slow(file, arrays, bytes(data))
