"""A preset of kllama's own: a sound one gives exactly its weights, and each kind of fault is refused by name."""

import json
import os
import shutil
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest

from kllama.checkpoints.files import manifest
from kllama.checkpoints.presets.reading import PresetCheckpoint, is_preset
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError
from kllama.models.llama_backbone import LlamaBackbone
from kllama.models.llama_causal_lm import LlamaCausalLM
from kllama.models.weights import assign_weights, uninitialized_weights
from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.tokenizer import LlamaTokenizer
from tests.checkpoints.damage import JSON_FAULTS, change_config, change_json, refuses, replace

pytestmark = pytest.mark.backend_independent

SIZES = {
    "vocabulary_size": 16,
    "num_layers": 2,
    "num_query_heads": 4,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 4, "content": "<s>", **SPECIAL}, {"id": 5, "content": "</s>", **SPECIAL}],
    "model": {"type": "BPE", "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"]},
}
GENERATION = {"stop_token_ids": [5, 2], "do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.9}
SINGLE, INDEX, ASSET = "model.weights.h5", "model.weights.json", "assets/tokenizer/tokenizer.json"
QUERY = "layers/llama_decoder_layer_1/self_attention/query/vars/0"
NORM = "layers/rms_norm/vars/0"


def shapes(*, biases=True, tied=False) -> dict[str, tuple[int, ...]]:
    """Write out by hand the shape of each weight of a model of these sizes."""
    layer = {
        "self_attention/query/kernel": (8, 4, 6),
        "self_attention/key/kernel": (8, 2, 6),
        "self_attention/value/kernel": (8, 2, 6),
        "self_attention/attention_output/kernel": (4, 6, 8),
        "feedforward_gate_dense/kernel": (8, 12),
        "feedforward_intermediate_dense/kernel": (8, 12),
        "feedforward_output_dense/kernel": (12, 8),
        "self_attention_layernorm/scale": (8,),
        "feedforward_layernorm/scale": (8,),
    }
    outputs = {
        "self_attention/query": (4, 6),
        "self_attention/key": (2, 6),
        "self_attention/value": (2, 6),
        "self_attention/attention_output": (8,),
        "feedforward_gate_dense": (12,),
        "feedforward_intermediate_dense": (12,),
        "feedforward_output_dense": (8,),
    }
    if biases:
        layer |= {f"{name}/bias": shape for name, shape in outputs.items()}
    return {
        "token_embedding/embeddings": (16, 8),
        **({} if tied else {"token_embedding/reverse_embeddings": (8, 16)}),
        **{f"transformer_layer_{i}/{name}": shape for i in range(2) for name, shape in layer.items()},
        "sequence_output_layernorm/scale": (8,),
    }


def backbone(weights: dict[str, np.ndarray], **arguments) -> LlamaBackbone:
    with uninitialized_weights():
        model = LlamaBackbone(**SIZES, **arguments)
    assign_weights(model, weights.items())
    return model


def random_weights(**options) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype("float32") for path, shape in shapes(**options).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with one model as two presets, `single` and `sharded`. Copied, never changed."""
    tokenizer = LlamaTokenizer(
        TOKENIZER, start_token="<s>", end_token="</s>", pad_token="<unk>", parse_special=True, dtype="int64"
    )
    preprocessor = LlamaCausalLMPreprocessor(tokenizer, 12, add_start_token=False, add_end_token=False)
    model = backbone(random_weights(), attention_bias=True, mlp_bias=True, max_sequence_length=64, name="fox")
    model.trainable = False
    model = LlamaCausalLM(model, preprocessor, generation_config=GENERATION)
    folder = tmp_path_factory.mktemp("presets")
    model.save_to_preset(str(folder / "single"))
    model.save_to_preset(str(folder / "sharded"), max_shard_size=1e-6)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A sound preset with one file of weights, to be damaged: without its manifest, which would find it out first."""
    return shutil.copytree(saved / "single", tmp_path / "preset", ignore=shutil.ignore_patterns(manifest.NAME))


@pytest.fixture
def sharded(saved, tmp_path) -> Path:
    """The same with several."""
    return shutil.copytree(saved / "sharded", tmp_path / "sharded", ignore=shutil.ignore_patterns(manifest.NAME))


def load(folder: Path) -> dict[str, np.ndarray]:
    return dict(PresetCheckpoint(folder).tensors())


# What a sound preset gives


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_gives_every_weight(saved, layout):
    tensors = load(saved / layout)
    weights = random_weights()
    assert tensors.keys() == weights.keys()
    for path, array in tensors.items():
        assert array.dtype == "float32"
        np.testing.assert_array_equal(array, weights[path], path)


def test_sharded_means_several_files(saved):
    assert len(list((saved / "sharded").glob("model_*.weights.h5"))) > 5


def test_gives_the_configs(saved):
    checkpoint = PresetCheckpoint(saved / "single")
    assert checkpoint.path == saved / "single"
    assert checkpoint.has_head
    assert checkpoint.dtype == "float32"
    assert checkpoint.backbone_config == {
        **SIZES,
        "name": "fox",
        "trainable": False,
        "max_sequence_length": 64,
        "rope_max_wavelength": 10000,
        "rope_scaling": None,
        "layer_norm_epsilon": 1e-6,
        "initializer_range": 0.02,
        "dropout": 0,
        "attention_dropout": 0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "qk_norm": False,
        "sliding_window": None,
        "layer_types": None,
        "mlp_bias": True,
        "activation": "silu",
    }
    assert checkpoint.tokenizer_config == {
        "tokenizer": str(saved / "single" / ASSET),
        "start_token": "<s>",
        "end_token": "</s>",
        "pad_token": "<unk>",
        "parse_special": True,
        "legacy": None,
        "add_prefix_space": None,
        "chat_template": None,
        "dtype": "int64",
    }
    assert checkpoint.preprocessor_config == {
        "sequence_length": 12,
        "add_start_token": False,
        "add_end_token": False,
        "loss_on": "auto",
        "truncate": None,
    }
    assert checkpoint.generation_config == GENERATION


def test_a_tied_backbone_alone(tmp_path):
    weights = random_weights(biases=False, tied=True)
    backbone(weights, tie_word_embeddings=True).save_to_preset(str(tmp_path))
    checkpoint = PresetCheckpoint(tmp_path)
    assert checkpoint.backbone_config["tie_word_embeddings"] is True
    assert checkpoint.tokenizer_config is None
    assert checkpoint.preprocessor_config == checkpoint.generation_config == {}
    tensors = dict(checkpoint.tensors())
    assert tensors.keys() == weights.keys()
    for path, array in tensors.items():
        np.testing.assert_array_equal(array, weights[path], path)


@pytest.mark.parametrize(
    "policy, stored",
    [
        ("bfloat16", ml_dtypes.bfloat16),
        ("float16", np.float16),
        ("mixed_bfloat16", np.float32),
        ("mixed_float16", np.float32),
    ],
)
def test_gives_the_stored_dtype(tmp_path, policy, stored):
    weights = random_weights(biases=False)
    backbone(weights, dtype=policy).save_to_preset(str(tmp_path))
    checkpoint = PresetCheckpoint(tmp_path)
    assert checkpoint.dtype == policy
    for path, array in checkpoint.tensors():
        assert array.dtype == stored
        np.testing.assert_array_equal(array, weights[path].astype(stored), path)


def test_knows_every_argument_of_the_backbone(saved):
    """A new argument of `LlamaBackbone` has to be read here too."""
    model = backbone(random_weights(biases=False))
    assert {*PresetCheckpoint(saved / "single").backbone_config, "dtype"} == model.get_config().keys()


# Which files there are


def test_is_preset(folder, tmp_path):
    assert is_preset(folder)
    assert not is_preset(tmp_path)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert not is_preset(folder)


@pytest.mark.parametrize(
    "missing, parts",
    [("config.json", ["config.json"]), (SINGLE, [SINGLE, INDEX]), (ASSET, [ASSET])],
)
def test_missing_file(folder, missing, parts):
    (folder / missing).unlink()
    with refuses(MissingFileError, folder, *parts) as caught:
        PresetCheckpoint(folder)
    assert caught.value.filename == str(folder / missing)


def test_two_weight_sets(folder, sharded):
    shutil.copy(sharded / INDEX, folder)
    with refuses(CheckpointError, folder, SINGLE, INDEX, "two weight sets"):
        PresetCheckpoint(folder)


@pytest.mark.parametrize("file", ["config.json", SINGLE, ASSET])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_not_a_regular_file_of_the_preset(folder, tmp_path, file, kind):
    if kind == "link":
        (folder / file).rename(tmp_path / "outside")
        (folder / file).symlink_to(tmp_path / "outside")
    else:
        (folder / file).unlink()
        os.mkfifo(folder / file)
    with refuses(CheckpointError, folder / file):
        PresetCheckpoint(folder)


# JSON

JSON_FILES = ["config.json", "task.json", "preprocessor.json", "tokenizer.json", INDEX]


@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_damaged_json(sharded, file, fault):
    content, part = JSON_FAULTS[fault]
    (sharded / file).write_bytes(content)
    with refuses(CheckpointError, sharded / file, part):
        PresetCheckpoint(sharded)


CLASSES = {
    "config.json": "kllama>LlamaBackbone",
    "task.json": "kllama>LlamaCausalLM",
    "preprocessor.json": "kllama>LlamaCausalLMPreprocessor",
    "tokenizer.json": "kllama>LlamaTokenizer",
}


@pytest.mark.parametrize("name", ["keras_hub>Llama3Backbone", "Functional", None, 5, ["x"]])
@pytest.mark.parametrize("file", CLASSES)
def test_another_class(folder, file, name):
    change_json(folder / file, lambda content: content.update(registered_name=name))
    with refuses(UnsupportedError, folder / file, f"registered_name = {json.dumps(name)}", CLASSES[file]):
        PresetCheckpoint(folder)


@pytest.mark.parametrize("config", [None, [], "x"])
@pytest.mark.parametrize("file", CLASSES)
def test_config_is_no_object(folder, file, config):
    change_json(folder / file, lambda content: content.update(config=config))
    with refuses(CheckpointError, folder / file, f"config = {json.dumps(config)}", "expected an object"):
        PresetCheckpoint(folder)


def test_module_and_class_names_are_not_followed(folder):
    for file in CLASSES:
        change_json(folder / file, lambda content: content.update(module="os", class_name="system"))
    change_json(folder / "task.json", lambda content: content["config"]["backbone"].update(class_name="__lambda__"))
    assert load(folder).keys() == shapes().keys()


# The fields of the four configs


@pytest.mark.parametrize("file", ["config.json", "preprocessor.json", "tokenizer.json"])
def test_unknown_key(folder, file):
    change_config(folder / file, zoom=1, aim=2)
    with refuses(CheckpointError, folder / file, "unknown keys", '"aim", "zoom"', "expected"):
        PresetCheckpoint(folder)


@pytest.mark.parametrize(
    "file, keys",
    [
        ("config.json", ["head_dim", "vocabulary_size"]),
        ("preprocessor.json", ["add_end_token", "sequence_length"]),
        ("tokenizer.json", ["end_token", "parse_special"]),
    ],
)
def test_missing_keys_are_listed_together(folder, file, keys):
    change_json(folder / file, lambda content: [content["config"].pop(key) for key in keys])
    with refuses(CheckpointError, folder / file, f"missing keys: {', '.join(keys)}"):
        PresetCheckpoint(folder)


@pytest.mark.parametrize(
    "file, key, values",
    [
        ("config.json", "num_layers", ["2", 2.0, True, None, 0, -1]),
        ("config.json", "num_query_heads", [[4], 0]),
        ("config.json", "max_sequence_length", ["64", 0]),
        ("config.json", "layer_norm_epsilon", ["1e-6", None, True]),
        ("config.json", "dropout", ["0"]),
        ("config.json", "rope_max_wavelength", [None]),
        ("config.json", "rope_scaling", [5, "linear", []]),
        ("config.json", "tie_word_embeddings", [0, "false", None]),
        ("config.json", "activation", [None, ["silu"]]),
        ("config.json", "trainable", [1]),
        ("config.json", "name", [None]),
        ("preprocessor.json", "sequence_length", [0, 2.0, None]),
        ("preprocessor.json", "add_start_token", [1, None]),
        ("tokenizer.json", "start_token", [1, ["<s>"]]),
        ("tokenizer.json", "parse_special", [1, None]),
    ],
)
def test_wrong_type(folder, file, key, values):
    for value in values:
        change_config(folder / file, **{key: value})
        with refuses(CheckpointError, folder / file, f"{key} = {json.dumps(value)}; expected "):
            PresetCheckpoint(folder)


def test_wrong_types_are_listed_together(folder):
    change_config(folder / "config.json", hidden_dim="8", mlp_bias=0)
    with refuses(CheckpointError, 'hidden_dim = "8"; expected an integer', "mlp_bias = 0; expected true or false"):
        PresetCheckpoint(folder)


POLICY_MAP = {"module": "keras", "class_name": "DTypePolicyMap", "config": {"default_policy": "int8_from_float32"}}


@pytest.mark.parametrize(
    "file, dtypes",
    [
        ("config.json", ["int8_from_float32", "float8_from_bfloat16", "float64", None, 5, ["float32"], POLICY_MAP]),
        ("tokenizer.json", ["float32", "string"]),
    ],
)
def test_dtype_policy(folder, file, dtypes):
    for dtype in dtypes:
        change_config(folder / file, dtype=dtype)
        with refuses(UnsupportedError, folder / file, "dtype = ", "expected one of"):
            PresetCheckpoint(folder)
    for config in (None, "float32", {}, {"name": None}):
        change_config(folder / file, dtype={"class_name": "DTypePolicy", "config": config})
        with refuses(UnsupportedError, folder / file, "dtype = ", "expected one of"):
            PresetCheckpoint(folder)


@pytest.mark.parametrize("value", ["/etc/passwd", "https://example.com/tokenizer.json", {"model": {}}])
def test_a_vocabulary_elsewhere(folder, value):
    change_config(folder / "tokenizer.json", tokenizer=value)
    with refuses(CheckpointError, folder / "tokenizer.json", "tokenizer = ", "expected no path"):
        PresetCheckpoint(folder)


@pytest.mark.parametrize(
    "config, part",
    [
        (None, "generation_config = null; expected an object"),
        ([], "generation_config = []; expected an object"),
        ({"zoom": 1}, 'unknown keys: "zoom"'),
        ({"stop_token_ids": "</s>"}, 'stop_token_ids = "</s>"; expected'),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids = [1, -1]; expected"),
        ({"temperature": -1}, "temperature = -1; expected"),
        ({"top_p": 0}, "top_p = 0; expected"),
        ({"top_k": 1.5}, "top_k = 1.5; expected"),
    ],
)
def test_generation_config(folder, config, part):
    change_config(folder / "task.json", generation_config=config)
    with refuses(CheckpointError, folder / "task.json", part):
        PresetCheckpoint(folder)


# Weights


@pytest.mark.parametrize("size", [0, 1, 100, 2000, 20_000, -1])
def test_truncated_weights(folder, size):
    file = folder / SINGLE
    os.truncate(file, size if size >= 0 else file.stat().st_size - 8)
    with refuses(CheckpointError, file):
        load(folder)


def test_not_hdf5(folder):
    (folder / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 50)
    with refuses(CheckpointError, folder / SINGLE, "HDF5"):
        PresetCheckpoint(folder)


@pytest.mark.parametrize("block", [b"\x89HDF", b"TREE", b"SNOD", b"HEAP"])
@pytest.mark.parametrize("size", [4, 400])
def test_damaged_structure(folder, block, size):
    data = bytearray((folder / SINGLE).read_bytes())
    start = data.rfind(block)
    data[start : start + size] = b"\xff" * len(data[start : start + size])
    (folder / SINGLE).write_bytes(data)
    with refuses(CheckpointError, folder / SINGLE, "no sound HDF5 file"):
        PresetCheckpoint(folder)


def test_damaged_values(folder):
    """A reader cannot tell other numbers from the right ones; it does see that some are none."""
    with h5py.File(folder / SINGLE) as file:
        start = file[QUERY].id.get_offset()
    data = bytearray((folder / SINGLE).read_bytes())
    data[start : start + 400] = b"\xff" * 400
    (folder / SINGLE).write_bytes(data)
    with refuses(CheckpointError, folder / SINGLE, QUERY, "100 of 192"):
        load(folder)


@pytest.mark.parametrize("name", [QUERY, NORM])
def test_missing_tensor(folder, name):
    with h5py.File(folder / SINGLE, "r+") as file:
        shape = file[name].shape
        del file[name]
    with refuses(CheckpointError, folder, f"missing tensors: {name} {shape}"):
        PresetCheckpoint(folder)


@pytest.mark.parametrize("name", ["layers/extra/vars/0", "top", QUERY.replace("vars/0", "vars/2")])
def test_unused_tensor(folder, name):
    replace(folder / SINGLE, name, np.zeros(3, "float32"))
    with refuses(CheckpointError, folder, f"unused: {name}"):
        PresetCheckpoint(folder)


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"num_layers": 3}, "missing tensors: layers/llama_decoder_layer_2/self_attention_layernorm/vars/0 (8,)"),
        ({"num_layers": 10**9}, "missing tensors: layers/llama_decoder_layer_2/"),
        ({"num_layers": 1}, "unused: layers/llama_decoder_layer_1/"),
        ({"tie_word_embeddings": True}, "unused: layers/token_embedding/vars/1"),
        ({"attention_bias": False}, "unused: layers/llama_decoder_layer/self_attention/key/vars/1"),
        ({"attention_output_bias": False}, "unused: layers/llama_decoder_layer/self_attention/attention_output/vars/1"),
        ({"qk_norm": True}, "missing tensors: layers/llama_decoder_layer/self_attention/query_norm/vars/0 (6,)"),
        ({"hidden_dim": 10**6}, "has shape (16, 8); expected (16, 1000000)"),
        ({"vocabulary_size": 15}, "layers/token_embedding/vars/0 has shape (16, 8); expected (15, 8)"),
        ({"num_query_heads": 6, "head_dim": 4}, f"{QUERY} has shape (8, 4, 6); expected (8, 6, 4)"),
    ],
)
def test_config_of_another_model(folder, changes, part):
    change_config(folder / "config.json", **changes)
    with refuses(CheckpointError, folder, part):
        PresetCheckpoint(folder)


