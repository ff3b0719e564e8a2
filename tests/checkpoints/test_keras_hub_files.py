"""Presets of KerasHub's Llama classes: what each file says is read, and each kind of fault is refused by name."""

import json
import os
import shutil
from pathlib import Path

import h5py
import keras_hub
import numpy as np
import pytest

from kllama.checkpoints.formats import open_checkpoint, open_tokenizer
from kllama.checkpoints.presets import keras_hub as keras_hub_format
from kllama.checkpoints.presets.keras_hub import KerasHubCheckpoint
from kllama.checkpoints.presets.keras_hub_tokenizer import KerasHubTokenizer
from kllama.checkpoints.presets.reading import PresetTokenizer
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError
from kllama.models.llama_backbone import LlamaBackbone
from kllama.models.weights import assign_weights, uninitialized_weights
from kllama.text.formats.rules import byte_characters
from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.tokenizer import LlamaTokenizer
from tests.checkpoints.damage import JSON_FAULTS, change_config, change_json, refuses, replace

pytestmark = pytest.mark.backend_independent

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
TOKENS = [*byte_characters().values(), "ab", *SPECIAL]
SIZES = {
    "vocabulary_size": len(TOKENS),
    "num_layers": 2,
    "num_query_heads": 4,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "num_key_value_heads": 2,
}
ROPE = {
    "rope_frequency_adjustment_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_pretraining_sequence_length": 16,
}
SINGLE, INDEX = "model.weights.h5", "model.weights.json"
VOCABULARY, MERGES = "assets/tokenizer/vocabulary.json", "assets/tokenizer/merges.txt"
QUERY = "layers/llama_transformer_decoder_1/_self_attention_layer/_query_dense/vars/0"
TABLE, HEAD = "layers/reversible_embedding/vars/0", "layers/reversible_embedding/vars/1"
NORM = "layers/llama_layer_norm/vars/0"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with one model as two presets, `single` and `sharded`. Copied, never changed."""
    with uninitialized_weights():
        backbone = keras_hub.models.Llama3Backbone(**SIZES, **ROPE, dropout=0.25, name="fox", trainable=False)
    rng = np.random.default_rng(0)
    weights = backbone.weights
    assign_weights(backbone, [(weight.path, rng.normal(size=weight.shape).astype("float32")) for weight in weights])
    tokenizer = keras_hub.models.Llama3Tokenizer({token: i for i, token in enumerate(TOKENS)}, ["a b"], dtype="int64")
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(tokenizer, 12, add_start_token=False)
    model = keras_hub.models.Llama3CausalLM(backbone, preprocessor)
    folder = tmp_path_factory.mktemp("presets")
    model.save_to_preset(str(folder / "single"))
    model.save_to_preset(str(folder / "sharded"), max_shard_size=1e-5)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A sound preset with one file of weights, to be damaged."""
    return shutil.copytree(saved / "single", tmp_path / "preset")


@pytest.fixture
def sharded(saved, tmp_path) -> Path:
    """The same with several."""
    return shutil.copytree(saved / "sharded", tmp_path / "sharded")


