"""Which reader opens what: told by content, found by built-in name or path, and refused with what to do instead."""

import json
import os
import shutil
from pathlib import Path

import keras_hub
import numpy as np
import pytest

from kllama.checkpoints import catalogue
from kllama.checkpoints.files import manifest
from kllama.checkpoints.formats import open_checkpoint
from kllama.checkpoints.huggingface.reading import HuggingFaceCheckpoint
from kllama.checkpoints.presets.keras_hub import KerasHubCheckpoint
from kllama.checkpoints.presets.reading import PresetCheckpoint
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError
from kllama.models.llama_backbone import LlamaBackbone
from kllama.models.weights import assign_weights, uninitialized_weights
from tests.checkpoints.damage import refuses

pytestmark = pytest.mark.backend_independent

SIZES = {
    "vocabulary_size": 16,
    "num_layers": 1,
    "num_query_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A preset. Copied, never changed."""
    with uninitialized_weights():
        model = LlamaBackbone(**SIZES)
    assign_weights(model, [(weight.path, np.zeros(weight.shape, "float32")) for weight in model.weights])
    folder = tmp_path_factory.mktemp("presets") / "preset"
    model.save_to_preset(str(folder))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A preset, to be changed."""
    return shutil.copytree(saved, tmp_path / "preset", ignore=shutil.ignore_patterns(manifest.NAME))


# What is opened


def test_preset(saved):
    checkpoint = open_checkpoint(saved)
    assert type(checkpoint) is PresetCheckpoint
    assert checkpoint.path == saved


def test_huggingface(assets):
    checkpoint = open_checkpoint(assets / "models" / "stories260K")
    assert type(checkpoint) is HuggingFaceCheckpoint
    assert checkpoint.path == assets / "models" / "stories260K"


@pytest.mark.parametrize("model", ["Llama", "Llama3"])
def test_a_preset_of_kerashub(tmp_path, model):
    backbone = getattr(keras_hub.models, f"{model}Backbone")
    with uninitialized_weights():
        backbone = backbone(**SIZES)
    assign_weights(backbone, [(weight.path, np.zeros(weight.shape, "float32")) for weight in backbone.weights])
    backbone.save_to_preset(str(tmp_path))
    checkpoint = open_checkpoint(tmp_path)
    assert type(checkpoint) is KerasHubCheckpoint
    assert checkpoint.path == tmp_path


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "hf", "preset.keras", "a b"])
def test_names_say_nothing(folder, tmp_path, name):
    folder.rename(tmp_path / name)
    assert type(open_checkpoint(tmp_path / name)) is PresetCheckpoint


def test_kinds_of_path(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    monkeypatch.setenv("HOME", str(saved.parent))
    for handle in (str(saved), saved, "preset", "./preset/", Path("preset"), "~/preset", Path("~/preset")):
        assert type(open_checkpoint(handle)) is PresetCheckpoint
        assert open_checkpoint(handle).path.samefile(saved)


def test_a_link_to_a_directory(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    assert open_checkpoint(tmp_path / "link").path == tmp_path / "link"


# Built-in presets


def test_every_built_in_preset_opens():
    presets = catalogue.builtin_presets()
    assert "stories_1m_en" in presets
    for name, path in presets.items():
        checkpoint = open_checkpoint(name)
        assert type(checkpoint) is PresetCheckpoint
        assert checkpoint.path == path
        assert checkpoint.tokenizer_config is not None


@pytest.fixture
def catalogued(saved, tmp_path, monkeypatch):
    """A kllama package in a folder of its own: give the place of its `presets`, beside or inside the package."""

    def put(place: str) -> Path:
        shutil.copytree(saved, tmp_path / place / "fox_en")
        (tmp_path / place / "no_preset").mkdir()
        monkeypatch.setattr(catalogue, "_PACKAGE", tmp_path / "kllama")
        return tmp_path / place / "fox_en"

    return put


@pytest.mark.parametrize("place", ["presets", "kllama/presets"])
def test_catalogue(catalogued, place):
    path = catalogued(place)
    assert catalogue.builtin_presets() == {"fox_en": path}
    assert open_checkpoint("fox_en").path == path


def test_an_installed_catalogue_wins(catalogued):
    catalogued("presets")
    installed = catalogued("kllama/presets")
    assert catalogue.builtin_presets() == {"fox_en": installed}


def test_a_path_is_no_name(catalogued, folder, monkeypatch):
    built_in = catalogued("presets")
    folder.rename(folder.parent / "fox_en")
    monkeypatch.chdir(folder.parent)
    assert open_checkpoint("fox_en").path == built_in
    for handle in ("./fox_en", Path("fox_en")):
        assert open_checkpoint(handle).path == Path("fox_en")


def test_no_catalogue(monkeypatch, tmp_path):
    monkeypatch.setattr(catalogue, "_PACKAGE", tmp_path / "kllama")
    assert catalogue.builtin_presets() == {}
    with refuses(MissingFileError, "stories_1m_en"):
        open_checkpoint("stories_1m_en")


# What is refused


@pytest.mark.parametrize("handle", [None, 5, b"stories_1m_en", [], {}, True])
def test_no_handle(handle):
    with refuses(TypeError, f"preset ({handle!r}) must be a string or a path"):
        open_checkpoint(handle)


def test_an_empty_handle(saved, monkeypatch):
    monkeypatch.chdir(saved)
    with refuses(ValueError, "preset ('') must be"):
        open_checkpoint("")


@pytest.mark.parametrize(
    "handle", ["stories_1m", "no/such/folder", "/no/such", "a\0b", "x" * 5000, "~nobody-here/model", " stories_1m_en"]
)
def test_nothing_there(handle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refuses(MissingFileError, "stories_1m_en", "kllama preset", "Hugging Face Llama") as caught:
        open_checkpoint(handle)
    assert str(caught.value).startswith(f"{handle}: no such preset")
    assert caught.value.filename == handle


def test_a_dangling_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with refuses(MissingFileError, tmp_path / "link"):
        open_checkpoint(tmp_path / "link")


@pytest.mark.parametrize("handle", ["hf://meta-llama/Llama-3.2-1B", "modelscope://a/b", "s3://a"])
def test_hubs(handle):
    with refuses(UnsupportedError, handle, "a path", "Download"):
        open_checkpoint(handle)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("model", b"", UnsupportedError, "expected a directory"),
        ("model", b"{}", UnsupportedError, "expected a directory"),
        ("model", b"GGUF\3\0\0\0", CheckpointError, "number of tensors"),
        ("model.gguf", b"", CheckpointError, "the file is empty"),
        ("model.gguf", b"{}", CheckpointError, "first bytes"),
    ],
)
def test_a_file(tmp_path, name, content, error, message):
    (tmp_path / name).write_bytes(content)
    with refuses(error, tmp_path / name, message):
        open_checkpoint(tmp_path / name)


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with refuses(UnsupportedError, tmp_path / "pipe", "expected a directory"):
        open_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize("other", [None, "model.weights.h5", "params.json"])
def test_a_directory_without_config(tmp_path, other):
    if other:
        (tmp_path / other).write_bytes(b"x")
    with refuses(MissingFileError, tmp_path, "config.json", "Hugging Face") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.filename == str(tmp_path / "config.json")


@pytest.mark.parametrize("content", [{}, {"architecture": "vit"}, {"class_name": "LlamaBackbone"}])
def test_a_config_of_something_else(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with refuses(UnsupportedError, tmp_path, "config.json", "kllama preset", "Hugging Face"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model_type": "llama", "model_type": "llama"}'])
def test_a_damaged_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with refuses(CheckpointError, tmp_path / "config.json"):
        open_checkpoint(tmp_path)


def test_config_is_a_directory(tmp_path):
    (tmp_path / "config.json").mkdir()
    with refuses(MissingFileError, tmp_path, "no file config.json"):
        open_checkpoint(tmp_path)