def test_at_most_ten_are_listed(folder):
    change_config(folder / "config.json", num_layers=1)
    with refuses(CheckpointError, "and 6 more"):
        PresetCheckpoint(folder)


@pytest.mark.parametrize("shape", [(8, 24), (4, 8, 6), (8, 4, 6, 1), ()])
def test_wrong_shape(folder, shape):
    replace(folder / SINGLE, QUERY, np.zeros(shape, "float32"))
    with refuses(CheckpointError, folder, f"{QUERY} has shape {shape}; expected (8, 4, 6)"):
        PresetCheckpoint(folder)


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "float64", "complex64", "bool", "S4", ">f4", "V2", [("r", "f4")], h5py.string_dtype(), h5py.ref_dtype],
)
def test_not_float(folder, dtype):
    with h5py.File(folder / SINGLE, "r+") as file:
        del file[QUERY]
        file.create_dataset(QUERY, (8, 4, 6), dtype)
    with refuses(CheckpointError, folder / SINGLE, QUERY, "expected one of float32, bfloat16, float16"):
        PresetCheckpoint(folder)


@pytest.mark.parametrize("note", ["bfloat16", ["bfloat16", "bfloat16"], 5])
def test_a_note_of_bfloat16_on_something_else(folder, note):
    replace(folder / SINGLE, QUERY, np.zeros((8, 4, 6), "int16"))
    with h5py.File(folder / SINGLE, "r+") as file:
        file[QUERY].attrs["dtype"] = note
    with refuses(CheckpointError, folder / SINGLE, QUERY, "is int16"):
        PresetCheckpoint(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(folder, dtype, value):
    array = np.zeros((8, 4, 6), dtype)
    array[3, 2, 1] = array[7, 0, 5] = value
    replace(folder / SINGLE, QUERY, array)
    tensors = PresetCheckpoint(folder).tensors()
    with refuses(CheckpointError, folder / SINGLE, QUERY, "2 of 192"):
        list(tensors)


def soft_link(file, outside):
    file[QUERY] = h5py.SoftLink(NORM)


def dangling_link(file, outside):
    file[QUERY] = h5py.SoftLink("/nowhere")


def external_link(file, outside):
    file[QUERY] = h5py.ExternalLink(str(outside), "x")


def external_storage(file, outside):
    file.create_dataset(QUERY, (8, 4, 6), "float32", external=[(str(outside), 0, 768)])


def virtual(file, outside):
    layout = h5py.VirtualLayout((8, 4, 6), "float32")
    layout[:] = h5py.VirtualSource(str(outside), "x", (8, 4, 6))
    file.create_virtual_dataset(QUERY, layout)


def compressed(file, outside):
    file.create_dataset(QUERY, data=np.zeros((8, 4, 6), "float32"), compression="gzip")


def never_written(file, outside):
    file.create_dataset(QUERY, (10**6, 10**6), "float32")


def sparse(file, outside):
    file.create_dataset(QUERY, (10**6, 10**6), "float32", chunks=(100, 100))


def data_type(file, outside):
    file[QUERY] = np.dtype("float32")


def cycle(file, outside):
    file["layers/rms_norm/again"] = file["layers"]


@pytest.mark.parametrize(
    "store, part",
    [
        (soft_link, "is a link"),
        (dangling_link, "is a link"),
        (external_link, "is a link"),
        (external_storage, "lies in another file"),
        (virtual, "lies in another file"),
        (compressed, "for an array of 768"),
        (never_written, "0 bytes for an array of 4000000000000"),
        (sparse, "0 bytes for an array of 4000000000000"),
        (data_type, "is a data type"),
        (cycle, "nested deeper"),
    ],
)
def test_what_is_no_plain_dataset(folder, tmp_path, store, part):
    with h5py.File(tmp_path / "outside.h5", "w") as outside:
        outside["x"] = np.zeros((8, 4, 6), "float32")
    with h5py.File(folder / SINGLE, "r+") as file:
        del file[QUERY]
        store(file, tmp_path / "outside.h5")
    with refuses(CheckpointError, folder / SINGLE, part):
        PresetCheckpoint(folder)


def test_weights_that_change_after_opening(folder):
    checkpoint = PresetCheckpoint(folder)
    replace(folder / SINGLE, QUERY, np.zeros((8, 24), "float32"))
    with refuses(CheckpointError, folder / SINGLE, QUERY, "changed"):
        list(checkpoint.tensors())
    (folder / SINGLE).unlink()
    with refuses(CheckpointError, folder / SINGLE):
        list(checkpoint.tensors())


# Shards

LONG = "x" * 300
SHARD = "model_00003.weights.h5"


def test_missing_shard(sharded):
    (sharded / SHARD).unlink()
    with refuses(MissingFileError, sharded / SHARD) as caught:
        PresetCheckpoint(sharded)
    assert caught.value.filename == str(sharded / SHARD)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "C:x", "\\\\host\\x", "a\0b", LONG, None, 5, ["x"], {"a": 1}]
)
@pytest.mark.parametrize("in_a_list", [False, True])
def test_shard_name(sharded, name, in_a_list):
    group = "/layers/rms_norm/vars"
    change_json(sharded / INDEX, lambda index: index["weight_map"].update({group: [name] if in_a_list else name}))
    if name == ["x"] and not in_a_list:
        with refuses(MissingFileError, sharded / "x"):
            PresetCheckpoint(sharded)
        return
    with refuses(CheckpointError, sharded / INDEX, f'weight_map["{group}"] = ', "plain file name"):
        PresetCheckpoint(sharded)