def stored(folder: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for file in folder.glob("*.h5"):
        with h5py.File(file) as opened:
            opened.visititems(
                lambda name, item: arrays.update({name: item[()]} if isinstance(item, h5py.Dataset) else {})
            )
    return arrays


# What a sound preset gives


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_gives_every_weight(saved, layout):
    tensors = dict(KerasHubCheckpoint(saved / layout).tensors())
    arrays = stored(saved / layout)
    assert len(tensors) == len(arrays) == 21
    expected = {
        "token_embedding/embeddings": TABLE,
        "token_embedding/reverse_embeddings": HEAD,
        "sequence_output_layernorm/scale": NORM,
        "transformer_layer_1/self_attention/query/kernel": QUERY,
        "transformer_layer_0/self_attention/key/kernel": "layers/llama_transformer_decoder/"
        "_self_attention_layer/_key_dense/vars/0",
        "transformer_layer_1/self_attention/attention_output/kernel": "layers/llama_transformer_decoder_1/"
        "_self_attention_layer/_output_dense/vars/0",
        "transformer_layer_1/feedforward_layernorm/scale": "layers/llama_transformer_decoder_1/"
        "_feedforward_layernorm/vars/0",
        "transformer_layer_0/feedforward_gate_dense/kernel": "layers/llama_transformer_decoder/"
        "_feedforward_gate_dense/vars/0",
    }
    for path, name in expected.items():
        np.testing.assert_array_equal(tensors[path], arrays[name], path)


def test_sharded_means_several_files(saved):
    assert len(list((saved / "sharded").glob("model_*.weights.h5"))) > 2


def test_gives_the_configs(saved):
    checkpoint = open_checkpoint(saved / "single")
    assert type(checkpoint) is KerasHubCheckpoint
    assert checkpoint.has_head
    assert checkpoint.dtype == "float32"
    assert checkpoint.sampler == "auto"
    assert checkpoint.backbone_config == {
        **SIZES,
        "name": "fox",
        "trainable": False,
        "head_dim": 2,
        "rope_max_wavelength": 10000,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "layer_norm_epsilon": 1e-6,
        "dropout": 0.25,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_output_bias": False,
        "qk_norm": False,
        "mlp_bias": False,
    }
    assert checkpoint.tokenizer_config == {
        "tokenizer": str(saved / "single" / VOCABULARY),
        "start_token": "<|begin_of_text|>",
        "end_token": "auto",
        "dtype": "int64",
    }
    assert checkpoint.preprocessor_config == {
        "sequence_length": 12,
        "add_start_token": False,
        "add_end_token": True,
    }
    assert checkpoint.generation_config == {"stop_token_ids": [TOKENS.index(token) for token in SPECIAL[1:3]]}
    tokenizer = open_tokenizer(saved / "single")
    assert type(tokenizer) is KerasHubTokenizer
    assert tokenizer.tokenizer_config == checkpoint.tokenizer_config
    assert tokenizer.preprocessor_config == checkpoint.preprocessor_config
    assert tokenizer.backbone_config == {"vocabulary_size": len(TOKENS)}


def test_knows_every_argument_of_the_backbone():
    """What a new KerasHub writes has to be read here too."""
    with uninitialized_weights():
        config = keras_hub.models.LlamaBackbone(**SIZES).get_config()
    assert config.keys() - {"dtype"} <= keras_hub_format._BACKBONE_FIELDS.keys()
    assert keras_hub_format._BACKBONE_FIELDS.keys() - config.keys() == {"rope_scaling_factor", "tie_word_embeddings"}


def test_older_forms(folder):
    """keras-nlp named itself, had one rope keyword, and wrote no dtype or a bare one."""
    for file in ("config.json", "task.json", "preprocessor.json", "tokenizer.json"):
        change_json(
            folder / file,
            lambda content: content.update(registered_name=content["registered_name"].replace("_hub", "_nlp")),
        )

    def change(content):
        config = content["config"]
        for name in (*ROPE, "rope_position_scaling_factor", "dtype"):
            del config[name]
        config["rope_scaling_factor"] = 4.0

    change_json(folder / "config.json", change)
    change_config(folder / "tokenizer.json", dtype="int32")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype == "float32"
    assert checkpoint.backbone_config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert checkpoint.tokenizer_config["dtype"] == "int32"
    assert len(dict(checkpoint.tensors())) == 21


def test_without_a_dtype_it_is_that_of_the_weights(folder):
    change_json(folder / "config.json", lambda content: content["config"].pop("dtype"))
    for name, array in stored(folder).items():
        replace(folder / SINGLE, name, array.astype("float16"))
    assert KerasHubCheckpoint(folder).dtype == "float16"


@pytest.mark.parametrize("factor", [1, 1.0, 2.5])
def test_position_scaling(folder, factor):
    change_config(folder / "config.json", **dict.fromkeys(ROPE), rope_position_scaling_factor=factor)
    expected = None if factor == 1 else {"rope_type": "linear", "factor": factor}
    assert KerasHubCheckpoint(folder).backbone_config["rope_scaling"] == expected


def test_a_base_vocabulary_without_the_end_of_a_turn(folder):
    vocabulary = json.loads((folder / VOCABULARY).read_text())
    del vocabulary["<|eot_id|>"]
    (folder / VOCABULARY).write_text(json.dumps(vocabulary))
    assert KerasHubCheckpoint(folder).generation_config == {"stop_token_ids": [TOKENS.index("<|end_of_text|>")]}
    assert LlamaTokenizer.from_preset(folder).end_token == "<|end_of_text|>"


def test_files_that_may_be_missing(folder):
    for file in ("task.json", "preprocessor.json", "tokenizer.json", "metadata.json"):
        (folder / file).unlink()
    checkpoint = KerasHubCheckpoint(folder)
    assert checkpoint.tokenizer_config is None
    assert checkpoint.preprocessor_config == checkpoint.generation_config == {}
    with refuses(MissingFileError, folder, "no tokenizer", "tokenizer.json"):
        open_tokenizer(folder)


def test_a_preset_that_kllama_saved_over_it(folder):
    with uninitialized_weights():
        backbone = LlamaBackbone(**SIZES)
    assign_weights(backbone, [(weight.path, np.zeros(weight.shape, "float32")) for weight in backbone.weights])
    preprocessor = LlamaCausalLMPreprocessor.from_preset(folder)
    backbone.save_to_preset(str(folder))
    preprocessor.save_to_preset(str(folder))
    assert type(open_tokenizer(folder)) is PresetTokenizer


# The head


def write_head(folder: Path, head: np.ndarray) -> None:
    replace(folder / SINGLE, HEAD, np.ascontiguousarray(head))


@pytest.mark.parametrize("block", [1, 8, 100, 2**22])
@pytest.mark.parametrize("place", [None, (0, 0), (7, -1), (3, 100)])
def test_a_copied_head(folder, monkeypatch, block, place):
    monkeypatch.setattr(keras_hub_format, "_BLOCK", block)
    head = stored(folder)[TABLE].T.copy()
    if place is not None:
        head[place] += 1
    write_head(folder, head)
    checkpoint = KerasHubCheckpoint(folder)
    assert checkpoint.backbone_config["tie_word_embeddings"] is (place is None)
    assert ("token_embedding/reverse_embeddings" in dict(checkpoint.tensors())) is (place is not None)


def test_comparing_stops_at_the_first_difference(folder, monkeypatch):
    monkeypatch.setattr(keras_hub_format, "_BLOCK", 8)
    reads = []
    read_part = keras_hub_format.H5Weights.read_part
    monkeypatch.setattr(
        keras_hub_format.H5Weights, "read_part", lambda *arguments: reads.append(1) or read_part(*arguments)
    )
    KerasHubCheckpoint(folder)
    assert len(reads) == 2


def test_a_copy_that_is_not_finite_is_refused_all_the_same(folder):
    table = stored(folder)[TABLE]
    table[3, 3] = np.nan
    replace(folder / SINGLE, TABLE, table)
    write_head(folder, table.T)
    with refuses(CheckpointError, folder / SINGLE, TABLE, "1 of"):
        dict(KerasHubCheckpoint(folder).tensors())


@pytest.mark.parametrize("tied", [None, True])
def test_no_head(folder, tied):
    with h5py.File(folder / SINGLE, "r+") as file:
        del file[HEAD]
    change_config(folder / "config.json", tie_word_embeddings=tied)
    assert KerasHubCheckpoint(folder).backbone_config["tie_word_embeddings"] is True


def test_the_flag_and_the_file_disagree(folder):
    change_config(folder / "config.json", tie_word_embeddings=True)
    with refuses(CheckpointError, folder, f"unused: {HEAD}"):
        KerasHubCheckpoint(folder)
    change_config(folder / "config.json", tie_word_embeddings=False)
    with h5py.File(folder / SINGLE, "r+") as file:
        del file[HEAD]
    with refuses(CheckpointError, folder, f"missing tensors: {HEAD} (8, {len(TOKENS)})"):
        KerasHubCheckpoint(folder)


# Files


@pytest.mark.parametrize("missing", [SINGLE, VOCABULARY, MERGES])
def test_missing_file(folder, missing):
    (folder / missing).unlink()
    with refuses(MissingFileError, folder, missing) as caught:
        open_checkpoint(folder)
    assert caught.value.filename == str(folder / missing)


def test_two_weight_sets(folder, sharded):
    shutil.copy(sharded / INDEX, folder)
    with refuses(CheckpointError, folder, SINGLE, INDEX, "two weight sets"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["config.json", SINGLE, VOCABULARY, MERGES])
def test_a_link_to_the_outside(folder, tmp_path, file):
    (folder / file).rename(tmp_path / "outside")
    (folder / file).symlink_to(tmp_path / "outside")
    with refuses(CheckpointError, folder / file, "a link"):
        open_checkpoint(folder)


def test_the_vocabulary_of_a_llama(folder, tmp_path):
    config = {"proto": None, "add_bos": False, "add_eos": False, "dtype": "int32", "sequence_length": None}
    content = {"registered_name": "keras_hub>LlamaTokenizer", "config": config}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    vocabulary = folder / "assets/tokenizer/vocabulary.spm"
    with refuses(MissingFileError, vocabulary):
        open_checkpoint(folder)
    (tmp_path / "outside").write_bytes(b"x")
    vocabulary.symlink_to(tmp_path / "outside")
    with refuses(CheckpointError, vocabulary, "a link"):
        open_checkpoint(folder)
    vocabulary.unlink()
    vocabulary.write_bytes(b"x")
    assert open_checkpoint(folder).tokenizer_config == {
        "tokenizer": str(vocabulary),
        "start_token": "<s>",
        "end_token": "</s>",
        "dtype": "int32",
    }
    for option in ("add_bos", "add_eos"):
        change_config(folder / "tokenizer.json", **{**config, option: True})
        with refuses(UnsupportedError, folder / "tokenizer.json", f"{option} = true; expected false"):
            open_checkpoint(folder)
    change_config(folder / "tokenizer.json", **{**config, "proto": "/etc/passwd"})
    with refuses(CheckpointError, folder / "tokenizer.json", 'proto = "/etc/passwd"; expected null'):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["config.json", "task.json", "preprocessor.json", "tokenizer.json", INDEX, VOCABULARY])
