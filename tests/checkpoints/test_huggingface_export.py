"""The files of a Hugging Face directory: which class a model is, what its configuration says, and safetensors."""

import json
import math

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors import safe_open

from kllama.checkpoints.files.reader import SafetensorsFile
from kllama.checkpoints.huggingface.config import backbone_config
from kllama.checkpoints.huggingface.reading import HuggingFaceCheckpoint
from kllama.checkpoints.huggingface.safetensors_writer import SafetensorsWriter
from kllama.checkpoints.huggingface.writing import TOKEN_IDS, write_generation_config, write_model
from kllama.checkpoints.huggingface.written_config import huggingface_config
from kllama.checkpoints.name_map import expected_tensors
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError
from tests.checkpoints.damage import refuses

pytestmark = pytest.mark.backend_independent

# What `LlamaBackbone.get_config` gives, with nothing at its default that a file could be silent about.
BACKBONE = {
    "vocabulary_size": 20,
    "num_layers": 3,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 12,
    "head_dim": 8,
    "max_sequence_length": 77,
    "rope_max_wavelength": 500,
    "rope_scaling": None,
    "layer_norm_epsilon": 1e-4,
    "initializer_range": 0.3,
    "attention_dropout": 0.1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_output_bias": False,
    "qk_norm": False,
    "sliding_window": None,
    "layer_types": None,
    "mlp_bias": False,
    "activation": "gelu_new",
}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
QKV = {"attention_bias": True}
FOUR = {"attention_bias": True, "attention_output_bias": True}
FAMILIES = [
    ("llama", {}),
    ("llama", {"mlp_bias": True}),
    ("llama", FOUR | {"mlp_bias": True}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"hidden_dim": 18}),  # version 5 of transformers has Llamas of whole heads only
    ("mistral", {"hidden_dim": 18, "sliding_window": 5}),
    ("qwen2", QKV),
    ("qwen2", QKV | {"sliding_window": 5}),
    ("qwen2", QKV | {"sliding_window": 5, "layer_types": MIXED}),
    ("qwen3", {"qk_norm": True}),
    ("qwen3", FOUR | {"qk_norm": True, "sliding_window": 5, "layer_types": MIXED}),
]
UNKNOWN = [
    {"attention_output_bias": True},
    FOUR | {"sliding_window": 5},
    QKV | {"mlp_bias": True},
    QKV | {"qk_norm": True},
    {"qk_norm": True, "mlp_bias": True},
    {"sliding_window": 5, "layer_types": MIXED},
    FOUR | {"hidden_dim": 18},
]
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 9.0]}
ORIGINAL = {"original_max_position_embeddings": 11}
SCALINGS = [
    {"rope_type": "linear", "factor": 2},
    {"rope_type": "dynamic", "factor": 3.5},
    {"rope_type": "yarn", "factor": 4, "beta_fast": 20, "truncate": False, **ORIGINAL},
    {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, **ORIGINAL},
    LONGROPE | ORIGINAL,
]


def to_config(changes=(), token_ids=(1, 2, None), has_head=True) -> dict:
    return huggingface_config(
        BACKBONE | dict(changes), "float32", dict(zip(TOKEN_IDS, token_ids, strict=True)), has_head=has_head
    )


def read_back(config: dict) -> dict:
    return backbone_config(json.loads(json.dumps(config)), "config.json")


