"""A quantised model that is saved and loaded gives the same logits, bit for bit, and each fault is refused by name."""

import gc
import json
from pathlib import Path

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest

import kllama
from kllama.checkpoints.files import manifest
from kllama.checkpoints.files.reader import shown
from kllama.checkpoints.presets.reading import PresetCheckpoint
from kllama.errors import CheckpointError, UnsupportedError
from tests.checkpoints.damage import change_config, change_json, refuses, replace

SIZES = {
    "vocabulary_size": 12,
    "num_layers": 1,
    "num_query_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "num_key_value_heads": 1,
}
QUERY = "layers/llama_decoder_layer/self_attention/query/vars"
SINGLE = "model.weights.h5"
IDS = np.random.default_rng(0).integers(0, 12, (2, 9))


def save(folder: Path, filters=None, **arguments):
    keras.utils.set_random_seed(0)
    backbone = kllama.LlamaBackbone(**SIZES, initializer_range=0.5, **arguments)
    gc.freeze()  # Keras collects garbage with each layer
    backbone.quantize("int8", filters=filters)
    gc.unfreeze()
    backbone.save_to_preset(str(folder))
    return backbone


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / manifest.NAME).unlink()  # it would be the first to find what is wrong
    return tmp_path


def store_scale(folder: Path, scale: np.ndarray) -> None:
    """Store a scale of the query as Keras does, which writes bfloat16 as raw pairs of bytes."""
    is_raw = scale.dtype == ml_dtypes.bfloat16
    replace(folder / SINGLE, f"{QUERY}/1", scale.view("V2") if is_raw else scale)
    if is_raw:
        with h5py.File(folder / SINGLE, "r+") as file:
            file[f"{QUERY}/1"].attrs["dtype"] = "bfloat16"


def logits(backbone) -> np.ndarray:
    hidden_states = backbone({"token_ids": IDS, "padding_mask": np.ones_like(IDS)})
    return keras.ops.convert_to_numpy(backbone.token_embedding(hidden_states, reverse=True))


def dtypes(backbone) -> dict[str, str]:
    return {weight.path: weight.dtype for weight in backbone.weights}


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"dtype": "bfloat16"},
        {"dtype": "mixed_bfloat16", "tie_word_embeddings": True},
        {"filters": ["key", "feedforward_gate_dense"], "attention_bias": True},
        {"filters": ["token_embedding"]},
    ],
    ids=str,
)
def test_round_trip(tmp_path, arguments):
    backbone = save(tmp_path / "first", **arguments)
    loaded = kllama.LlamaBackbone.from_preset(tmp_path / "first")
    assert dtypes(loaded) == dtypes(backbone)
    np.testing.assert_array_equal(logits(loaded), logits(backbone))
    loaded.save_to_preset(str(tmp_path / "second"))
    np.testing.assert_array_equal(logits(kllama.LlamaBackbone.from_preset(tmp_path / "second")), logits(backbone))


def test_dtype_of_the_floats(saved):
    loaded = kllama.LlamaBackbone.from_preset(saved, dtype="bfloat16")
    expected = {
        name: "bfloat16" if dtype == "float32" else dtype
        for name, dtype in dtypes(kllama.LlamaBackbone.from_preset(saved)).items()
    }
    assert dtypes(loaded) == expected
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        loaded = kllama.LlamaBackbone.from_preset(saved)
    finally:
        keras.config.set_dtype_policy("float32")
    assert dtypes(loaded) == dtypes(kllama.LlamaBackbone.from_preset(saved))
    assert loaded.transformer_layers[0].self_attention.query.compute_dtype == "bfloat16"


def test_a_quantised_policy_names_the_dtype_of_the_floats(saved):
    loaded = kllama.LlamaBackbone.from_preset(saved, dtype="int8_from_bfloat16")
    assert dtypes(loaded) == dtypes(kllama.LlamaBackbone.from_preset(saved, dtype="bfloat16"))


def test_float16_cannot_hold_the_sums(saved):
    with pytest.raises(ValueError, match="float16"):
        kllama.LlamaBackbone.from_preset(saved, dtype="float16")


@pytest.mark.backend_independent
def test_policies_of_layers_with_nothing_to_quantise(saved, folder):
    """Keras lists those, too, where a model was built with a quantised policy."""
    policy = {"class_name": "QuantizedDTypePolicy", "config": {"mode": "int8", "source_name": "float32"}}
    others = ["transformer_layer_0", "transformer_layer_0/self_attention", "sequence_output_layernorm", "causal_mask"]
    change_json(
        folder / "config.json",
        lambda content: content["config"]["dtype"]["config"]["policy_map"].update(dict.fromkeys(others, policy)),
    )
    loaded = kllama.LlamaBackbone.from_preset(folder)
    np.testing.assert_array_equal(logits(loaded), logits(kllama.LlamaBackbone.from_preset(saved)))