@pytest.mark.parametrize("fault", [fault for fault in JSON_FAULTS if fault != "huge"])
def test_damaged_json(sharded, file, fault):
    content, part = JSON_FAULTS[fault]
    (sharded / file).write_bytes(content)
    with refuses(CheckpointError, sharded / file, part):
        open_checkpoint(sharded)


CLASSES = {
    "config.json": "Backbone",
    "task.json": "CausalLM",
    "preprocessor.json": "CausalLMPreprocessor",
    "tokenizer.json": "Tokenizer",
}


@pytest.mark.parametrize("name", ["keras_hub>Gemma", "keras_nlp>Mistral", "keras_hub>Llama4", "other>Llama", "Llama"])
@pytest.mark.parametrize("file", CLASSES)
def test_another_class(folder, file, name):
    change_json(folder / file, lambda content: content.update(registered_name=name + CLASSES[file]))
    with refuses(UnsupportedError, folder / file, f'registered_name = "{name}'):
        open_checkpoint(folder)


@pytest.mark.parametrize("config", [None, [], "x"])
@pytest.mark.parametrize("file", CLASSES)
def test_config_is_no_object(folder, file, config):
    change_json(folder / file, lambda content: content.update(config=config))
    with refuses(CheckpointError, folder / file, f"config = {json.dumps(config)}", "expected an object"):
        open_checkpoint(folder)


