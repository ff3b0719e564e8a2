import os
import pickle
import pickletools
import random
import tracemalloc
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kllama.checkpoints.torch_files.archive import PICKLE_LIMIT, TorchArchive
from kllama.errors import CheckpointError, KllamaError, MissingFileError, UnsupportedError
from tests.checkpoints.damage import refuses
from tests.checkpoints.mutation import mutate
from tests.checkpoints.torch_files import (
    Described,
    Entry,
    change_entries,
    read_entries,
    read_slowly,
    write_described,
    write_zip,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.backend_independent

NUMBERS = np.arange(6, dtype="<f4").tobytes()
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.fixture
def path(tmp_path) -> Path:
    """A small sound archive, as PyTorch writes it."""
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


@contextmanager
def traced_memory():
    """Give a function that says how many bytes were allocated at most inside."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        peak = []
        yield lambda: peak[0]
    finally:
        peak.append(tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.stop()


def change_program(path: Path, before: bytes, after: bytes) -> None:
    program = next(entry.data for entry in read_entries(path) if entry.name.endswith("data.pkl"))
    assert before in program
    change_entries(path, data_pkl=program.replace(before, after))


# === What is read ===


def tensors_of_every_form() -> dict:
    whole = torch.arange(48.0).reshape(6, 8)
    return {
        "float32": whole.clone(),
        "float16": torch.arange(5).half(),
        "bfloat16": torch.arange(12).reshape(3, 4).bfloat16(),
        "one number": torch.tensor(3.5),
        "axes of 1": torch.arange(4.0).reshape(1, 4, 1),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "rows": whole[2:4],
        "columns": whole[:, 3:5],
        "every second": whole[::2, 1::3],
        "the same": whole,
        "a parameter": torch.nn.Parameter(torch.arange(3.0)),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_equal_pytorch(tmp_path, protocol):
    tensors = tensors_of_every_form()
    torch.save(tensors, tmp_path / "a.pth", pickle_protocol=protocol)
    archive = TorchArchive(tmp_path / "a.pth")
    assert list(archive.tensors) == list(tensors)
    for name, tensor in tensors.items():
        stored, array = archive.tensors[name], archive.read(name)
        assert stored.dtype == {"float16": "F16", "bfloat16": "BF16"}.get(name, "F32")
        assert (stored.shape, stored.num_bytes) == (tuple(tensor.shape), tensor.numel() * tensor.element_size())
        np.testing.assert_array_equal(array.astype("float32"), tensor.detach().float().numpy(), strict=True)
        if tensor.ndim == 2:
            np.testing.assert_array_equal(archive.read_rows(name, 1, 2), array[1:2], strict=True)


def test_state_of_a_module(tmp_path):
    module = torch.nn.Linear(2, 3)
    torch.save(module.state_dict(), tmp_path / "a.pth")
    archive = TorchArchive(tmp_path / "a.pth")
    np.testing.assert_array_equal(archive.read("weight"), module.weight.detach().numpy())
    np.testing.assert_array_equal(archive.read("bias"), module.bias.detach().numpy())


@pytest.mark.parametrize("file", ["stories260K/consolidated.00", "stories260K-mp2/consolidated.01"])
def test_real_files(assets, file):
    file = assets / "meta" / f"{file}.pth"
    archive, expected = TorchArchive(file), torch.load(file, weights_only=True)
    assert list(archive.tensors) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(archive.read(name), tensor.numpy(), strict=True)


def test_other_types_are_named_and_not_read(tmp_path):
    dtypes = {"F64": torch.float64, "I8": torch.int8, "U8": torch.uint8, "I64": torch.int64, "BOOL": torch.bool}
    torch.save({name: torch.ones(3, dtype=dtype) for name, dtype in dtypes.items()}, tmp_path / "a.pth")
    archive = TorchArchive(tmp_path / "a.pth")
    for name in dtypes:
        assert archive.tensors[name].dtype == name
        with refuses(UnsupportedError, f"{name} = {name}", "expected F32, F16, BF16"):
            archive.read(name)


def test_wide_numbers_of_a_zip_file(path):
    expected = read_slowly(path)
    write_zip(path, [entry._replace(is_wide=True) for entry in read_entries(path)])
    archive = TorchArchive(path)
    for name, array in expected.items():
        np.testing.assert_array_equal(archive.read(name), array)


def test_what_a_tensor_needs_is_all_that_is_read(tmp_path):
    """Two columns of a table share its bytes, and are no more numbers than they are."""
    torch.save({"a": torch.zeros(1000, 1000)[:, :2]}, tmp_path / "a.pth")
    archive = TorchArchive(tmp_path / "a.pth")
    assert archive.tensors["a"].num_bytes == 8000
    with traced_memory() as peak:
        archive.read_rows("a", 0, 2)
    assert peak() < 100_000


# === Names and instructions ===

NAMES = {
    "a system call": b"cposix\nsystem\n",
    "eval": b"cbuiltins\neval\n",
    "another function of torch": b"ctorch\nload\n",
    "a module": b"ctorch.nn.modules.linear\nLinear\n",
    "a NumPy array": b"cnumpy.core.multiarray\n_reconstruct\n",
    "storage without a type": b"ctorch.storage\nUntypedStorage\n",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_other_names_are_refused(path, name):
    change_program(path, TENSOR, name)
    with refuses(CheckpointError, path, "global", "Nothing of it was run"):
        TorchArchive(path)


def test_nothing_is_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"a": Hostile()}, tmp_path / "a.pth")
    with refuses(CheckpointError, "global", "mkdir"):
        TorchArchive(tmp_path / "a.pth")
    assert not (tmp_path / "made").exists()


def write_sparse(file: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, file)


def write_quantized(file: Path) -> None:
    torch.save({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, file)


def write_subclass(file: Path) -> None:
    torch.save({"a": torch.nn.Buffer(torch.ones(3)).as_subclass(Subclass)}, file)


def write_float8(file: Path) -> None:
    torch.save({"a": torch.ones(3).to(torch.float8_e4m3fn)}, file)


class Subclass(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [write_sparse, write_quantized, write_subclass, write_float8])
def test_other_kinds_of_tensors(tmp_path, write):
    write(tmp_path / "a.pth")
    with refuses(UnsupportedError, "_rebuild_", "kind of tensor", "expected plain ones"):
        TorchArchive(tmp_path / "a.pth")


CONTENTS = {
    "a list": ([Described()], "top level = a list"),
    "a tensor": (Described(), "top level = a pickledtensor"),
    "none": (None, "top level = None"),
    "nested": ({"model": {"a": Described()}}, '"model" = a dict; expected a tensor'),
    "a number beside": ({"a": Described(), "epoch": 3}, '"epoch" = a int'),
    "a float beside": ({"a": Described(), "loss": 0.5}, '"loss" = a float'),
    "a name that is a number": ({3: Described()}, "3 = a pickledtensor"),
    "a name that is a tuple": ({(1, 2): Described()}, "a key that is a tuple"),
    "hooks": ({"a": Described(hooks={"a": 1})}, "other arguments"),
    "a sign": ({"a": Described(more=({"neg": True},))}, "other arguments"),
    "too many arguments": ({"a": Described(more=(None, None))}, "other arguments"),
    "a shape that is a list": ({"a": Described(shape=[2, 3])}, "other arguments"),
    "a shape of flags": ({"a": Described(shape=(True, 3))}, "other arguments"),
    "a negative size": ({"a": Described(shape=(-2, 3))}, "other arguments"),
    "a negative stride": ({"a": Described(strides=(-3, 1))}, "other arguments"),
    "a negative offset": ({"a": Described(offset=-1)}, "other arguments"),
    "a negative count": ({"a": Described(num_items=-6)}, "a reference to something else"),
    "a set": ({"a": {1}}, "global"),
    "bytes": ({"a": b"1"}, "global"),
}


@pytest.mark.parametrize("content, message", CONTENTS.values(), ids=CONTENTS)
def test_other_contents_are_refused(tmp_path, content, message):
    write_described(tmp_path / "a.pth", content, {"0": NUMBERS})
    with pytest.raises(CheckpointError, match=message):
        TorchArchive(tmp_path / "a.pth")


PROGRAMS = {
    "empty": (b"", "a complete pickle"),
    "no end": (b"}", "a complete pickle"),
    "bytes behind the end": (b"}.}", "1 bytes behind the end"),
    "an instruction that is none": (b"\xff.", "unknown"),
    "a new object": (b"}(\x81.", "instruction NEWOBJ"),
    "an extension": (b"\x82\x01.", "instruction EXT1"),
    "text of Python 2": (b"}U\x01aK\x01s.", "instruction SHORT_BINSTRING"),
    "a stack without objects": (b"s.", "an instruction without its object"),
    "no mark": (b"}t.", "an instruction without its mark"),
    "objects below a mark": (b"}(X\1\0\0\0as.", "an instruction without its object"),
    "an odd number of items": (b"}(X\1\0\0\0au.", "a key without its value"),
    "items of no dict": (b")X\1\0\0\0aK\1s.", "a tuple; expected a dict"),
    "a key twice": (b"}X\1\0\0\0aK\1sX\1\0\0\0aK\1s.", '"a" stands twice in one dict'),
    "attributes": (b"}}X\1\0\0\0aK\1sb.", "a dict with attributes"),
    "an object that was not remembered": (b"h\x07.", "object 7 is not there"),
    "a call of no function": (b"})R.", "a dict; expected a name"),
    "a call of a storage": (b"ctorch\nFloatStorage\n)R.", "with other arguments"),
    "a dict with arguments": (b"ccollections\nOrderedDict\n)\x85R.", "with other arguments"),
    "a reference to no tuple": (b"}Q.", "a dict; expected a tuple"),
    "another protocol": (b"\x80\x06}.", "pickle protocol 6"),
    "a text longer than the file": (b"X\xff\xff\xff\x7fa.", "a complete pickle"),
    "bytes longer than the file": (b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fa.", "a complete pickle"),
    "a name that is no text": (b"c\xe9\xff\nb\n.", "a complete pickle"),
    "text that is not UTF-8": (b"X\1\0\0\0\xff.", "a complete pickle"),
    "a large place to remember": (b"}r\xff\xff\xff\x7f.", "members that no tensor uses"),  # and sound, for a pickle
    "many marks": (b"(" * 2**18, "more than 65536 objects"),
    "many dicts": (b"}" * 2**18, "more than 65536 objects"),
    "deep tuples": (b")" + b"\x85" * 2**16 + b".", "top level = a tuple"),
    "a number of many digits": (b"L" + b"9" * 2**18 + b"L\n.", "a complete pickle"),
}


@pytest.mark.parametrize("program, message", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_neither_crash_nor_take_memory(tmp_path, program, message):
    write_zip(tmp_path / "a.pth", [Entry("archive/data.pkl", program), Entry("archive/data/0", NUMBERS)])
    with traced_memory() as peak, refuses(CheckpointError, message):
        TorchArchive(tmp_path / "a.pth")
    assert peak() < 16 * 2**20


# === Tensors in their storages ===

PLACES = {
    "an offset behind the end": (Described(offset=1), "numbers 1 to 6 of its storage; expected numbers below 6"),
    "a shape that is too large": (Described(shape=(3, 3)), "numbers 0 to 8"),
    "a stride that is too large": (Described(strides=(4, 1)), "numbers 0 to 6"),
    "an offset of 64 bits": (Described(offset=2**63), "numbers 9223372036854775808"),
    "a shape of 64 bits": (Described(shape=(2**40, 2**40), strides=(2**40, 1)), "numbers 0 to"),
    "a stride of 64 bits": (Described(shape=(2, 1), strides=(2**62, 1)), "numbers 0 to 4611686018427387904"),
    "one number many times": (Described(shape=(2**40,), strides=(0,)), "not overlap"),
    "rows that overlap": (Described(shape=(2, 3), strides=(2, 1)), "not overlap"),
    "axes that overlap": (Described(shape=(2, 2), strides=(1, 1)), "not overlap"),
    "no numbers": (Described(shape=(0, 3)), "no axis of 0"),
    "fewer strides": (Described(strides=(1,)), "1 strides for shape"),
    "many axes": (Described(shape=(1,) * 9, strides=(1,) * 9), "at most 8 axes"),
    "more numbers than there are": (Described(num_items=7), "24 bytes; expected 7 numbers of F32"),
    "fewer numbers than there are": (Described(num_items=5), "24 bytes; expected 5 numbers of F32"),
    "numbers of another size": (Described(kind="HalfStorage"), "24 bytes; expected 6 numbers of F16"),
    "a storage that is not there": (Described(storage="1"), "no bytes; expected"),
    "a storage outside": (Described(storage="../data.pkl"), "no bytes; expected"),
}


@pytest.mark.parametrize("tensor, message", PLACES.values(), ids=PLACES)
def test_tensors_lie_in_their_storages(tmp_path, tensor, message):
    write_described(tmp_path / "a.pth", {"a": tensor}, {"0": NUMBERS})
    with refuses(CheckpointError, '"a"', message):
        TorchArchive(tmp_path / "a.pth")


def test_sound_descriptions_are_read(tmp_path):
    """The writer of the tests above writes what is read, where nothing is wrong with it."""
    sound = {"a": Described(more=(None,)), "b": Described(offset=1, shape=(2, 1, 2), strides=(3, 2**62, 1))}
    write_described(tmp_path / "a.pth", OrderedDict(sound), {"0": NUMBERS})
    archive = TorchArchive(tmp_path / "a.pth")
    np.testing.assert_array_equal(archive.read("a"), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(archive.read("b"), [[[1, 2]], [[4, 5]]])


def test_a_storage_has_one_type_and_is_used(tmp_path):
    two_types = {"a": Described(), "b": Described(kind="IntStorage")}
    write_described(tmp_path / "a.pth", two_types, {"0": NUMBERS})
    with refuses(CheckpointError, "one storage with numbers of two types"):
        TorchArchive(tmp_path / "a.pth")
    write_described(tmp_path / "b.pth", {"a": Described()}, {"0": NUMBERS, "1": NUMBERS})
    with refuses(CheckpointError, "members that no tensor uses", "data/1"):
        TorchArchive(tmp_path / "b.pth")


# === The zip file ===

ENTRIES = {
    "encrypted": ({"flags": 1}, UnsupportedError, "encrypted"),
    "compressed": ({"method": 8}, UnsupportedError, "compressed with method 8"),
    "larger than the file": ({"size": 2**31, "own_size": 2**31}, CheckpointError, "expected an end before"),
    "fewer bytes than it has": ({"packed": 23}, CheckpointError, "23 bytes stored for 24"),
    "one size in the directory, another one before the data": ({"own_size": 25}, CheckpointError, "expected 24"),
    "another name before the data": ({"own_name": "archive/data/1"}, CheckpointError, "expected the same name"),
    "a place behind the end": ({"header": 2**31}, CheckpointError, "expected an end before"),
    "a place without a header": ({"header": 7}, CheckpointError, "agrees with the directory"),
    "64 bits without an extra field": ({"header": 2**32 - 1}, CheckpointError, "extra field"),
    "a name that is no text": ({"name": "archive/\udcff"}, CheckpointError, "expected UTF-8"),
    "outside the folder": ({"name": "other/data/0"}, CheckpointError, "expected one folder"),
    "an absolute name": ({"name": "/data/0"}, CheckpointError, "expected one folder"),
    "bytes that changed": ({"checksum": 1}, CheckpointError, "CRC-32"),
}


@pytest.mark.parametrize("change, error, message", ENTRIES.values(), ids=ENTRIES)
def test_members_of_the_zip_file(path, change, error, message):
    write_zip(path, [entry._replace(**change) if entry.name == "a/data/0" else entry for entry in read_entries(path)])
    with refuses(error, path, message):
        TorchArchive(path).read("a")


def test_a_checksum_that_was_not_computed(path):
    """PyTorch writes 0 for all of them after `torch.serialization.set_crc32_options(False)`."""
    write_zip(path, [entry._replace(checksum=0) for entry in read_entries(path)])
    np.testing.assert_array_equal(TorchArchive(path).read("a"), [[0, 1, 2], [3, 4, 5]])


def test_every_byte_of_a_storage_counts(tmp_path):
    """Also where a tensor is a part of it only, and the byte that changed belongs to another one."""
    torch.save({"a": torch.arange(1000.0)[:10]}, tmp_path / "a.pth")
    checksum = TorchArchive(tmp_path / "a.pth").tensors["a"].member.checksum
    numbers = np.arange(1000, dtype="<f4").tobytes()
    change_entries(tmp_path / "a.pth", data_0={"data": numbers[:-1] + b"\1", "checksum": checksum})
    with refuses(CheckpointError, "a: CRC-32", "Download it again"):
        TorchArchive(tmp_path / "a.pth").read("a")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_have_names_and_bytes_of_their_own(path, tmp_path):
    entries = read_entries(path)
    write_zip(path, [*entries, entries[-1]])
    with refuses(CheckpointError, "two members are called", entries[-1].name):
        TorchArchive(path)
    # The bytes of one member are another one, with the header before it.
    hidden, inner = Entry("a/version", b"3\n"), tmp_path / "inner"
    write_zip(inner, [hidden])
    outer = Entry("a/.format_version", inner.read_bytes()[: 30 + len(hidden.name) + len(hidden.data)])
    again = hidden._replace(data=b"", size=2, checksum=0, header=30 + len(outer.name))
    write_zip(path, [outer, *(entry for entry in entries if not entry.name.endswith("version")), again])
    with refuses(CheckpointError, 'the end of "a/.format_version"'):
        TorchArchive(path)


ENDS = {
    "truncated": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "bytes behind": lambda data: data + b"\0",
    "a comment": lambda data: data[:-2] + b"\1\0a",
    "more members than there are": lambda data: data[:-14] + (9).to_bytes(2, "little") * 2 + data[-10:],
    "fewer members than there are": lambda data: data[:-14] + (2).to_bytes(2, "little") * 2 + data[-10:],
    "members in another file": lambda data: data[:-14] + b"\1\0" + data[-12:],
    "another disk": lambda data: data[:-18] + b"\1\0" + data[-16:],
    "a directory elsewhere": lambda data: data[:-6] + b"\1\0\0\0" + data[-2:],
    "a directory of another size": lambda data: data[:-10] + b"\1\0\0\0" + data[-6:],
}


@pytest.mark.parametrize("change", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("is_wide", [True, False])
def test_the_end_of_the_zip_file(path, change, is_wide):
    """PyTorch ends a file with the directory's place in 64 bits and again in 32; other writers with 32 alone."""
    if not is_wide:
        write_zip(path, read_entries(path))
    path.write_bytes(change(path.read_bytes()))
    with refuses(CheckpointError, path, "Download it again"):
        TorchArchive(path)


LAYOUTS = {
    "no data.pkl": ({"data_pkl": None}, CheckpointError, "no data.pkl"),
    "a large data.pkl": ({"data_pkl": b"}" * (PICKLE_LIMIT + 1)}, CheckpointError, "data.pkl = 1048577 bytes"),
    "a changed data.pkl": ({"data_pkl": {"checksum": 1}}, CheckpointError, "data.pkl: CRC-32"),
    "big-endian": ({"byteorder": b"big"}, UnsupportedError, 'byteorder = "big"; expected "little"'),
    "an order of bytes that is none": ({"byteorder": b"\xff"}, UnsupportedError, 'expected "little"'),
    "a long order of bytes": ({"byteorder": b"little" * 99}, CheckpointError, "byteorder = 594 bytes"),
    "another version": ({"version": b"11\n"}, UnsupportedError, 'version = "11'),
    "TorchScript": ({"version": {"name": "a/code/model.py"}}, UnsupportedError, "TorchScript"),
    "a member that nobody knows": ({"version": {"name": "a/extra"}}, CheckpointError, '"extra"'),
}


@pytest.mark.parametrize("changes, error, message", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_of_the_archive(path, changes, error, message):
    change_entries(path, **changes)
    with refuses(error, path, message):
        TorchArchive(path)


def test_files_of_early_versions_lack_what_later_ones_say(path):
    change_entries(path, byteorder=None, _format_version=None, _storage_alignment=None, _data_serialization_id=None)
    np.testing.assert_array_equal(TorchArchive(path).read("a"), [[0, 1, 2], [3, 4, 5]])


def save_legacy(path: Path) -> None:
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)


OTHERS = {
    "legacy": (save_legacy, UnsupportedError, "before PyTorch 1.6"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), UnsupportedError, "a bare pickle"),
    "empty": (lambda path: path.write_bytes(b""), CheckpointError, "the file is empty"),
    "one byte": (lambda path: path.write_bytes(b"P"), CheckpointError, "not a complete archive"),
    "text": (lambda path: path.write_text("a" * 5000), CheckpointError, "not a complete archive"),
    "no members": (lambda path: write_zip(path, []), CheckpointError, "expected one folder"),
    "a Git LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"),
        CheckpointError,
        "a Git LFS pointer (sha256:ab)",
    ),
    "nothing": (lambda path: path.unlink(), MissingFileError, "does not exist"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), CheckpointError, "not a regular file"),
}


