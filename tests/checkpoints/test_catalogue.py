"""Names and Kaggle handles: which there are, what is downloaded for them, and what is said when that fails."""

import builtins
import json
import shutil
import sys
from pathlib import Path

import kagglehub
import keras_hub
import pytest
import requests
from kagglehub.exceptions import CredentialError, KaggleApiHTTPError
from keras_hub.src.models.llama.llama_presets import backbone_presets as llama_presets
from keras_hub.src.models.llama3.llama3_presets import backbone_presets as llama3_presets

from kllama.checkpoints import catalogue
from kllama.checkpoints.formats import open_checkpoint, open_tokenizer
from kllama.checkpoints.presets.reading import PresetCheckpoint
from kllama.errors import MissingFileError, ResourceError
from tests.checkpoints.damage import refuses

pytestmark = pytest.mark.backend_independent

KERAS_HUB = {**llama_presets, **llama3_presets}


@pytest.fixture
def downloads(monkeypatch, tmp_path) -> list[str]:
    """Let kagglehub give a copy of the built-in preset, and list what it is asked for."""
    folder = shutil.copytree(catalogue.builtin_presets()["stories_1m_en"], tmp_path / "download")
    asked = []
    monkeypatch.setattr(kagglehub, "model_download", lambda handle: asked.append(handle) or str(folder))
    return asked


def test_lists_what_keras_hub_lists():
    presets = catalogue.kaggle_presets()
    assert list(presets) == list(KERAS_HUB)
    assert len(presets) == 17
    for name, preset in presets.items():
        assert preset["kaggle_handle"] == KERAS_HUB[name]["kaggle_handle"]
        assert preset["params"] == KERAS_HUB[name]["metadata"]["params"]
        assert preset["description"].endswith(".")
        assert preset.keys() == {"kaggle_handle", "params", "description"}


def test_the_file_is_no_built_in_preset():
    assert "stories_1m_en" in catalogue.builtin_presets()
    assert catalogue.builtin_presets().keys().isdisjoint(catalogue.kaggle_presets())
    assert "catalogue.json" not in catalogue.builtin_presets()


def test_entries_for_keras_hub():
    entries = catalogue.keras_hub_entries()
    assert entries.keys() == {*KERAS_HUB, *catalogue.builtin_presets()}
    assert entries["llama3.2_1b"]["kaggle_handle"] == "kaggle://keras/llama3/keras/llama3.2_1b/1"
    assert entries["llama3.2_1b"]["metadata"]["params"] == 1498482688
    assert Path(entries["stories_1m_en"]["kaggle_handle"]).is_dir()


@pytest.mark.parametrize("name", ["llama2_7b_en", "llama3.2_instruct_1b"])
def test_a_name(downloads, name):
    assert type(open_checkpoint(name)) is PresetCheckpoint
    assert type(open_tokenizer(name)).__name__ == "PresetTokenizer"
    assert downloads == [KERAS_HUB[name]["kaggle_handle"].removeprefix("kaggle://")] * 2


@pytest.mark.parametrize("handle", ["keras/llama2/keras/llama2_7b_en/3", "someone/my.fox/keras/fox-2", "a/b/c/d/12"])
def test_a_handle(downloads, handle):
    assert type(open_checkpoint(f"kaggle://{handle}")) is PresetCheckpoint
    assert downloads == [handle]


def test_the_folder_is_opened_like_any_other(downloads, tmp_path):
    (tmp_path / "download" / "config.json").unlink()
    with refuses(MissingFileError, tmp_path / "download", "config.json"):
        open_checkpoint("llama2_7b_en")


@pytest.mark.parametrize("path", ["./llama2_7b_en", Path("llama2_7b_en")])
def test_a_path_is_no_name(downloads, tmp_path, monkeypatch, path):
    (tmp_path / "download").rename(tmp_path / "llama2_7b_en")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(path).path == Path("llama2_7b_en")
    assert not downloads