def test_module_and_class_names_are_not_followed(folder):
    for file in CLASSES:
        change_json(folder / file, lambda content: content.update(module="os", class_name="system"))
    change_json(folder / "task.json", lambda content: content["config"]["backbone"].update(class_name="__lambda__"))
    assert len(dict(open_checkpoint(folder).tensors())) == 21


# Fields


@pytest.mark.parametrize("file", ["config.json", "preprocessor.json", "tokenizer.json"])
def test_unknown_key(folder, file):
    change_config(folder / file, zoom=1, aim=2)
    with refuses(CheckpointError, folder / file, "unknown keys", '"aim", "zoom"', "expected"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "file, keys",
    [
        ("config.json", ["intermediate_dim", "vocabulary_size"]),
        ("preprocessor.json", ["add_end_token", "sequence_length"]),
    ],
)
def test_missing_keys_are_listed_together(folder, file, keys):
    change_json(folder / file, lambda content: [content["config"].pop(key) for key in keys])
    with refuses(CheckpointError, folder / file, f"missing keys: {', '.join(keys)}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "file, key, values",
    [
        ("config.json", "num_layers", ["2", 2.0, True, None, 0, -1]),
        ("config.json", "layer_norm_epsilon", ["1e-6", None, True]),
        ("config.json", "dropout", ["0"]),
        ("config.json", "rope_low_freq_factor", ["1", [1], False]),
        ("config.json", "rope_pretraining_sequence_length", [8192.0, 0]),
        ("config.json", "rope_scaling_factor", [None, "2"]),
        ("config.json", "tie_word_embeddings", [0, "false"]),
        ("config.json", "trainable", [1]),
        ("preprocessor.json", "sequence_length", [0, 2.0, None]),
        ("preprocessor.json", "add_start_token", [1, None]),
        ("tokenizer.json", "unsplittable_tokens", ["<|eot_id|>", 5]),
        ("tokenizer.json", "add_prefix_space", [1, None]),
        ("tokenizer.json", "vocabulary", ["/etc/passwd", {"a": 1}]),
        ("tokenizer.json", "merges", ["https://example.com/merges.txt", ["a b"]]),
    ],
)
def test_wrong_type(folder, file, key, values):
    for value in values:
        change_config(folder / file, **{key: value})
        with refuses(CheckpointError, folder / file, f"{key} = {json.dumps(value)}; expected "):
            open_checkpoint(folder)


