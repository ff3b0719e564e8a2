"""Bounded reads: what kind of file, how large, how sound; each refusal names the file and the place."""

import json
import os
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from kllama.checkpoints.files.reader import (
    JSON_LIMIT,
    SafetensorsFile,
    check_file_name,
    check_finite,
    listed,
    read_json,
    shown,
)
from kllama.errors import CheckpointError, MissingFileError, ResourceError, UnsupportedError

pytestmark = pytest.mark.backend_independent

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123abcd\nsize 1234\n"


def refuses(path: Path, *parts: str, error: type = CheckpointError):
    """Expect an error of exactly this class whose message names the file and says every part."""
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in (path.name, *parts))
    return pytest.raises(error, match=f"(?s){pattern}")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["empty"]),
        (b'{"a": 1,\n "b": ', ["line 2", "column 7"]),
        (b'{"a": 1}}', ["line 1", "column 9"]),
        (b'{"a": "\xe9"}', ["line 1", "column 8", "0xe9", "UTF-8"]),
        (b'\xef\xbb\xbf{"a": 1}', ["byte order mark"]),
        ('{"a": 1}'.encode("utf-16"), ["line 1", "column 1", "UTF-8"]),
        (b"[1, 2]", ["[1, 2]", "expected an object"]),
        (b"3", ["3", "expected an object"]),
        (b"[" * 100_000, ["nesting > 64", "line 1, column 65"]),
        (b'{"a":' * 100_000, ["nesting > 64"]),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', ['"c"', "twice"]),
        (b'{"rms_norm_eps": NaN}', ["rms_norm_eps", "NaN", "finite"]),
        (b'{"rope_theta": -Infinity}', ["rope_theta", "-Infinity", "finite"]),
        (b'{"rope_theta": 1e999}', ["rope_theta", "finite"]),
        (b'{"a": [1, [2, NaN]]}', ["a =", "finite"]),
        (b'{"a\\nb": NaN}', ["a\\nb = NaN"]),
        (b'{"a": ' + b"9" * 5000 + b"}", ["a =", "finite"]),
        (LFS_POINTER, ["Git LFS pointer", "sha256:0123abcd", "git lfs pull"]),
    ],
)
def test_read_json_refuses(tmp_path, content, parts):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with refuses(path, *parts):
        read_json(path)


def test_read_json_reads(tmp_path):
    path = tmp_path / "config.json"
    content = {"a": [1, 2.5, None], "brackets": "[" * 100 + '\\"', "deep": {"b": {"é": True}}, "huge": 10**30}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert read_json(path) == content


def test_read_json_of_unclosed_strings_is_linear(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"' + b'\\"' * 2_000_000)
    with refuses(path, "line 1"):
        read_json(path)


def test_read_json_does_not_read_past_its_limit(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(JSON_LIMIT + 1)
    with refuses(path, str(JSON_LIMIT + 1), f"at most {JSON_LIMIT}"):
        read_json(path)
    path.write_text("{}          ")
    with refuses(path, "at most 4"):
        read_json(path, limit=4)


def _outside(path: Path):
    (path.parent.parent / "secret.json").write_text("{}")
    path.symlink_to("../secret.json")


def _cycle(path: Path):
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "parts", "error"),
    [
        (lambda path: None, ["does not exist"], MissingFileError),
        (lambda path: path.symlink_to("nowhere"), ["does not exist"], MissingFileError),
        (_cycle, ["errno"], CheckpointError),
        (_outside, ["a link to", "secret.json", "inside"], CheckpointError),
        (lambda path: path.symlink_to("/dev/zero"), ["a link to", "/dev/zero"], CheckpointError),
        (lambda path: os.mkfifo(path), ["not a regular file"], CheckpointError),
        (lambda path: path.mkdir(), ["not a regular file"], CheckpointError),
    ],
)
def test_only_regular_files_of_the_directory_are_read(tmp_path, make, parts, error):
    directory = tmp_path / "model"
    directory.mkdir()
    path = directory / "config.json"
    make(path)
    for read in (read_json, SafetensorsFile):
        with refuses(path, *parts, error=error) as caught:
            read(path)
        assert type(caught.value) is error


def test_links_into_the_blob_store_of_a_hub_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    for directory in (snapshot, blobs):
        directory.mkdir(parents=True)
    (blobs / "4567").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/4567")
    assert read_json(snapshot / "config.json") == {"a": 1}
    (snapshot / "original").mkdir()
    (snapshot / "original" / "params.json").symlink_to("../../../blobs/4567")
    assert read_json(snapshot / "original" / "params.json") == {"a": 1}

    (tmp_path / "models--a--b" / "refs").write_text("{}")
    (snapshot / "other.json").symlink_to("../../refs")
    with refuses(snapshot / "other.json", "a link to"):
        read_json(snapshot / "other.json")


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "a..b", "é"])
def test_plain_file_names(name):
    assert check_file_name(name, "field") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "a\\b",
        "C:x",
        "a\0b",
        "a\nb",
        "\ud800",
        "x" * 256,
        "é" * 128,
        None,
        3,
    ],
)
def test_names_that_are_not_plain_file_names(name):
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map.*expected a plain file name"):
        check_file_name(name, "index.json: weight_map")


