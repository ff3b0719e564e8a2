"""Models built without values: nothing random is drawn, every weight gets its tensor, and Keras is left as it was."""

import re

import keras
import ml_dtypes
import numpy as np
import pytest
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import initialize_all_variables

from kllama.errors import CheckpointError
from kllama.models.llama_backbone import LlamaBackbone
from kllama.models.llama_causal_lm import LlamaCausalLM
from kllama.models.weights import assign_weights, uninitialized_weights

SIZES = {
    "vocabulary_size": 16,
    "num_layers": 1,
    "num_query_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "num_key_value_heads": 1,
}
KERNEL = "transformer_layer_0/self_attention/query/kernel"
SCALE = "sequence_output_layernorm/scale"
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def empty(**arguments) -> LlamaBackbone:
    with uninitialized_weights():
        return LlamaBackbone(**SIZES, **arguments)


def random_tensors(model, dtype="float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {weight.path: rng.normal(size=weight.shape).astype(dtype) for weight in model.weights}


def filled(**arguments) -> LlamaBackbone:
    model = empty(**arguments)
    assign_weights(model, random_tensors(model).items())
    return model


def values(model) -> dict[str, np.ndarray]:
    return {weight.path: keras.ops.convert_to_numpy(weight.value) for weight in model.weights}


def waiting() -> list:
    return global_state.get_global_attribute("uninitialized_variables", [])


def refuses(*parts: str):
    return pytest.raises(CheckpointError, match="".join(f"(?=.*{re.escape(part)})" for part in parts))


@pytest.fixture(autouse=True)
def nothing_waits():
    """Whatever a test does, Keras has no variables to initialize before and after it, and no scope is left open."""
    assert waiting() == []
    yield
    assert waiting() == []
    assert not keras.src.backend.in_stateless_scope()


# Building


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The shapes of all random weights that are drawn."""
    shapes = []

    def draw(self, shape, dtype=None):
        shapes.append(tuple(shape))
        return keras.ops.zeros(shape, dtype)

    monkeypatch.setattr(keras.initializers.RandomNormal, "__call__", draw)
    return shapes


def test_draws_no_random_weights(drawn):
    model = filled(tie_word_embeddings=True)
    assert drawn == []
    LlamaBackbone(**SIZES, tie_word_embeddings=True)
    assert len(drawn) == sum(weight.path.endswith(("kernel", "embeddings")) for weight in model.weights) == 8


def test_knows_shapes_and_dtypes_but_no_values():
    model = empty(dtype="bfloat16")
    assert {weight.path: (tuple(weight.shape), weight.dtype) for weight in model.weights}[KERNEL] == (
        (8, 2, 4),
        "bfloat16",
    )
    assert all(weight._value is None for weight in model.weights)


def test_an_error_while_building():
    with pytest.raises(ValueError, match="num_layers"):
        with uninitialized_weights():
            LlamaBackbone(**{**SIZES, "num_layers": 0})
    assert keras.Variable(np.ones(2)).value is not None


def test_variables_that_wait_already_still_wait():
    with keras.StatelessScope(initialize_variables=False):
        other = keras.Variable(keras.initializers.Constant(7), shape=(2,))
    model = empty()
    assert waiting() == [other]
    initialize_all_variables()
    np.testing.assert_array_equal(other, [7, 7])
    assert all(weight._value is None for weight in model.weights)


def test_a_model_built_meanwhile():
    model = empty()
    tensors = random_tensors(model)
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])

    def give():
        for item in tensors.items():
            yield item
            keras.layers.Dense(1).build((None, 1))

    assert all(weight._value is None for weight in model.weights)
    np.testing.assert_array_equal(other.predict(np.ones((1, 3)), verbose=0), [[3, 3]])
    assign_weights(model, give())
    for path, value in values(model).items():
        np.testing.assert_array_equal(value, tensors[path], path)


# Filling


def test_every_weight_gets_its_tensor_in_any_order():
    model = empty(attention_bias=True, mlp_bias=True)
    tensors = random_tensors(model)
    assign_weights(model, reversed(tensors.items()))
    for path, value in values(model).items():
        np.testing.assert_array_equal(value, tensors[path], path)


def test_missing():
    model = empty()
    tensors = random_tensors(model)
    del tensors[KERNEL], tensors[SCALE]
    with refuses(KERNEL, SCALE, "2"):
        assign_weights(model, tensors.items())


def test_extra():
    model = empty()
    tensors = random_tensors(model)
    with refuses("lm_head", "expected"):
        assign_weights(model, [("lm_head", np.zeros(2)), *tensors.items()])


def test_twice():
    model = empty()
    tensors = random_tensors(model)
    with refuses(KERNEL, "twice"):
        assign_weights(model, [(KERNEL, tensors[KERNEL]), *tensors.items()])


@pytest.mark.parametrize("shape", [(8, 8), (2, 8, 4), (8, 2, 4, 1), ()])
def test_wrong_shape(shape):
    model = empty()
    tensors = random_tensors(model)
    with refuses(KERNEL, str(shape), "(8, 2, 4)"):
        assign_weights(model, {**tensors, KERNEL: np.zeros(shape, "float32")}.items())


def test_the_next_model_after_a_failure():
    model = empty()
    with refuses("gives no tensor"):
        assign_weights(model, [])
    np.testing.assert_array_equal(values(filled())[KERNEL], random_tensors(model)[KERNEL])


@pytest.mark.parametrize("stored", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("policy", ["float32", "float16", "bfloat16", "mixed_bfloat16"])
def test_dtypes(stored, policy):
    model = empty(dtype=policy)
    tensors = random_tensors(model, stored)
    assign_weights(model, tensors.items())
    dtype = "float32" if policy.startswith("mixed") else policy
    for weight in model.weights:
        assert keras.backend.standardize_dtype(weight.value.dtype) == dtype
        expected = tensors[weight.path].astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype("float32")
        actual = keras.ops.convert_to_numpy(keras.ops.cast(weight.value, "float32"))
        np.testing.assert_array_equal(actual, expected, weight.path)


@pytest.mark.parametrize("change", ["transposed", "read-only", "every other"])
def test_views(change):
    """Readers give views of what they read; a weight is memory of its own, whatever its order."""
    model = empty()
    tensors = random_tensors(model)

    def view(array):
        if change == "transposed":
            return np.ascontiguousarray(array.T).T
        if change == "every other":
            return np.repeat(array, 2, axis=0)[::2]
        array = np.array(array)
        array.flags.writeable = False
        return array

    assign_weights(model, [(path, view(array)) for path, array in tensors.items()])
    for weight in model.weights:
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight.value), tensors[weight.path])
        weight.assign(keras.ops.ones(weight.shape))


# Afterwards


def test_random_generators_have_a_state():
    model = filled(dropout=0.5, attention_dropout=0.5)
    weights = {id(weight) for weight in model.weights}
    states = [variable for variable in model.variables if id(variable) not in weights]
    assert [tuple(state.shape) for state in states] == [(2,), (2,)]
    assert all(variable._value is not None for variable in model.variables)
    inputs = {"token_ids": IDS, "padding_mask": None}
    first, second = (keras.ops.convert_to_numpy(model(inputs, training=True)) for _ in range(2))
    assert np.any(first != second)


def test_fit_and_predict_as_if_built_with_values():
    plain = LlamaBackbone(**SIZES)
    loaded = [empty(name=f"backbone_{i}") for i in range(2)]
    tensors = random_tensors(plain)
    for weight in plain.weights:
        weight.assign(tensors[weight.path])
    for backbone in loaded:
        assign_weights(backbone, tensors.items())
    plain, first, second = map(LlamaCausalLM, (plain, *loaded))
    expected = plain.predict(IDS, verbose=0)
    np.testing.assert_array_equal(first.predict(IDS, verbose=0), expected)

    histories = []
    for model in (plain, first):
        model.compile(optimizer=keras.optimizers.Adam(0.01), run_eagerly=False)
        histories.append(model.fit(IDS, batch_size=2, epochs=2, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(histories[0], histories[1], rtol=1e-6)
    assert histories[0][1] < histories[0][0]
    trained = values(first)
    for path, value in values(plain).items():
        np.testing.assert_allclose(trained[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
        assert np.any(value != tensors[path])
    np.testing.assert_array_equal(second.predict(IDS, verbose=0), expected)
