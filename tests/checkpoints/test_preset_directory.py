"""What becomes of a preset directory that is saved to again, whole or in part, and how its manifest guards it."""

import json
import os
import shutil
from pathlib import Path

import keras_hub
import pytest

from kllama.checkpoints.files import manifest
from kllama.checkpoints.files.undisturbed import undisturbed
from kllama.checkpoints.presets.directory import staged_preset
from kllama.checkpoints.presets.reading import PresetCheckpoint
from kllama.errors import CheckpointError, ResourceError
from kllama.models.llama_backbone import LlamaBackbone
from kllama.models.llama_causal_lm import LlamaCausalLM
from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.tokenizer import LlamaTokenizer
from tests.letters import letters

pytestmark = pytest.mark.backend_independent

SHARDS = 3e-7  # GB
ASSET = "assets/tokenizer/tokenizer.json"
TOKENIZER = {"tokenizer.json", ASSET}
BACKBONE = {"config.json", "metadata.json", "model.weights.h5"}
WHOLE = BACKBONE | TOKENIZER | {"task.json", "preprocessor.json", manifest.NAME}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody cuts the power: what is said to be synced need not be."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def backbone(theta: float = 10000) -> LlamaBackbone:
    return LlamaBackbone(8, 1, 1, 4, 4, 1, rope_max_wavelength=theta)


@pytest.fixture(scope="module")
def model() -> LlamaCausalLM:
    return LlamaCausalLM(backbone(), LlamaCausalLMPreprocessor(letters(), 8))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("presets") / "preset"
    model.save_to_preset(str(folder))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "preset")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def theta(folder: Path) -> float:
    manifest.verify(folder)
    return PresetCheckpoint(folder).backbone_config["rope_max_wavelength"]


# The whole directory


def test_a_new_one(folder, tmp_path):
    assert names(folder) == WHOLE
    assert manifest.read(folder).keys() == WHOLE - {manifest.NAME}
    assert os.listdir(tmp_path) == ["preset"]


@pytest.mark.parametrize("shards", [(None, SHARDS), (SHARDS, None)], ids=["one file, then shards", "the reverse"])
def test_again_in_another_layout(tmp_path, shards):
    for number, size in enumerate(shards):
        LlamaCausalLM(backbone(100 + number)).save_to_preset(tmp_path, max_shard_size=size)
        assert theta(tmp_path) == 100 + number
        assert ("model.weights.json" in names(tmp_path)) == (size is not None)
        assert ("model.weights.h5" in names(tmp_path)) == (size is None)


def test_fewer_files_than_before(folder):
    LlamaCausalLM(backbone(7)).save_to_preset(folder)
    assert names(folder) == BACKBONE | {"task.json", manifest.NAME}


def test_over_a_preset_of_keras_hub(tmp_path, model):
    keras_hub.models.LlamaBackbone(8, 1, 1, 4, 4, 1).save_to_preset(str(tmp_path))
    model.save_to_preset(tmp_path)
    assert names(tmp_path) == WHOLE


