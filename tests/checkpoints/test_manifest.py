"""The manifest: what it says, that it is read strictly, and that every change of a file is found."""

import json
import threading
from pathlib import Path

import pytest

from kllama.checkpoints.files import manifest
from kllama.checkpoints.files.manifest import NAME, SavedFile
from kllama.errors import CheckpointError, MissingFileError, ResourceError, UnsupportedError

pytestmark = pytest.mark.backend_independent

FILES = {"config.json": b"{}", "model.weights.h5": b"\x01" * 70000, "assets/tokenizer/tokenizer.json": b"[]"}
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "preset"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    manifest.write(folder)
    return folder


def check(folder: Path) -> None:
    """Check all that loading checks."""
    list(manifest.check(folder).during([]))


def rewrite(folder: Path, **changes) -> None:
    content = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**content, **changes}))


def test_what_it_says(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    manifest.write(tmp_path)
    content = json.loads((tmp_path / NAME).read_text())
    assert content.pop("kllama_version")
    assert content == {"format": 1, "files": {"a": {"size": 3, "sha256": ABC}}}


def test_a_whole_directory(folder):
    check(folder)
    assert manifest.verify(folder) == sorted((name, len(data)) for name, data in FILES.items())
    assert manifest.read(folder).keys() == FILES.keys()


def test_what_is_known_is_not_read_again(folder):
    known = SavedFile(5, "0" * 64)
    manifest.write(folder, {"config.json": known, "another": known})
    assert manifest.read(folder).keys() == FILES.keys()
    assert manifest.read(folder)["config.json"] == known


def test_none(folder):
    (folder / NAME).unlink()
    assert manifest.read(folder) is None and manifest.check(folder) is None
    with pytest.raises(MissingFileError, match=NAME):
        manifest.verify(folder)


def test_files_that_it_does_not_list(folder):
    (folder / "README.md").write_text("mine")
    check(folder)


# A change of a file


@pytest.mark.parametrize("name", FILES)
def test_a_bit(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    for find in (check, manifest.verify):
        with pytest.raises(CheckpointError, match=r"checksum mismatch.*interrupted.*edited.*verify=False"):
            find(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_byte_less_or_more(folder, name):
    for data in (FILES[name][:-1], FILES[name] + b"\0"):
        (folder / name).write_bytes(data)
        for find in (manifest.check, manifest.verify):
            with pytest.raises(CheckpointError, match=f"size = {len(data)} bytes; expected {len(FILES[name])}"):
                find(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    for find in (manifest.check, manifest.verify):
        with pytest.raises(MissingFileError):
            find(folder)


def test_a_tokenizer_needs_no_weights(folder):
    (folder / "model.weights.h5").unlink()
    manifest.check(folder, with_weights=False)
    (folder / "config.json").write_bytes(b"[]")
    with pytest.raises(CheckpointError, match="checksum"):
        manifest.check(folder, with_weights=False)


def test_a_link_to_the_outside(folder, tmp_path):
    (tmp_path / "model.weights.h5").write_bytes(FILES["model.weights.h5"])
    (folder / "model.weights.h5").unlink()
    (folder / "model.weights.h5").symlink_to(tmp_path / "model.weights.h5")
    with pytest.raises(CheckpointError, match="a link to"):
        manifest.check(folder)


# While the weights are being read


def test_weights_are_hashed_while_they_are_read(folder):
    (folder / "model.weights.h5").write_bytes(b"\x02" * 70000)
    verification = manifest.check(folder)  # which leaves them for later
    seen = []
    with pytest.raises(CheckpointError, match="checksum"):
        for item in verification.during("abc"):
            seen.append(item)
    assert seen == list("abc")


def test_the_readers_own_error_comes_first_and_ends_the_thread(folder):
    def fail():
        yield 1
        raise KeyError("reader")

    (folder / "model.weights.h5").write_bytes(b"\x02" * 70000)
    with pytest.raises(KeyError, match="reader"):
        list(manifest.check(folder).during(fail()))
    assert not [thread for thread in threading.enumerate() if "verify" in thread.name]


def test_who_reads_no_further_need_not_wait(folder, monkeypatch):
    pieces = []

    def endless(file):
        while len(pieces) < 10**6:  # seconds
            pieces.append(file)
            yield b"x"

    verification = manifest.check(folder)
    monkeypatch.setattr(manifest, "_pieces", endless)
    items = verification.during("abc")
    next(items)
    items.close()
    assert len(pieces) < 10**6
    assert not [thread for thread in threading.enumerate() if "verify" in thread.name]


def test_a_file_that_cannot_be_read(folder, monkeypatch):
    verification = manifest.check(folder)
    (folder / "model.weights.h5").unlink()
    with pytest.raises(ResourceError, match="reading failed"):
        list(verification.during([]))


# A manifest that is not as we write it


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}', '{"format": 1, "format": 1}'])
def test_damaged(folder, text):
    (folder / NAME).write_text(text)
    with pytest.raises(CheckpointError, match=NAME):
        manifest.check(folder)


@pytest.mark.parametrize(
    "changes", [{"format": "1"}, {"format": 0}, {"format": True}, {"format": None}, {"files": []}, {"more": 1}]
)
def test_other_fields(folder, changes):
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match="expected"):
        manifest.check(folder)


def test_of_a_later_version(folder):
    rewrite(folder, format=2, kllama_version="9.0", more=1)
    with pytest.raises(UnsupportedError, match=r'format = 2, written by kllama "9\.0".*newer'):
        manifest.check(folder)


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a//b", "a/../b", "", "a/", "C:/a", "a\\b", ".", "a\0b", "x" * 300]
)
def test_names_that_lead_elsewhere(folder, name):
    rewrite(folder, files={name: {"size": 2, "sha256": ABC}})
    with pytest.raises(CheckpointError, match="expected a plain file name"):
        manifest.check(folder)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        2,
        {},
        {"size": 2},
        {"size": "2", "sha256": ABC},
        {"size": True, "sha256": ABC},
        {"size": -1, "sha256": ABC},
        {"size": 2, "sha256": ABC.upper()},
        {"size": 2, "sha256": ABC[1:]},
        {"size": 2, "sha256": None},
        {"size": 2, "sha256": ABC, "mode": 1},
    ],
)
def test_entries(folder, entry):
    rewrite(folder, files={"config.json": entry})
    with pytest.raises(CheckpointError, match=r'files\["config\.json"\]'):
        manifest.check(folder)


def test_the_same_file_twice(folder):
    text = (folder / NAME).read_text().replace('"config.json"', '"model.weights.h5"')
    (folder / NAME).write_text(text)
    with pytest.raises(CheckpointError, match="twice"):
        manifest.check(folder)
