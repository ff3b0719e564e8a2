"""Thousands of damaged Hugging Face directories: each is refused by name, or means what a slow reader says it means."""

import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kllama.checkpoints.huggingface.reading import HuggingFaceCheckpoint
from kllama.checkpoints.name_map import expected_tensors
from kllama.errors import KllamaError
from tests.checkpoints.mutation import mutate

pytestmark = pytest.mark.backend_independent

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 4,
    "intermediate_size": 4,
    "head_dim": 4,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
# What a key means, and what it means to lack it, written out by hand.
ARGUMENTS = {
    "vocab_size": ("vocabulary_size", None),
    "num_hidden_layers": ("num_layers", None),
    "num_attention_heads": ("num_query_heads", None),
    "hidden_size": ("hidden_dim", None),
    "intermediate_size": ("intermediate_dim", None),
    "rms_norm_eps": ("layer_norm_epsilon", 1e-6),
    "max_position_embeddings": ("max_sequence_length", 2048),
    "hidden_act": ("activation", "silu"),
}
VALUES = [
    None,
    0,
    1,
    2,
    3,
    8,
    -1,
    0.5,
    1e-6,
    1e300,
    10**9,
    2**64,
    True,
    False,
    "",
    "2",
    "silu",
    "gelu",
    [],
    {},
    "llama",
]
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def make_directory(folder: Path) -> None:
    shapes = {tensor.name: tensor.stored_shape for tensor in expected_tensors(HuggingFaceConfig(CONFIG).arguments())}
    rng = np.random.default_rng(0)
    save_file(
        {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))


class HuggingFaceConfig:
    """The slow reader of a `config.json`."""

    def __init__(self, content: dict):
        self.content = content

    def arguments(self) -> dict:
        content = self.content
        heads = content["num_attention_heads"]
        biases = content.get("attention_bias", False)
        given = {argument: content.get(key, default) for key, (argument, default) in ARGUMENTS.items()}
        groups, head_dim = content.get("num_key_value_heads"), content.get("head_dim")
        rope = dict(content.get("rope_scaling") or content.get("rope_parameters") or {})
        theta = rope.pop("rope_theta", content.get("rope_theta", 10000.0))
        rope_type = rope.pop("rope_type", rope.pop("type", "default"))
        return given | {
            "num_key_value_heads": heads if groups is None else groups,
            "head_dim": content["hidden_size"] // heads if head_dim is None else head_dim,
            "tie_word_embeddings": content.get("tie_word_embeddings", False),
            "attention_bias": biases,
            "attention_output_bias": biases,
            "mlp_bias": content.get("mlp_bias", False),
            "qk_norm": False,
            "sliding_window": None,
            "layer_types": None,
            "rope_max_wavelength": 10000.0 if theta is None else theta,
            "rope_scaling": None if rope_type == "default" else {"rope_type": rope_type, **rope},
            "attention_dropout": content.get("attention_dropout", 0.0),
            "initializer_range": content.get("initializer_range", 0.02),
        }


def read_slowly(file: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file by its definition."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[8 + size + begin : 8 + size + end], DTYPES[entry["dtype"]])
        tensors[name] = tensors[name].reshape(entry["shape"])
    return tensors


def change_values(content: dict, seed: int) -> dict:
    """Change one to three values of a JSON object, at its top or one level below."""
    random_ = random.Random(seed)
    changed = json.loads(json.dumps(content))
    for _ in range(random_.randint(1, 3)):
        inner = [value for value in changed.values() if isinstance(value, dict) and value]
        place = random_.choice(inner) if inner and random_.random() < 0.2 else changed
        key = random_.choice(list(place))
        match random_.randrange(5):
            case 0:
                del place[key]
            case 1:
                place[f"{key}s"] = place.pop(key)
            case 2 if type(place[key]) in (int, float):
                place[key] *= random_.choice((2, 0.5, -1, 1.0, 10**6))
            case _:
                place[key] = random_.choice(VALUES)
        if not changed:
            return changed
    return changed


def damage(source: Path, folder: Path, seed: int) -> None:
    """Write one damaged directory: the configuration or the weights, by bytes or by values."""
    weights, config = (source / "model.safetensors").read_bytes(), (source / "config.json").read_bytes()
    header_size = int.from_bytes(weights[:8], "little")
    match seed % 4:
        case 0:
            weights = mutate(weights, seed, [range(0, 8 + header_size)])
        case 1:
            config = mutate(config, seed)
        case 2:
            config = json.dumps(change_values(json.loads(config), seed)).encode()
        case 3:
            header = json.loads(weights[8 : 8 + header_size])
            name = random.Random(seed).choice([key for key in header if key != "__metadata__"])
            header = json.dumps({**header, name: change_values(header[name], seed)}).encode()
            weights = len(header).to_bytes(8, "little") + header + weights[8 + header_size :]
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_bytes(config)


def check_mutants(source: Path, folder: Path, count: int) -> Counter:
    """Open damaged directories, the seeds being 0 to `count` - 1, and count what became of them."""
    outcomes = Counter()
    for seed in range(count):
        damage(source, folder, seed)
        start = time.monotonic()
        try:
            checkpoint = HuggingFaceCheckpoint(folder)
            tensors = dict(checkpoint.tensors())
        except KllamaError as error:
            assert "\n" not in str(error), seed
            outcomes["refused"] += 1
            continue
        finally:
            assert time.monotonic() - start < 5, seed
        outcomes["read"] += 1
        expected = HuggingFaceConfig(json.loads((folder / "config.json").read_text())).arguments()
        assert checkpoint.backbone_config == expected, seed
        stored = read_slowly(folder / "model.safetensors")
        names = {tensor.name: tensor for tensor in expected_tensors(expected)}
        assert stored.keys() - {"lm_head.weight"} == names.keys() - {"lm_head.weight"}, seed
        assert tensors.keys() == {tensor.path for tensor in names.values()}, seed
        for name, tensor in names.items():
            given = tensor.to_stored(np.ascontiguousarray(tensors[tensor.path]))
            assert given.tobytes() == stored[name].tobytes() and given.shape == stored[name].shape, (seed, name)
    return outcomes


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    source, folder = tmp_path / "sound", tmp_path / "damaged"
    source.mkdir()
    folder.mkdir()
    make_directory(source)
    assert HuggingFaceCheckpoint(source).backbone_config == HuggingFaceConfig(CONFIG).arguments()
    return source, folder


def test_mutants(folders):
    outcomes = check_mutants(*folders, 300)
    assert outcomes["refused"] > 150 and outcomes["read"] > 8


@pytest.mark.slow
def test_many_mutants(folders):
    print(check_mutants(*folders, 10_000))