def test_messages_are_bounded():
    assert len(shown("x" * 10**6)) == 80
    assert listed(map(str, range(12))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, and 2 more"
    assert listed("abc") == "a, b, c"


# safetensors


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    values = np.arange(-3, 3, dtype="float32").reshape(2, 3)
    dtypes = {"single": "float32", "half": "float16", "brain": ml_dtypes.bfloat16, "whole": "int8"}
    return {name: values.astype(dtype) for name, dtype in dtypes.items()} | {"none": np.zeros((0, 4), "float32")}


@pytest.fixture
def path(tmp_path, tensors) -> Path:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_safetensors_reads_what_was_saved(path, tensors):
    file = SafetensorsFile(path)
    assert {name: (entry.dtype, entry.shape) for name, entry in file.tensors.items()} == {
        "single": ("F32", (2, 3)),
        "half": ("F16", (2, 3)),
        "brain": ("BF16", (2, 3)),
        "whole": ("I8", (2, 3)),
        "none": ("F32", (0, 4)),
    }
    for name in ("single", "half", "brain", "none"):
        array = file.read(name)
        assert array.dtype == tensors[name].dtype
        assert array.flags.writeable  # torch warns of, and must not share, memory that is not
        np.testing.assert_array_equal(array, tensors[name])
    with refuses(path, "whole = I8", "BF16", error=UnsupportedError):
        file.read("whole")


def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    for length in {0, 1, 7, 8, *range(9, header_end, 7), *range(header_end, len(data), 5), len(data) - 1}:
        path.write_bytes(data[:length])
        with refuses(path):
            SafetensorsFile(path)


def _file(header: str, payload: bytes = b"1234") -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + payload


def _entry(**changes) -> str:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes})


@pytest.mark.parametrize(
    "content",
    {
        "header length 0": struct.pack("<Q", 0) + b"1234",
        "header length above 100 MB": struct.pack("<Q", 10**8 + 1) + b"{}",
        "header length past the file": struct.pack("<Q", 100) + b"{}",
        "header length 2**63": struct.pack("<Q", 2**63) + b"{}",
        "trailing bytes": _file(_entry(), b"12345"),
        "a hole before the tensor": _file(_entry(data_offsets=[4, 8]), b"12345678"),
        "offsets backwards": _file(_entry(data_offsets=[4, 0])),
        "size other than shape times dtype": _file(_entry(shape=[2])),
        "shape that overflows": _file(_entry(shape=[2**62, 4])),
        "unknown dtype": _file(_entry(dtype="F31")),
        "overlap": _file(_entry()[:-1] + ', "b": ' + _entry()[6:]),
        "a name twice": _file(_entry()[:-1] + ", " + _entry()[1:]),
        "an entry as a list": _file('{"a": ["F32", [1], [0, 4]]}'),
        "not JSON": _file("{'a': 1}"),
        "deep nesting": _file('{"a":' + "[" * 10_000),
        "a Git LFS pointer": LFS_POINTER,
        "text": b"<html>404: not found</html>",
    }.items(),
    ids=lambda item: item[0],
)
def test_damaged_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content[1])
    with refuses(path) as caught:
        SafetensorsFile(path)
    assert type(caught.value) is CheckpointError


def test_a_git_lfs_pointer_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(LFS_POINTER)
    with refuses(path, "Git LFS pointer", "sha256:0123abcd"):
        SafetensorsFile(path)


def test_a_file_that_changes_while_it_is_opened_is_refused(path, monkeypatch):
    def change_behind(path, framework):
        opened = safe_open(path, framework)
        path.write_bytes(_file('{"a": 1}'))
        return opened

    monkeypatch.setattr("kllama.checkpoints.files.reader.safe_open", change_behind)
    with refuses(path, "changed while it was opened"):
        SafetensorsFile(path)


def test_a_file_that_shrinks_is_refused(path, tensors):
    file = SafetensorsFile(path)
    os.truncate(path, 8 + 16)
    with refuses(path, "single", "expected 24"):
        file.read("single")
    path.unlink()
    with refuses(path, "single", error=ResourceError):
        file.read("single")


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_counted(dtype):
    array = np.zeros((3, 2**16), dtype)
    array[0, 0] = np.finfo("float16").max
    array[1, 1] = np.finfo("float16").smallest_subnormal
    check_finite(array, "x")
    array[0, 5], array[1, -1], array[2, 7] = np.nan, np.inf, -np.inf
    with pytest.raises(CheckpointError, match=f"x = NaN or infinity in 3 of {array.size} values"):
        check_finite(array, "x")
    check_finite(array[:0], "x")