def test_nothing_is_downloaded_for_what_is_here(downloads):
    open_checkpoint("stories_1m_en")
    assert not downloads


@pytest.mark.parametrize(
    "handle",
    ["", "a", "a/b/c", "a/b/c/d/e", "a/b/c/d/1/2", "a/b/c/../1", "a/ b/c/d", "a//c/d", "a/b/c/d\n", "../a/b/c"],
)
def test_no_handle(downloads, handle):
    with pytest.raises(ValueError, match="expected kaggle://owner/model/framework/variation"):
        open_checkpoint(f"kaggle://{handle}")
    assert not downloads


# Downloads that fail


def http_error(status: int) -> KaggleApiHTTPError:
    response = requests.Response()
    response.status_code = status
    return KaggleApiHTTPError(f"{status} Client Error.\n\nSee https://www.kaggle.com", response=response)


@pytest.mark.parametrize(
    "raised, error, parts",
    [
        (http_error(404), MissingFileError, ["no such preset (404)"]),
        (http_error(403), ResourceError, ["refuses access (403)", "Accept the terms", "kagglehub.login()"]),
        (http_error(401), ResourceError, ["refuses access (401)", "kagglehub.login()"]),
        (http_error(500), ResourceError, ["500 Client Error.", "Check the network"]),
        (requests.ConnectionError("no route\nto host"), ResourceError, ["no route to host", "Check the network"]),
        (requests.Timeout("15 s"), ResourceError, ["Timeout: 15 s"]),
        (OSError(28, "No space left on device"), ResourceError, ["No space left on device"]),
        (CredentialError("x" * 5000), ResourceError, ["CredentialError", "pass its folder"]),
    ],
    ids=["404", "403", "401", "500", "no network", "timeout", "full disk", "credentials"],
)
def test_a_download_that_fails(monkeypatch, raised, error, parts):
    def fail(handle):
        raise raised

    monkeypatch.setattr(kagglehub, "model_download", fail)
    with refuses(error, "kaggle://keras/llama2/keras/llama2_7b_en/3", *parts) as caught:
        open_checkpoint("llama2_7b_en")
    assert caught.value.__cause__ is raised
    assert len(str(caught.value)) < 600


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with refuses(ResourceError, "kaggle://keras/llama2/keras/llama2_7b_en/3", "pip install kagglehub"):
        open_checkpoint("llama2_7b_en")


def test_importing_kllama_imports_no_kagglehub(monkeypatch):
    imported = []
    original = builtins.__import__

    def watch(name, *arguments, **keywords):
        imported.append(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", watch)
    open_checkpoint("stories_1m_en")
    assert "kagglehub" not in imported


# Names that are nearly right


@pytest.mark.parametrize(
    "name, near",
    [
        ("llama2_7b", "llama2_7b_en"),
        ("llama3.2_1B", "llama3.2_1b"),
        ("stories_1m", "stories_1m_en"),
        ("vicuna_7b_en", "vicuna_1.5_7b_en"),
    ],
)
def test_near_matches(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refuses(MissingFileError, f"{name}: no such preset", "Did you mean", near):
        open_checkpoint(name)


def test_no_near_match():
    with refuses(MissingFileError, "zzz: no such preset") as caught:
        open_checkpoint("zzz")
    assert "Did you mean" not in str(caught.value)


def test_the_file_reads_well():
    file = Path(catalogue.__file__).resolve().parents[2] / "presets" / "catalogue.json"
    text = file.read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2) + "\n"


def test_keras_hub_finds_the_names_of_a_class():
    from kllama.models.llama_backbone import LlamaBackbone
    from kllama.models.llama_causal_lm import LlamaCausalLM

    for cls in (LlamaBackbone, LlamaCausalLM):
        assert cls.presets.keys() >= {*KERAS_HUB, "stories_1m_en"}
    for cls in (keras_hub.models.LlamaBackbone, keras_hub.models.Llama3Backbone):
        assert all(cls.presets[name] == entry for name, entry in KERAS_HUB.items() if name in cls.presets)