@pytest.mark.backend_independent
def test_a_float_policy_of_one_layer(tmp_path):
    name = "transformer_layer_0/self_attention/query"
    policies = keras.dtype_policies.DTypePolicyMap("bfloat16", {name: keras.dtype_policies.get("float32")})
    backbone = kllama.LlamaBackbone(**SIZES, dtype=policies)
    backbone.save_to_preset(str(tmp_path))
    assert dtypes(kllama.LlamaBackbone.from_preset(tmp_path)) == dtypes(backbone)
    assert set(dtypes(backbone).values()) == {"bfloat16", "float32"}
    loaded = kllama.LlamaBackbone.from_preset(tmp_path, dtype="mixed_bfloat16")
    assert loaded.transformer_layers[0].self_attention.query.compute_dtype == "bfloat16"


# Faults


def change_policy(folder: Path, layer: str, **changes) -> None:
    def change(content):
        content["config"]["dtype"]["config"]["policy_map"][layer].update(changes)

    change_json(folder / "config.json", change)


@pytest.mark.backend_independent
@pytest.mark.parametrize("mode", ["int4/128", "int4", "float8", "gptq/4/128", "uint8", None, 8, ["int8"]])
def test_another_mode(folder, mode):
    change_policy(folder, "token_embedding", config={"mode": mode, "source_name": "float32"})
    with refuses(
        UnsupportedError, folder / "config.json", 'dtype of "token_embedding"', str(mode), "int8_from_float32"
    ):
        kllama.LlamaBackbone.from_preset(folder)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    "policy", ["int8", 5, None, {}, {"class_name": "Lambda", "config": {}}, {"config": {"source_name": "float32"}}]
)
def test_no_policy(folder, policy):
    change_json(
        folder / "config.json",
        lambda content: content["config"]["dtype"]["config"]["policy_map"].update(token_embedding=policy),
    )
    with refuses(UnsupportedError, folder / "config.json", 'dtype of "token_embedding"', "expected one of"):
        kllama.LlamaBackbone.from_preset(folder)


@pytest.mark.backend_independent
@pytest.mark.parametrize("source", ["float16", "bfloat16", "int8", 5])
def test_a_policy_from_another_dtype(folder, source):
    change_policy(folder, "token_embedding", config={"mode": "int8", "source_name": source})
    with refuses(UnsupportedError, folder / "config.json", f"int8_from_{source}", "int8_from_float32"):
        kllama.LlamaBackbone.from_preset(folder)


@pytest.mark.backend_independent
@pytest.mark.parametrize("default", ["float16", "mixed_float16"])
def test_float16_in_the_file(folder, default):
    def change(content):
        dtype = content["config"]["dtype"]["config"]
        dtype["default_policy"] = default
        for policy in dtype["policy_map"].values():
            policy["config"]["source_name"] = default

    change_json(folder / "config.json", change)
    with refuses(UnsupportedError, folder, f'dtype = "{default}"', "int8"):
        kllama.LlamaBackbone.from_preset(folder)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    "layer", ["transformer_layer_.*/query", "(a+)+b", "", "/", "a//b", "token embedding", "[", "é"]
)
def test_a_key_that_is_no_path(folder, layer):
    """Keras would take it for a regular expression."""
    change_json(
        folder / "config.json",
        lambda content: content["config"]["dtype"]["config"]["policy_map"].update({layer: "float32"}),
    )
    with refuses(CheckpointError, folder / "config.json", f"dtype of {json.dumps(layer)}", "the path of a layer"):
        kllama.LlamaBackbone.from_preset(folder)


def set_policies(folder: Path, layers, policy) -> None:
    change_json(
        folder / "config.json",
        lambda content: content["config"]["dtype"]["config"]["policy_map"].update(dict.fromkeys(layers, policy)),
    )


INT8 = {"class_name": "QuantizedDTypePolicy", "config": {"mode": "int8", "source_name": "float32"}}


@pytest.mark.backend_independent
@pytest.mark.parametrize("policy", [INT8, "bfloat16", "float32"], ids=["int8", "another float", "the default"])
@pytest.mark.parametrize(
    "layer",
    [
        "transformer_layer_0/self_attention/qeury",
        "transformer_layer_0/feedforward_gates_dense",
        "transformer_layer_0/self_attention/query/kernel",
        "transformer_layer_0/query",
        "transformer_layer_1/self_attention/query",
        "transformer_layer_1",
        "transformer_layer_00",
        "transformer_layer_" + "9" * 5000,
        "transformer_layer_0/",
        "llama_backbone",
        "token_embeddings",
        "junk",
    ],
    ids=lambda layer: layer[:60],
)
def test_a_path_that_this_model_does_not_have(folder, layer, policy):
    set_policies(folder, [layer], policy)
    with refuses(CheckpointError, folder / "config.json", f"dtype of {shown(layer)}", "the path of a layer"):
        PresetCheckpoint(folder)


@pytest.mark.backend_independent
def test_more_paths_than_a_model_has(folder):
    set_policies(folder, [f"transformer_layer_0/dropout_{i}" for i in range(41)], "float32")
    with refuses(CheckpointError, folder / "config.json", "dtype of 49 layers", "at most 48"):
        PresetCheckpoint(folder)


