"""The sampler of a preset: what KerasHub serializes comes back, and nothing else of the file is handed on."""

import json
import shutil
from pathlib import Path

import keras_hub
import pytest

from kllama.checkpoints.files import manifest
from kllama.checkpoints.presets.reading import PresetCheckpoint
from kllama.checkpoints.presets.sampler import read_sampler
from kllama.errors import CheckpointError, UnsupportedError
from kllama.models.llama_backbone import LlamaBackbone
from kllama.models.llama_causal_lm import LlamaCausalLM
from tests.checkpoints.damage import change_config, change_json, refuses

pytestmark = pytest.mark.backend_independent

SAMPLERS = {
    "greedy": keras_hub.samplers.GreedySampler(temperature=0.5),
    "random": keras_hub.samplers.RandomSampler(seed=0),
    "top_k": keras_hub.samplers.TopKSampler(k=3, seed=7),
    "top_p": keras_hub.samplers.TopPSampler(p=0.7, k=9),
    "beam": keras_hub.samplers.BeamSampler(num_beams=2, return_all_beams=True),
    "contrastive": keras_hub.samplers.ContrastiveSampler(k=4, alpha=0.2),
}
NAMES = [*SAMPLERS, "auto", "speculative"]
FILE = Path("task.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    backbone = LlamaBackbone(
        vocabulary_size=8, num_layers=1, num_query_heads=1, hidden_dim=4, intermediate_dim=4, num_key_value_heads=1
    )
    folder = tmp_path_factory.mktemp("sampler") / "preset"
    LlamaCausalLM(backbone).save_to_preset(str(folder))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "preset", ignore=shutil.ignore_patterns(manifest.NAME))


def serialized(**changes) -> dict:
    return {**keras_hub.samplers.serialize(SAMPLERS["top_k"]), **changes}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler(folder, name):
    change_config(folder / FILE, sampler=keras_hub.samplers.serialize(SAMPLERS[name]))
    sampler = keras_hub.samplers.get(PresetCheckpoint(folder).sampler)
    assert type(sampler) is type(SAMPLERS[name])
    assert sampler.get_config() == SAMPLERS[name].get_config()


@pytest.mark.parametrize("name", NAMES)
def test_a_name(folder, name):
    change_config(folder / FILE, sampler=name)
    assert PresetCheckpoint(folder).sampler == name


def test_where_the_file_does_not_say(folder):
    change_json(folder / FILE, lambda content: content["config"].pop("sampler"))
    assert PresetCheckpoint(folder).sampler == "auto"
    (folder / FILE).unlink()
    assert PresetCheckpoint(folder).sampler == "auto"


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_form_that_a_caller_wrote(name):
    """What it leaves out is what KerasHub's class takes it to be."""
    sampler = type(SAMPLERS[name])()
    for class_name in (name, f"keras_hub>{type(sampler).__name__}"):
        read = keras_hub.samplers.get(read_sampler(FILE, {"class_name": class_name, "config": {}}))
        assert type(read) is type(sampler) and read.get_config() == sampler.get_config()


def test_nothing_else_is_handed_on():
    read = read_sampler(FILE, serialized(module="os", class_name="system"))
    assert read == {"class_name": "keras_hub>TopKSampler", "config": SAMPLERS["top_k"].get_config()}


@pytest.mark.parametrize(
    "sampler",
    [
        "top_q",
        "",
        "TopKSampler",
        serialized(registered_name="my>TopKSampler"),
        serialized(registered_name="TopKSampler"),
        serialized(registered_name="keras_hub>SpeculativeSampler"),
        {"class_name": "TopKSampler", "config": {}},
        {"module": "os", "class_name": "system", "config": {"command": "ls"}},
    ],
    ids=str,
)
def test_another_class(folder, sampler):
    change_config(folder / FILE, sampler=sampler)
    checkpoint = PresetCheckpoint(folder)
    assert len(dict(checkpoint.tensors())) == 12
    with refuses(UnsupportedError, folder / FILE, "sampler = ", "pass sampler= to from_preset"):
        _ = checkpoint.sampler


@pytest.mark.parametrize("sampler", [None, 5, True, ["top_k"], [], 0.5])
def test_neither_form(folder, sampler):
    change_config(folder / FILE, sampler=sampler)
    checkpoint = PresetCheckpoint(folder)
    with refuses(CheckpointError, folder / FILE, f"sampler = {json.dumps(sampler)}; expected"):
        _ = checkpoint.sampler


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"zoom": 1}, 'unknown keys: "zoom"'),
        ({"build_config": {}}, 'unknown keys: "build_config"'),
        ({"config": None}, "config = null"),
        ({"config": [5]}, "config = [5]"),
        ({"class_name": 5}, "class_name = 5"),
        ({"registered_name": ["x"]}, 'registered_name = ["x"]'),
    ],
)
def test_another_form(changes, part):
    with refuses(CheckpointError, f"{FILE}: sampler", part):
        read_sampler(FILE, serialized(**changes))


@pytest.mark.parametrize(
    "name, field, values",
    [
        ("greedy", "temperature", ["1", None, True, [1]]),
        ("greedy", "k", [5]),
        ("random", "seed", [-1, 1.0, "0", False]),
        ("top_k", "k", [0, 5.0, "5", True, {"class_name": "system"}]),
        ("top_k", "p", [0.5]),
        ("top_p", "p", [None, "0.1"]),
        ("top_p", "k", [0, 2.5]),
        ("beam", "num_beams", [0, None, 2.0]),
        ("beam", "return_all_beams", [0, None, "true"]),
        ("beam", "seed", [0]),
        ("contrastive", "k", [None, 0]),
        ("contrastive", "alpha", [None, "0.6"]),
    ],
)
def test_wrong_fields(name, field, values):
    sampler = keras_hub.samplers.serialize(SAMPLERS[name])
    for value in values:
        changed = {**sampler, "config": {**sampler["config"], field: value}}
        with refuses(CheckpointError, f"{FILE}: sampler", field):
            read_sampler(FILE, changed)