@pytest.mark.parametrize("dtype", ["float64", None, 5, ["float32"], {"class_name": "DTypePolicy", "config": {}}])
def test_dtype_policy(folder, dtype):
    change_config(folder / "config.json", dtype=dtype)
    with refuses(UnsupportedError, folder / "config.json", "dtype = ", "expected one of"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "key, value",
    [
        ("sequence_length", 12),
        ("add_prefix_space", True),
        ("unsplittable_tokens", ["fox"]),
        ("unsplittable_tokens", ["<|eot_id|>", 5]),
    ],
)
def test_options_of_the_tokenizer(folder, key, value):
    change_config(folder / "tokenizer.json", **{key: value})
    for opener in (open_checkpoint, open_tokenizer):
        with refuses(UnsupportedError, folder / "tokenizer.json", key):
            opener(folder)


@pytest.mark.parametrize("token_id", [-1, "5", 2.5, [], True])
def test_a_stop_token_that_is_no_id(folder, token_id):
    vocabulary = json.loads((folder / VOCABULARY).read_text())
    (folder / VOCABULARY).write_text(json.dumps({**vocabulary, "<|eot_id|>": token_id}))
    with refuses(CheckpointError, folder / VOCABULARY, f"<|eot_id|> = {json.dumps(token_id)}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"rope_position_scaling_factor": 2}, "more than once"),
        ({**dict.fromkeys(ROPE), "rope_position_scaling_factor": 2, "rope_scaling_factor": 2}, "more than once"),
        ({"rope_low_freq_factor": None}, "rope_low_freq_factor = null"),
        ({"hidden_dim": 9}, "hidden_dim = 9; expected a multiple of num_query_heads (4)"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon (0)"),
        ({"rope_max_wavelength": -1}, "rope_max_wavelength (-1)"),
        ({"dropout": 2}, "dropout (2)"),
        ({"rope_frequency_adjustment_factor": 0.5}, "factor"),
        ({**dict.fromkeys(ROPE), "rope_position_scaling_factor": 0.5}, "factor"),
        (
            {"num_layers": 3},
            "missing tensors: layers/llama_transformer_decoder_2/_self_attention_layernorm/vars/0 (8,)",
        ),
        ({"num_layers": 10**9}, "missing tensors: layers/llama_transformer_decoder_2/"),
        ({"num_layers": 1}, "unused: layers/llama_transformer_decoder_1/"),
        ({"hidden_dim": 10**6}, f"has shape ({len(TOKENS)}, 8); expected ({len(TOKENS)}, 1000000)"),
        ({"num_query_heads": 2}, f"{QUERY} has shape (8, 4, 2); expected (8, 2, 4)"),
        ({"num_key_value_heads": 3}, "_key_dense/vars/0 has shape (8, 2, 2); expected (8, 3, 2)"),
    ],
)
def test_values_that_do_not_fit(folder, changes, part):
    change_config(folder / "config.json", **changes)
    with refuses(CheckpointError, folder, part):
        LlamaBackbone.from_preset(folder)