class TestConfig:
    @pytest.mark.parametrize("model_type, changes", FAMILIES)
    def test_the_flags_name_the_class_and_come_back(self, model_type, changes):
        config = to_config(changes)
        name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type]
        assert (config["model_type"], config["architectures"]) == (model_type, [f"{name}ForCausalLM"])
        read = read_back(config)
        if len(set(read["layer_types"] or ())) == 1:  # one type for all layers is none, as the backbone has it
            read["layer_types"] = None
        assert read == BACKBONE | changes
        assert to_config(changes, has_head=False)["architectures"] == [f"{name}Model"]

    @pytest.mark.parametrize("changes", UNKNOWN)
    def test_flags_that_no_class_has_are_refused(self, changes):
        with refuses(UnsupportedError, "expected a combination", "Qwen3", "preset") as raised:
            to_config(changes)
        traits = set(changes) - {"layer_types", "hidden_dim"} - {"attention_output_bias"}
        assert all(f"{name} = " in str(raised.value).split("; expected")[0] for name in traits)

    @pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
    def test_rope_scaling_for_both_versions(self, scaling):
        config = to_config({"rope_scaling": scaling})
        theirs = {key: value for key, value in config["rope_scaling"].items()}
        assert theirs == scaling and config["rope_theta"] == 500
        assert config["rope_parameters"] == {**scaling, "rope_theta": 500}
        numbers = [value for value in theirs.values() if isinstance(value, int) and not isinstance(value, bool)]
        assert all(value == 11 for value in numbers)  # version 4 warns of a factor that is no float
        assert read_back(config)["rope_scaling"] == scaling
        assert read_back({**config, "rope_scaling": None})["rope_scaling"] == scaling

    def test_what_version_4_fills_in_otherwise_is_spelt_out(self):
        """It needs YaRN's factor; and LongRoPE's factor is the ratio of the lengths, whatever the file says."""
        yarn = to_config({"rope_scaling": {"rope_type": "yarn", **ORIGINAL}})["rope_scaling"]
        assert yarn == {"rope_type": "yarn", "factor": 7.0, **ORIGINAL}
        yarn = to_config({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})["rope_scaling"]
        assert yarn["original_max_position_embeddings"] == 77
        longrope = to_config({"rope_scaling": LONGROPE | ORIGINAL | {"factor": 9}})
        assert longrope["original_max_position_embeddings"] == 11
        assert longrope["rope_scaling"]["attention_factor"] == math.sqrt(1 + math.log(9) / math.log(11))

    def test_no_length_becomes_what_the_scaling_was_made_for(self):
        none = {"max_sequence_length": None}
        assert to_config(none)["max_position_embeddings"] == 2048
        assert to_config(none | {"rope_scaling": SCALINGS[3]})["max_position_embeddings"] == 88

    def test_token_ids_are_never_left_to_the_defaults_of_the_class(self):
        config = to_config(token_ids=(None, 7, 0))
        assert [config[name] for name in TOKEN_IDS] == [None, 7, 0]

    def test_both_names_of_the_dtype(self):
        assert (to_config()["dtype"], to_config()["torch_dtype"]) == ("float32", "float32")

    def test_a_spread_of_random_weights_that_version_5_refuses_is_left_out(self):
        assert "initializer_range" not in to_config({"initializer_range": 1.5})