@pytest.mark.parametrize("name", ["notes.txt", "runs/", "model.safetensors", "assets/a.png", "assets/a/b/merges.txt"])
def test_beside_somebody_elses_files(folder, model, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("mine")
    for part in (model, model.backbone, model.preprocessor, model.preprocessor.tokenizer):
        with pytest.raises(ValueError, match=r"holds .*, which no preset has.*overwrite=True") as caught:
            part.save_to_preset(folder)
        assert name in str(caught.value)
    assert (folder / name).exists()
    model.backbone.save_to_preset(folder, overwrite=True)
    assert (folder / name).exists() and theta(folder) == 10000
    model.save_to_preset(folder, overwrite=True)
    assert names(folder) == WHOLE


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("x" * 300, ResourceError, "File name too long"),
        ("file", ValueError, "a file; expected a directory"),
        ("file/preset", ResourceError, "cannot be written"),
        ("", ValueError, "must not be empty"),
        (5, TypeError, "must be a string or a path"),
    ],
)
def test_no_place_for_a_preset(tmp_path, model, monkeypatch, name, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for part in (model, model.backbone, model.preprocessor, model.preprocessor.tokenizer):
        with pytest.raises(error, match=message):
            part.save_to_preset(name)
        with pytest.raises(TypeError, match="overwrite"):
            part.save_to_preset("new", overwrite="no")
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_to_a_directory_is_somebody_elses(folder, model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("mine")
    shutil.rmtree(folder / "assets")
    (folder / "assets").symlink_to(tmp_path / "photos")
    with pytest.raises(ValueError, match="assets"):
        model.save_to_preset(folder)
    model.backbone.save_to_preset(folder, overwrite=True)
    assert (folder / "assets").is_symlink()
    model.save_to_preset(folder, overwrite=True)
    assert (tmp_path / "photos" / "a.png").exists()


# A part


def test_one_part_after_another(tmp_path):
    letters().save_to_preset(tmp_path)
    assert names(tmp_path) == TOKENIZER | {manifest.NAME}
    backbone(3).save_to_preset(tmp_path)
    assert names(tmp_path) == TOKENIZER | BACKBONE | {manifest.NAME}
    LlamaCausalLMPreprocessor(letters(), 5).save_to_preset(tmp_path)
    assert names(tmp_path) == WHOLE - {"task.json"}
    assert theta(tmp_path) == 3
    assert LlamaCausalLMPreprocessor.from_preset(tmp_path).sequence_length == 5


@pytest.mark.parametrize("shards", [None, SHARDS])
def test_a_backbone_drops_the_old_weights_and_the_task(folder, model, shards):
    model.save_to_preset(folder, max_shard_size=SHARDS if shards is None else None)
    backbone(3).save_to_preset(folder, max_shard_size=shards)
    assert theta(folder) == 3
    assert "task.json" not in names(folder)
    assert TOKENIZER | {"preprocessor.json"} <= names(folder)


def test_a_tokenizer_keeps_the_weights_as_they_are(folder):
    before = (folder / "model.weights.h5").stat()
    letters(pad_token="a").save_to_preset(folder)
    assert (folder / "model.weights.h5").stat().st_ino == before.st_ino
    assert theta(folder) == 10000 and "task.json" in names(folder)
    assert LlamaTokenizer.from_preset(folder).pad_token == "a"


def test_where_nothing_can_be_linked(folder, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    letters(pad_token="a").save_to_preset(folder)
    assert theta(folder) == 10000
    assert LlamaTokenizer.from_preset(folder).pad_token == "a"


def test_a_part_does_not_bless_what_was_damaged_before(folder):
    (folder / ASSET).write_bytes((folder / ASSET).read_bytes().replace(b"false", b"true "))
    backbone(3).save_to_preset(folder)
    with pytest.raises(CheckpointError, match="checksum"):
        PresetCheckpoint(folder)


def test_a_tokenizer_of_another_name(tmp_path):
    letters(config_file="letters.json").save_to_preset(tmp_path)
    letters(config_file="letters.json", pad_token="a").save_to_preset(tmp_path)
    assert names(tmp_path) == {"letters.json", "assets/letters/tokenizer.json", manifest.NAME}
    assert json.loads((tmp_path / "letters.json").read_text())["config"]["pad_token"] == "a"


def test_a_part_that_fails_leaves_everything(folder, model):
    with pytest.raises(KeyError), staged_preset(folder, "config.json") as staging:
        (staging / "config.json").write_text("half")
        raise KeyError
    assert names(folder) == WHOLE and theta(folder) == 10000
    model.save_to_preset(folder)  # nothing still takes the directory for staged


# What the manifest guards


@pytest.mark.parametrize("name", sorted(WHOLE - {manifest.NAME}))
def test_an_edited_file(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    # What is no JSON any more is found when the format is recognised, before that.
    with pytest.raises(CheckpointError, match=f"{name}: (checksum mismatch.*verify=False|line)"):
        LlamaCausalLM.from_preset(folder)


def test_an_edit_that_was_meant(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rope_max_wavelength": 10000', '"rope_max_wavelength": 20000'))
    with pytest.raises(CheckpointError, match="checksum|size"):
        LlamaBackbone.from_preset(folder)
    assert LlamaCausalLM.from_preset(folder, verify=False).backbone.rope_max_wavelength == 20000
    (folder / manifest.NAME).unlink()
    assert LlamaBackbone.from_preset(folder).rope_max_wavelength == 20000


def test_tokenizer_and_preprocessor_alone(folder):
    (folder / "model.weights.h5").unlink()
    LlamaTokenizer.from_preset(folder)
    (folder / ASSET).write_bytes((folder / ASSET).read_bytes().replace(b"false", b"true "))
    for part in (LlamaTokenizer, LlamaCausalLMPreprocessor):
        with pytest.raises(CheckpointError, match="checksum"):
            part.from_preset(folder)


def test_a_second_set_of_weights_is_not_the_manifests(folder, tmp_path, model):
    model.save_to_preset(tmp_path / "shards", max_shard_size=SHARDS)
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, folder)
    assert theta(folder) == 10000
    with pytest.raises(CheckpointError, match="two weight sets"):
        LlamaBackbone.from_preset(folder, verify=False)
    (folder / manifest.NAME).unlink()
    with pytest.raises(CheckpointError, match="two weight sets"):
        LlamaBackbone.from_preset(folder)


# An interrupted save, and one meanwhile


def test_what_is_being_saved_does_not_load(folder, tmp_path):
    with staged_preset(tmp_path / "new") as staging:
        shutil.copytree(folder, staging, dirs_exist_ok=True)
        for part in (LlamaCausalLM, LlamaBackbone, LlamaTokenizer):
            with pytest.raises(CheckpointError, match="interrupted save"):
                part.from_preset(staging)
    LlamaCausalLM.from_preset(tmp_path / "new")


def test_what_had_been_moved_away_is_found(folder, tmp_path):
    hidden = tmp_path / ".preset.saving-00000000"
    (hidden / "old").mkdir(parents=True)
    (hidden / "save.incomplete").touch()
    folder.rename(hidden / "old" / "preset")
    assert LlamaBackbone.from_preset(folder).rope_max_wavelength == 10000
    assert folder.is_dir()


class Reader:
    """Reads twice from a directory, which is replaced a number of times in between."""

    def __init__(self, folder: Path, replacements: int):
        self.folder, self.replacements = folder, replacements

    def _read(self) -> int:
        return json.loads((self.folder / "config.json").read_text())["config"]["rope_max_wavelength"]

    @undisturbed
    def load(self, preset, error=None):
        first = self._read()
        if self.replacements:
            self.replacements -= 1
            backbone(first + 1).save_to_preset(preset)
            if error is not None:
                raise error
        return first, self._read()


@pytest.mark.parametrize("error", [None, CheckpointError("a mix"), ResourceError("gone")])
def test_a_load_starts_anew(folder, error):
    assert Reader(folder, 0).load(folder) == (10000, 10000)
    assert Reader(folder, 2).load(str(folder), error=error) == (10002, 10002)


def test_a_load_does_not_start_anew_for_ever(folder):
    with pytest.raises(ResourceError, match="replaced 10 times"):
        Reader(folder, 99).load(folder)


def test_errors_of_a_directory_that_stays(folder):
    @undisturbed
    def load(cls, preset):
        calls.append(preset)
        raise CheckpointError("damaged")

    for preset in (folder, "stories_1m_en", folder / "no", "a\0b", 5):
        calls = []
        with pytest.raises(CheckpointError, match="damaged"):
            load(None, preset)
        assert len(calls) == 1
