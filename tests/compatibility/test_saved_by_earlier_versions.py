"""What a version of kllama saved loads in every later one: configs, weights, presets, `.keras` files."""

import json

import keras
import numpy as np
import pytest

import kllama
from tests.compatibility.make_sample import BACKBONES, FOLDER, build, outputs

VERSIONS = sorted(path for path in FOLDER.glob("v*") if path.is_dir())
PRESETS = [path for version in VERSIONS for path in sorted(version.glob("preset_*")) if path.is_dir()]
# Sums of bfloat16 products and of int8 ones depend on the backend.
TOLERANCES = {"preset_bfloat16_shards": 0.15, "preset_int8": 2e-2}


def check(model: kllama.LlamaCausalLM, expected: dict, tolerance: float = 1e-4) -> None:
    """Compare a model with what its version recorded; texts only where logits are exact."""
    given = outputs(model)
    np.testing.assert_allclose(given.pop("logits"), expected["logits"], atol=tolerance)
    for name, value in given.items():
        if name != "text" or tolerance <= 1e-4:
            assert value == expected[name], name


def named(path):
    return f"{path.parent.name}-{path.name}"


def read(path):
    return json.loads(path.read_text())


def test_the_present_version_has_a_sample():
    assert FOLDER / f"v{kllama.__version__}" in VERSIONS


@pytest.mark.parametrize("path", PRESETS, ids=named)
def test_presets(path):
    model = kllama.LlamaCausalLM.from_preset(path)
    assert model.preprocessor.sequence_length == 32 and model.preprocessor.truncate == "left"
    check(model, read(path.with_suffix(".json")), TOLERANCES.get(path.name, 1e-4))


@pytest.mark.parametrize("path", [path for v in VERSIONS for path in sorted(v.glob("*.keras"))], ids=named)
def test_keras_files(path):
    model = keras.saving.load_model(path)
    assert type(model) is kllama.LlamaCausalLM
    check(model, read(path.with_name(f"preset_{path.stem}.json")))


@pytest.mark.parametrize("path", [path for v in VERSIONS for path in sorted(v.glob("config_*.json"))], ids=named)
def test_configs(path):
    model = keras.saving.deserialize_keras_object(read(path))
    assert type(model) is kllama.LlamaCausalLM
    name = path.stem.removeprefix("config_")
    config = model.backbone.get_config()
    assert {key: config[key] for key in BACKBONES[name]} == BACKBONES[name]


@pytest.mark.parametrize("path", [path for v in VERSIONS for path in sorted(v.glob("*.weights.h5"))], ids=named)
def test_weight_files(path):
    name = path.name.removesuffix(".weights.h5")
    model = build(BACKBONES[name])
    model.load_weights(path)
    check(model, read(path.with_name(f"preset_{name}.json")))


@pytest.mark.parametrize("path", [path for v in VERSIONS for path in sorted(v.glob("*.lora.h5"))], ids=named)
def test_lora_files(path):
    model = kllama.LlamaCausalLM.from_preset(path.with_name(f"preset_{path.name.removesuffix('.lora.h5')}"))
    model.backbone.load_lora_weights(path)
    check(model, read(path.with_suffix(".json")))
