"""`upload_preset` on presets of kllama, with stand-ins for the hubs."""

from types import SimpleNamespace

import huggingface_hub
import kagglehub
import pytest

import kllama


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset")
    kllama.LlamaCausalLM(kllama.LlamaBackbone(16, 1, 2, 8, 12, 1)).save_to_preset(str(folder))
    return folder


def test_to_kaggle(preset, monkeypatch):
    uploads = []
    monkeypatch.setattr(kagglehub, "model_upload", lambda handle, folder: uploads.append((handle, folder)))
    kllama.upload_preset("kaggle://me/fox/keras/fox_1m", str(preset))
    assert uploads == [("me/fox/keras/fox_1m", str(preset))]


def test_to_hugging_face(preset, monkeypatch):
    files = {}

    def upload_folder(repo_id, folder_path):
        files[repo_id] = {path.name for path in preset.iterdir()}, (preset / "README.md").read_text()

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo_id, exist_ok: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda repo_id, filename: False)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    kllama.upload_preset("hf://me/fox", str(preset))
    names, card = files["me/fox"]
    assert {"config.json", "task.json", "model.weights.h5", "metadata.json"} <= names
    assert "`CausalLM`" in card and "**hidden_dim:** 8" in card


def test_what_is_no_preset(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        kllama.upload_preset("kaggle://me/fox/keras/fox_1m", str(tmp_path))