@pytest.mark.parametrize("weight_map", [None, [], "model.h5", {}])
def test_weight_map(sharded, weight_map):
    change_json(sharded / INDEX, lambda index: index.update(weight_map=weight_map))
    with refuses(CheckpointError, sharded / INDEX, f"weight_map = {json.dumps(weight_map)}; expected an object"):
        PresetCheckpoint(sharded)


def test_shard_that_the_index_leaves_out(sharded):
    def leave_out(index):
        index["weight_map"] = {group: name for group, name in index["weight_map"].items() if SHARD not in name}

    change_json(sharded / INDEX, leave_out)
    with refuses(
        CheckpointError, sharded, "missing tensors: layers/llama_decoder_layer/self_attention/attention_output"
    ):
        PresetCheckpoint(sharded)


def test_tensor_in_two_shards(sharded):
    replace(sharded / SHARD, NORM, np.zeros(8, "float32"))
    with refuses(CheckpointError, NORM, SHARD, "model_00011.weights.h5", "expected each tensor once"):
        PresetCheckpoint(sharded)


def test_shard_of_another_model(sharded):
    shutil.copy(sharded / "model_00005.weights.h5", sharded / SHARD)
    with refuses(CheckpointError, SHARD, "model_00005.weights.h5", "expected each tensor once"):
        PresetCheckpoint(sharded)


def test_damaged_shard(sharded):
    os.truncate(sharded / SHARD, 1000)
    with refuses(CheckpointError, sharded / SHARD, "HDF5"):
        PresetCheckpoint(sharded)


# Values that are of the right type, but that no backbone takes: the constructor knows, the message names the file


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"layer_norm_epsilon": 0}, ["layer_norm_epsilon (0)"]),
        ({"rope_max_wavelength": -1}, ["rope_max_wavelength (-1)"]),
        ({"dropout": 2}, ["dropout (2)"]),
        ({"attention_dropout": 1}, ["attention_dropout (1)"]),
        ({"activation": "swooshglu"}, ["activation ('swooshglu')", "silu"]),
        ({"rope_scaling": {"rope_type": "spiral"}}, ["'spiral'", "llama3"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, ["factor", "0.5"]),
        ({"num_key_value_heads": 3}, []),
    ],
)
def test_values_that_the_backbone_refuses(folder, changes, parts):
    change_config(folder / "config.json", **changes)
    with refuses(CheckpointError, folder, *parts):
        LlamaBackbone.from_preset(folder)