@pytest.mark.backend_independent
def test_paths_that_say_nothing_new(saved, folder):
    """Those with the default policy, and layers without variables of KerasHub's own classes."""
    parts = ["self_attention/attention_softmax", "self_attention/rotary_embedding", "self_attention/dropout_3"]
    set_policies(folder, [f"transformer_layer_0/{part}" for part in [*parts, "self_attention_dropout"]], INT8)
    set_policies(folder, ["transformer_layer_0", "causal_mask", "sequence_output_layernorm"], "float32")
    set_policies(folder, [f"transformer_layer_0/{parts[0]}"], "bfloat16")
    assert PresetCheckpoint(folder).dtype == PresetCheckpoint(saved).dtype


@pytest.mark.backend_independent
@pytest.mark.parametrize("policies", [None, [], "int8"])
def test_a_damaged_map(folder, policies):
    change_json(
        folder / "config.json", lambda content: content["config"]["dtype"]["config"].update(policy_map=policies)
    )
    with refuses(UnsupportedError, folder / "config.json", "dtype = ", "expected one of"):
        kllama.LlamaBackbone.from_preset(folder)


@pytest.mark.backend_independent
def test_the_map_lacks_a_layer(folder):
    layer = "transformer_layer_0/self_attention/query"
    change_json(folder / "config.json", lambda content: content["config"]["dtype"]["config"]["policy_map"].pop(layer))
    with refuses(CheckpointError, folder, f"unused: {QUERY}/1"):
        kllama.LlamaBackbone.from_preset(folder)


@pytest.mark.backend_independent
@pytest.mark.parametrize("dtype", ["float32", {"class_name": "DTypePolicy", "config": {"name": "bfloat16"}}])
def test_a_config_without_a_map(folder, dtype):
    change_config(folder / "config.json", dtype=dtype)
    with refuses(CheckpointError, folder, "unused: ", f"{QUERY}/1"):
        kllama.LlamaBackbone.from_preset(folder)


@pytest.mark.backend_independent
def test_a_missing_scale(folder):
    with h5py.File(folder / SINGLE, "r+") as file:
        del file[f"{QUERY}/1"]
    with refuses(CheckpointError, folder, f"missing tensors: {QUERY}/1 (1, 1, 2, 4)"):
        kllama.LlamaBackbone.from_preset(folder)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    "place, array, part",
    [
        (0, np.zeros((8, 2, 4), "float32"), "is float32; expected int8"),
        (1, np.zeros((1, 1, 2, 4), "int8"), "is int8; expected one of float32"),
        (1, np.zeros((2, 4), "float32"), "has shape (2, 4); expected (1, 1, 2, 4)"),
        (1, np.full((1, 1, 2, 4), np.inf, "float32"), "8 of 8"),
        (0, np.zeros((8, 2, 4), "int16"), "is int16"),
        (0, np.zeros((8, 2, 4), "uint8"), "is uint8"),
    ],
)
def test_wrong_tensors(folder, place, array, part):
    replace(folder / SINGLE, f"{QUERY}/{place}", array)
    with refuses(CheckpointError, folder, f"{QUERY}/{place}", part):
        kllama.LlamaBackbone.from_preset(folder)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    "dtype, values",
    [("float32", [1e-40, 1e-37]), ("bfloat16", [1e-39, 1e-37]), ("float16", [1e-7, 1e-3])],
)
def test_scales_that_int8_cannot_be_divided_by(folder, dtype, values):
    for value in [0.0, -0.0, -1.0, -np.inf, np.inf, np.nan, *values]:
        check_scale_is_refused(folder, dtype, value)


def check_scale_is_refused(folder, dtype, value):
    scale = np.ones((1, 1, 2, 4), ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    scale[0, 0, 1, 2] = value
    store_scale(folder, scale)
    with refuses(CheckpointError, folder / SINGLE, f"{QUERY}/1", "1 of 8"):
        list(PresetCheckpoint(folder).tensors())


@pytest.mark.backend_independent
@pytest.mark.parametrize("value", [1e-36, 127.0, 1.27e9, 3e38])
def test_scales_that_it_can_be_divided_by(folder, value):
    replace(folder / SINGLE, f"{QUERY}/1", np.full((1, 1, 2, 4), value, "float32"))
    arrays = dict(PresetCheckpoint(folder).tensors())
    path = "transformer_layer_0/self_attention/query/kernel"
    assert np.all(np.isfinite(arrays[path].astype("float32") / arrays[f"{path}_scale"]))


@pytest.mark.backend_independent
@pytest.mark.parametrize("place", [1, 3])
def test_scales_of_the_embedding(folder, place):
    name = f"layers/token_embedding/vars/{place}"
    replace(folder / SINGLE, name, np.zeros(12, "float32"))
    with refuses(CheckpointError, folder / SINGLE, name, "12 of 12"):
        list(PresetCheckpoint(folder).tensors())


@pytest.mark.backend_independent
def test_int8_where_floats_are_expected(folder):
    replace(folder / SINGLE, "layers/rms_norm/vars/0", np.zeros(8, "int8"))
    with refuses(CheckpointError, folder / SINGLE, "layers/rms_norm/vars/0 is int8; expected one of float32"):
        kllama.LlamaBackbone.from_preset(folder)
