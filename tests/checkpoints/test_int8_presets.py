"""A quantised model that is saved and loaded gives the same logits, bit for bit, and each fault is refused by name."""

import gc
import json
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

import kllama
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
    return tmp_path


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
def test_int8_where_floats_are_expected(folder):
    replace(folder / SINGLE, "layers/rms_norm/vars/0", np.zeros(8, "int8"))
    with refuses(CheckpointError, folder / SINGLE, "layers/rms_norm/vars/0 is int8; expected one of float32"):
        kllama.LlamaBackbone.from_preset(folder)
