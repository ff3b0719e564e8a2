"""A dtype policy reaches every layer and every weight of a model, however it is given."""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops

import kllama

POLICIES = ["float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16"]
BATCH = {"token_ids": np.array([[1, 2, 3, 4]], "int32"), "padding_mask": np.array([[1, 1, 1, 0]], "int32")}


def make_model(**arguments):
    backbone = kllama.LlamaBackbone(
        11, 1, 2, 8, 12, 1, dropout=0.1, attention_dropout=0.1, attention_bias=True, mlp_bias=True, **arguments
    )
    return kllama.LlamaCausalLM(backbone)


@contextlib.contextmanager
def global_policy(name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def by_name(name):
    return make_model(dtype=name)


def by_policy(name):
    return make_model(dtype=keras.DTypePolicy(name))


def by_map(name):
    return make_model(dtype=keras.dtype_policies.DTypePolicyMap(name))


def by_global_policy(name):
    with global_policy(name):
        return make_model()


def layers_of(model) -> list:
    return [layer for layer in model._flatten_layers() if not isinstance(layer, keras.layers.InputLayer)]


def dtype_of(x) -> str:
    return keras.backend.standardize_dtype(x.dtype)


@pytest.mark.parametrize("build", [by_name, by_policy, by_map, by_global_policy])
@pytest.mark.parametrize("name", POLICIES)
def test_every_layer_and_every_weight(build, name):
    model, policy = build(name), keras.DTypePolicy(name)
    layers = layers_of(model)
    assert len(layers) > 15
    for layer in layers:
        dtypes = layer.compute_dtype, layer.variable_dtype
        assert dtypes == (policy.compute_dtype, policy.variable_dtype), layer.name
    for weight in model.weights:
        assert dtype_of(weight) == policy.variable_dtype, weight.path
    hidden_states, logits = model.backbone(BATCH), model(BATCH)
    assert (dtype_of(hidden_states), dtype_of(logits)) == (policy.compute_dtype, "float32")
    assert (model.backbone.output.dtype, model.output.dtype) == (policy.compute_dtype, "float32")
    assert np.isfinite(ops.convert_to_numpy(logits)).all()


@pytest.mark.parametrize("name", POLICIES)
def test_a_config_keeps_the_policy(name):
    backbone = make_model(dtype=name).backbone
    revived = kllama.LlamaBackbone.from_config(backbone.get_config())
    assert revived.get_config() == backbone.get_config()
    assert {layer.dtype_policy.name for layer in layers_of(revived)} == {name}


def test_a_map_with_one_exception():
    """The normalizations in float32, the rest in bfloat16; the config says so."""
    policies = keras.dtype_policies.DTypePolicyMap("bfloat16")
    policies[".*layernorm"] = keras.DTypePolicy("float32")
    backbone = make_model(dtype=policies).backbone
    for weight in backbone.weights:
        assert dtype_of(weight) == ("float32" if "layernorm" in weight.path else "bfloat16"), weight.path
    revived = kllama.LlamaBackbone.from_config(backbone.get_config())
    assert [(w.path, w.dtype) for w in revived.weights] == [(w.path, w.dtype) for w in backbone.weights]
    revived.set_weights(backbone.get_weights())
    outputs = [ops.convert_to_numpy(ops.cast(model(BATCH), "float32")) for model in (backbone, revived)]
    np.testing.assert_array_equal(*outputs)