@pytest.mark.parametrize("write, error, message", OTHERS.values(), ids=OTHERS)
def test_other_files(path, write, error, message):
    write(path)
    with refuses(error, path, message):
        TorchArchive(path)


def test_a_file_that_shrinks(path):
    archive = TorchArchive(path)
    os.truncate(path, 100)
    with refuses(CheckpointError, "a = ", "has become shorter"):
        archive.read("a")


# === Mutants ===


def change_numbers(program: bytes, seed: int) -> bytes:
    """Put other numbers for one or two of the small ones in a pickle."""
    random_, changed = random.Random(seed), bytearray(program)
    places = [at + 1 for instruction, _, at in pickletools.genops(program) if instruction.name == "BININT1"]
    for at in random_.sample(places, random_.choice((1, 2))):
        changed[at] = random_.randrange(8)
    return bytes(changed)


def check_mutants(path: Path, count: int) -> dict[str, int]:
    """Read mutants of an archive: each is refused, or its tensors are what a reader of another kind finds in it.

    Every second one has other offsets, shapes, strides or counts, in an archive with the right checksums.
    """
    sound, entries = path.read_bytes(), read_entries(path)
    directory = sound.index(b"PK\1\2")
    places = [range(sound.index(b"PK\x07\x08")), range(directory, len(sound)), range(len(sound) - 98, len(sound))]
    outcomes = {"refused": 0, "read": 0, "peak": 0}
    for seed in range(count):
        if seed % 2:
            write_zip(path, [entries[0]._replace(data=change_numbers(entries[0].data, seed)), *entries[1:]])
        else:
            path.write_bytes(mutate(sound, seed, places))
        with traced_memory() as peak:
            try:
                archive = TorchArchive(path)
                arrays = {name: archive.read(name) for name in archive.tensors}
            except KllamaError as error:
                assert "\n" not in str(error)
                arrays = None
        outcomes["refused" if arrays is None else "read"] += 1
        outcomes["peak"] = max(outcomes["peak"], peak())
        if arrays is None:
            continue
        expected = read_slowly(path)
        assert list(arrays) == list(expected), seed
        for name, array in arrays.items():
            same = array.dtype == expected[name].dtype and array.tobytes() == expected[name].tobytes()
            assert same and array.shape == expected[name].shape, (seed, name)
    return outcomes


def save_for_mutants(path: Path) -> None:
    torch.manual_seed(0)
    table = torch.randn(4, 6)
    torch.save(
        {"a": table, "b": table[1:3, 2:], "c": torch.randn(5).bfloat16(), "d": torch.randn(3, 2).half().t()}, path
    )


def test_mutants(tmp_path):
    save_for_mutants(tmp_path / "a.pth")
    outcomes = check_mutants(tmp_path / "a.pth", 150)
    assert outcomes["refused"] > 75 and outcomes["read"] > 10 and outcomes["peak"] < 2**18


@pytest.mark.slow
def test_many_mutants(tmp_path):
    save_for_mutants(tmp_path / "a.pth")
    outcomes = check_mutants(tmp_path / "a.pth", 2000)
    print(outcomes)
    assert outcomes["peak"] < 2**18