# Weights


@pytest.mark.parametrize("size", [0, 1, 2000, -1])
def test_truncated_weights(folder, size):
    file = folder / SINGLE
    os.truncate(file, size if size >= 0 else file.stat().st_size - 8)
    with refuses(CheckpointError, file):
        dict(open_checkpoint(folder).tensors())


@pytest.mark.parametrize("name", [QUERY, NORM, TABLE])
def test_missing_tensor(folder, name):
    with h5py.File(folder / SINGLE, "r+") as file:
        shape = file[name].shape
        del file[name]
    with refuses(CheckpointError, folder, f"missing tensors: {name} {shape}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["layers/extra/vars/0", QUERY.replace("vars/0", "vars/1"), "layers/rms_norm/vars/0"])
def test_unused_tensor(folder, name):
    replace(folder / SINGLE, name, np.zeros(3, "float32"))
    with refuses(CheckpointError, folder, f"unused: {name}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shape", [(8, 8), (4, 8, 2), (8, 4, 2, 1)])
def test_wrong_shape(folder, shape):
    replace(folder / SINGLE, QUERY, np.zeros(shape, "float32"))
    with refuses(CheckpointError, folder, f"{QUERY} has shape {shape}; expected (8, 4, 2)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", ["int8", "int32", "float64", "bool"])
def test_not_float(folder, dtype):
    replace(folder / SINGLE, QUERY, np.ones((8, 4, 2), dtype))
    with refuses(CheckpointError, folder / SINGLE, QUERY, f"is {dtype}; expected one of float32, bfloat16, float16"):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(folder, value):
    replace(folder / SINGLE, QUERY, np.full((8, 4, 2), value, "float32"))
    with refuses(CheckpointError, folder / SINGLE, QUERY, "64 of 64"):
        dict(open_checkpoint(folder).tensors())


def test_a_shard_outside(sharded):
    group = "/layers/llama_layer_norm/vars"
    change_json(sharded / INDEX, lambda index: index["weight_map"].update({group: "../x"}))
    with refuses(CheckpointError, sharded / INDEX, "plain file name"):
        open_checkpoint(sharded)
