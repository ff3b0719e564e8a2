"""The table of names: every tensor of transformers' own model, its shape, and the way there and back."""

import numpy as np
import pytest

from kllama.checkpoints.name_map import (
    GGUF_LLAMA,
    GGUF_QWEN,
    HUGGINGFACE,
    LLAMA2C,
    META,
    TABLE,
    expected_tensors,
    num_parameters,
)

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
    "attention_output_bias": True,
    "qk_norm": False,
    "mlp_bias": True,
}
NAMINGS = {
    "Hugging Face": HUGGINGFACE,
    "Meta": META,
    "llama2.c": LLAMA2C,
    "GGUF": GGUF_LLAMA,
    "GGUF of Qwen": GGUF_QWEN,
}


# The classes of transformers, and the settings with which kllama's tensors are theirs.
CLASSES = {
    "Llama": {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True},
    "Llama with biases": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {},
    "Qwen2": {"qkv_bias": True},
    "Qwen3": {"attention_bias": True, "qk_norm": True},
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_tensors_are_those_of_transformers(name):
    import transformers

    switches = dict(CLASSES[name])
    qk_norm, qkv_bias = (switches.pop(key, False) for key in ("qk_norm", "qkv_bias"))
    # transformers wants D to be a multiple of N
    sizes = {"vocab_size": 11, "num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 10}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
    family = name.split()[0]
    reference = getattr(transformers, f"{family}Config")(**sizes, **heads, **switches)
    model = getattr(transformers, f"{family}ForCausalLM")(reference)
    has_bias = switches.get("attention_bias", False)
    config = CONFIG | {
        "hidden_dim": 24,
        "tie_word_embeddings": switches.get("tie_word_embeddings", False),
        "attention_bias": has_bias or qkv_bias,
        "attention_output_bias": has_bias,
        "qk_norm": qk_norm,
        "mlp_bias": switches.get("mlp_bias", False),
    }
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


@pytest.mark.parametrize("naming", NAMINGS.values(), ids=NAMINGS)
def test_export_undoes_import(naming):
    for index, tensor in enumerate(expected_tensors(CONFIG | {"qk_norm": True}, naming)):
        array = np.random.default_rng(index).normal(size=tensor.stored_shape).astype("float16")
        imported = tensor.to_kllama(array)
        assert imported.shape == tensor.shape and imported.dtype == array.dtype, tensor.path
        np.testing.assert_array_equal(tensor.to_stored(imported), array, err_msg=tensor.path)


def test_the_order_of_rotary_pairs():
    """Member j of pair i is dimension 2 i + j of a head where pairs are interleaved, and i + H/2 j in kllama."""
    for naming in (META, LLAMA2C, GGUF_LLAMA):
        interleaved = {tensor.path: tensor for tensor in expected_tensors(CONFIG | {"qk_norm": True}, naming)}
        for name, heads in (("query", 6), ("key", 3)):
            layer = f"transformer_layer_2/self_attention/{name}"
            matrix = np.random.default_rng(0).normal(size=(heads, 4, 8))  # (heads, H, D)
            half_split = np.stack([matrix[:, 0], matrix[:, 2], matrix[:, 1], matrix[:, 3]], axis=1)
            kernel = interleaved[f"{layer}/kernel"].to_kllama(matrix.reshape(heads * 4, 8))
            np.testing.assert_array_equal(kernel, half_split.transpose(2, 0, 1))
            bias = interleaved[f"{layer}/bias"].to_kllama(matrix[..., 0].reshape(-1))
            np.testing.assert_array_equal(bias, half_split[..., 0])
            gain = interleaved[f"{layer}_norm/scale"].to_kllama(matrix[0, :, 0])
            np.testing.assert_array_equal(gain, half_split[0, :, 0])


def test_what_is_not_turned_has_one_order():
    tensors = [list(expected_tensors(CONFIG | {"qk_norm": True}, naming)) for naming in (HUGGINGFACE, META, GGUF_QWEN)]
    for one, meta, qwen in zip(*tensors, strict=True):
        array = np.random.default_rng(0).normal(size=one.stored_shape)
        np.testing.assert_array_equal(qwen.to_kllama(array), one.to_kllama(array))
        is_turned = one.path.split("/")[-2].startswith(("query", "key"))
        assert np.array_equal(meta.to_kllama(array), one.to_kllama(array)) != is_turned, one.path


@pytest.mark.parametrize(
    ("naming", "names"),
    [
        (META, ["tok_embeddings.weight", "layers.2.attention.wq.weight", "layers.2.feed_forward.w2.weight", "output"]),
        (LLAMA2C, ["tok_emb", "2.wq", "2.w2", "output"]),
        (GGUF_LLAMA, ["token_embd.weight", "blk.2.attn_q.weight", "blk.2.ffn_down.weight", "output.weight"]),
        (GGUF_QWEN, ["token_embd.weight", "blk.2.attn_q.bias", "blk.2.attn_k_norm.weight", "output_norm.weight"]),
    ],
)
def test_names_of_other_formats(naming, names):
    no_biases = {"attention_bias": False, "attention_output_bias": False, "mlp_bias": False}
    config = CONFIG | {"qk_norm": True} | (no_biases if naming is LLAMA2C else {})  # its files have none
    found = [tensor.name for tensor in expected_tensors(config, naming)]
    assert len(set(found)) == len(found) == len(list(expected_tensors(config)))
    names = [f"{name}.weight" if naming is META and name == "output" else name for name in names]
    assert set(names) <= set(found)


def test_names_and_paths_are_one_to_one():
    assert len({row.name for row in TABLE}) == len({row.path for row in TABLE}) == len(TABLE)


def test_a_billion_layers_cost_nothing():
    config = CONFIG | {"num_layers": 10**9}
    assert next(expected_tensors(config)).path == "token_embedding/embeddings"
    one_layer = num_parameters(CONFIG | {"num_layers": 2}) - num_parameters(CONFIG | {"num_layers": 1})
    assert num_parameters(config) == num_parameters(CONFIG) + one_layer * (10**9 - 3)
