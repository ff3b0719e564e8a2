"""The table of names: every tensor of transformers' own model, its shape, and the way there and back."""

import numpy as np
import pytest

from kllama.checkpoints.name_map import TABLE, expected_tensors, num_parameters

pytestmark = pytest.mark.backend_independent

CONFIG = {
    "vocabulary_size": 11,
    "num_layers": 3,
    "hidden_dim": 8,
    "intermediate_dim": 10,
    "num_query_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_the_tensors_are_those_of_transformers(tied, attention_bias, mlp_bias):
    from transformers import LlamaConfig, LlamaForCausalLM

    switches = {"tie_word_embeddings": tied, "attention_bias": attention_bias, "mlp_bias": mlp_bias}
    # transformers wants D to be a multiple of N
    sizes = {"hidden_dim": 12, "num_query_heads": 6}
    config = CONFIG | sizes | switches
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            num_hidden_layers=3,
            hidden_size=12,
            intermediate_size=10,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=4,
            **switches,
        )
    )
    actual = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {tensor.name: tensor.stored_shape for tensor in expected_tensors(config)} == actual
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_paths_and_shapes_are_those_of_keras_hub():
    shapes = {tensor.path: tensor.shape for tensor in expected_tensors(CONFIG)}
    assert len(shapes) == 3 + 3 * (9 + 7)
    layer = {
        path.removeprefix("transformer_layer_2/"): s
        for path, s in shapes.items()
        if path.startswith("transformer_layer_2/")
    }
    assert layer == {
        "self_attention_layernorm/scale": (8,),
        "self_attention/query/kernel": (8, 6, 4),
        "self_attention/query/bias": (6, 4),
        "self_attention/key/kernel": (8, 3, 4),
        "self_attention/key/bias": (3, 4),
        "self_attention/value/kernel": (8, 3, 4),
        "self_attention/value/bias": (3, 4),
        "self_attention/attention_output/kernel": (6, 4, 8),
        "self_attention/attention_output/bias": (8,),
        "feedforward_layernorm/scale": (8,),
        "feedforward_gate_dense/kernel": (8, 10),
        "feedforward_gate_dense/bias": (10,),
        "feedforward_intermediate_dense/kernel": (8, 10),
        "feedforward_intermediate_dense/bias": (10,),
        "feedforward_output_dense/kernel": (10, 8),
        "feedforward_output_dense/bias": (8,),
    }
    assert list(shapes)[0] == "token_embedding/embeddings"
    assert list(shapes.items())[-2:] == [
        ("sequence_output_layernorm/scale", (8,)),
        ("token_embedding/reverse_embeddings", (8, 11)),
    ]


def test_import_computes_what_the_reference_computes():
    """`W x` of a stored matrix is the einsum of kllama's kernel, head by head."""
    rng = np.random.default_rng(0)
    by_name = {tensor.name: tensor for tensor in expected_tensors(CONFIG)}
    x, heads = rng.normal(size=8), rng.normal(size=(6, 4))
    for projection, num_heads in (("q", 6), ("k", 3), ("v", 3)):
        tensor = by_name[f"model.layers.1.self_attn.{projection}_proj.weight"]
        matrix = rng.normal(size=tensor.stored_shape)
        expected = (matrix @ x).reshape(num_heads, 4)
        np.testing.assert_allclose(np.einsum("d,dnh->nh", x, tensor.to_kllama(matrix)), expected)
    tensor = by_name["model.layers.1.self_attn.o_proj.weight"]
    matrix = rng.normal(size=tensor.stored_shape)
    np.testing.assert_allclose(np.einsum("nh,nhd->d", heads, tensor.to_kllama(matrix)), matrix @ heads.reshape(-1))
    tensor = by_name["model.layers.1.mlp.down_proj.weight"]
    matrix, hidden = rng.normal(size=tensor.stored_shape), rng.normal(size=10)
    np.testing.assert_allclose(hidden @ tensor.to_kllama(matrix), matrix @ hidden)


def test_export_undoes_import():
    for index, tensor in enumerate(expected_tensors(CONFIG)):
        array = np.random.default_rng(index).normal(size=tensor.stored_shape).astype("float16")
        imported = tensor.to_kllama(array)
        assert imported.shape == tensor.shape and imported.dtype == array.dtype, tensor.path
        np.testing.assert_array_equal(tensor.to_stored(imported), array, err_msg=tensor.path)


def test_names_and_paths_are_one_to_one():
    assert len({row.name for row in TABLE}) == len({row.path for row in TABLE}) == len(TABLE)


def test_a_billion_layers_cost_nothing():
    config = CONFIG | {"num_layers": 10**9}
    assert next(expected_tensors(config)).path == "token_embedding/embeddings"
    one_layer = num_parameters(CONFIG | {"num_layers": 2}) - num_parameters(CONFIG | {"num_layers": 1})
    assert num_parameters(config) == num_parameters(CONFIG) + one_layer * (10**9 - 3)