class TestGenerationConfig:
    NO_IDS = dict.fromkeys(TOKEN_IDS)

    def write(self, folder, settings, token_ids=NO_IDS, stop_ids=()):
        write_generation_config(folder, settings, token_ids, stop_ids)
        file = folder / "generation_config.json"
        return json.loads(file.read_text()) if file.exists() else None

    def test_what_is_known(self, tmp_path):
        settings = {"stop_token_ids": [4], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
        expected = {"bos_token_id": 1, "eos_token_id": [4, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
        assert self.write(tmp_path, settings, ids, [4, 2]) == expected

    def test_one_stop_id(self, tmp_path):
        assert self.write(tmp_path, {}, stop_ids=[4]) == {"eos_token_id": 4}

    def test_nothing_known_is_no_file(self, tmp_path):
        assert self.write(tmp_path, {}) is None

    def test_temperature_0_is_greedy(self, tmp_path):
        assert self.write(tmp_path, {"do_sample": True, "temperature": 0}) == {"do_sample": False}


def draw(shapes: dict, dtype="float32") -> dict:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 1, shape).astype(dtype) for name, shape in shapes.items()}


class TestSafetensors:
    SHAPES = {"b": (3, 5), "a": (2, 1, 2), "c": (7,)}

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_the_library_reads_what_was_written(self, tmp_path, dtype):
        arrays = draw(self.SHAPES, dtype)
        writer = SafetensorsWriter(tmp_path, self.SHAPES, dtype, 1e9)
        for name in ("c", "b", "a"):  # in any order
            writer.write(name, arrays[name])
        assert writer.missing == [] and [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        with safe_open(tmp_path / "model.safetensors", "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            for name, array in arrays.items():
                np.testing.assert_array_equal(file.get_tensor(name), array)
        assert all(tensor.start % 2 == 0 for tensor in SafetensorsFile(tmp_path / "model.safetensors").tensors.values())

    def test_other_dtypes_and_views_are_converted(self, tmp_path):
        array = np.linspace(1, 2, 6).reshape(2, 3)
        writer = SafetensorsWriter(tmp_path, {"a": (3, 2)}, "bfloat16", 1e9)
        writer.write("a", array.T)
        read = SafetensorsFile(tmp_path / "model.safetensors").read("a")
        np.testing.assert_array_equal(read, array.T.astype(bfloat16))

    def test_shards(self, tmp_path):
        arrays = draw(self.SHAPES)
        writer = SafetensorsWriter(tmp_path, self.SHAPES, "float32", 50)  # b alone is larger
        for name, array in arrays.items():
            writer.write(name, array)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
        assert index == {"metadata": {"total_size": 104}, "weight_map": {"b": first, "a": second, "c": second}}
        for name, array in arrays.items():
            np.testing.assert_array_equal(SafetensorsFile(tmp_path / index["weight_map"][name]).read(name), array)

    @pytest.mark.parametrize("dtype, value", [("float16", 1e5), ("bfloat16", 3.4e38), ("float32", np.nan)])
    def test_values_that_are_not_finite_there_are_refused(self, tmp_path, dtype, value):
        writer = SafetensorsWriter(tmp_path, {"a": (2,)}, dtype, 1e9)
        with refuses(CheckpointError, "a in", dtype, "1 of 2"):
            writer.write("a", np.array([1, value], "float32"))

    def test_another_shape_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"\(3, 2\); expected \(2, 3\)"):
            SafetensorsWriter(tmp_path, {"a": (2, 3)}, "float32", 1e9).write("a", np.zeros((3, 2)))


def stored_bytes(folder) -> dict:
    """Give the dtype, the shape and the bytes of each tensor of a directory."""
    files = [SafetensorsFile(file) for file in sorted(folder.glob("*.safetensors"))]
    return {
        name: (tensor.dtype, tensor.shape, file.read(name).tobytes())
        for file in files
        for name, tensor in sorted(file.tensors.items())
    }


class TestModel:
    OPTIONS = {"dtype": "float32", "has_head": True, "max_shard_size": 1, "token_ids": dict.fromkeys(TOKEN_IDS)}

    def tensors(self, config):
        return list(draw({tensor.path: tensor.shape for tensor in expected_tensors(config)}).items())

    def test_tensors_come_back_in_whatever_order_they_came(self, tmp_path):
        config = BACKBONE | FOUR
        tensors = self.tensors(config)
        write_model(tmp_path, config, tensors[::-1], **self.OPTIONS)
        read = dict(HuggingFaceCheckpoint(tmp_path).tensors())
        assert list(read) == [path for path, _ in tensors]
        for path, array in tensors:
            np.testing.assert_array_equal(read[path], array)

    @pytest.mark.parametrize("folder", ["goldens/hf_tiny", "goldens/hf_layouts", "models"])
    def test_files_of_transformers_come_back_byte_by_byte(self, assets, tmp_path, folder):
        for number, path in enumerate(sorted((assets / folder).iterdir())):
            try:
                checkpoint = HuggingFaceCheckpoint(path)
            except (UnsupportedError, MissingFileError):  # GPT-2, a classifier, folders without weights
                continue
            options = self.OPTIONS | {"dtype": checkpoint.dtype, "max_shard_size": 1e-4 if number % 2 else 1}
            target = tmp_path / path.name
            target.mkdir()
            write_model(target, checkpoint.backbone_config, checkpoint.tensors(), **options)
            assert HuggingFaceCheckpoint(target).backbone_config == checkpoint.backbone_config
            assert stored_bytes(target) == stored_bytes(path)
        assert len(list(tmp_path.iterdir())) >= 2

    def test_a_base_model_has_no_head_and_no_prefix(self, tmp_path):
        write_model(tmp_path, BACKBONE, self.tensors(BACKBONE), **self.OPTIONS | {"has_head": False})
        names = SafetensorsFile(tmp_path / "model.safetensors").tensors
        assert "embed_tokens.weight" in names and not any("lm_head" in name for name in names)
        assert not HuggingFaceCheckpoint(tmp_path).has_head

    def test_missing_tensors_are_named(self, tmp_path):
        with refuses(CheckpointError, "no values", "model.norm.weight"):
            tensors = [item for item in self.tensors(BACKBONE) if "sequence_output" not in item[0]]
            write_model(tmp_path, BACKBONE, tensors, **self.OPTIONS)
