"""`load_weights` on files that KerasHub's `save_weights` wrote."""

import keras_hub
import numpy as np
import pytest
from keras import ops

import kllama
from kllama.errors import CheckpointError

SIZES = {
    "vocabulary_size": 40,
    "num_layers": 2,
    "num_query_heads": 4,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "num_key_value_heads": 2,
}
IDS = np.random.default_rng(0).integers(0, 40, (2, 8)).astype("int32")
INPUTS = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}


def logits(model) -> np.ndarray:
    return ops.convert_to_numpy(model(INPUTS))


def build(library, number="", **arguments):
    backbone = getattr(library.models, f"Llama{number}Backbone")(**{**SIZES, **arguments})
    for weight in backbone.weights:
        weight.assign(np.random.default_rng(len(weight.path)).normal(0, 0.3, weight.shape))
    return getattr(library.models, f"Llama{number}CausalLM")(backbone, None)


@pytest.mark.parametrize("number", ["", "3"])
@pytest.mark.parametrize("arguments", [{}, {"tie_word_embeddings": True}, {"dtype": "bfloat16"}], ids=str)
def test_of_a_model(tmp_path, number, arguments):
    theirs = build(keras_hub, number, **arguments)
    theirs.save_weights(tmp_path / "lm.weights.h5")
    theirs.backbone.save_weights(tmp_path / "backbone.weights.h5")
    for part, name in (("lm", "lm"), ("backbone", "backbone"), ("lm", "backbone"), ("backbone", "lm")):
        ours = kllama.LlamaCausalLM(kllama.LlamaBackbone(**{**SIZES, **arguments}))
        model = ours if part == "lm" else ours.backbone
        model.load_weights(tmp_path / f"{name}.weights.h5")
        for mine, other in zip(ours.weights, theirs.weights, strict=True):
            assert mine.path == other.path
            np.testing.assert_array_equal(ops.convert_to_numpy(mine), ops.convert_to_numpy(other))


def test_after_training(tmp_path):
    theirs = build(keras_hub)
    theirs.fit(INPUTS, IDS, verbose=0)
    theirs.save_weights(tmp_path / "lm.weights.h5")  # with the state of the optimizer
    ours = build(kllama)
    ours.load_weights(str(tmp_path / "lm.weights.h5"))
    np.testing.assert_allclose(logits(ours), logits(theirs), atol=1e-5)


def test_with_lora(tmp_path):
    theirs, ours = build(keras_hub), build(kllama)
    for model in (theirs, ours):
        model.backbone.enable_lora(2)
        for variable in model.backbone.trainable_variables:
            variable.assign(0.2 * ops.ones(variable.shape))
    theirs.save_weights(tmp_path / "lm.weights.h5")
    ours.load_weights(tmp_path / "lm.weights.h5")
    np.testing.assert_allclose(logits(ours), logits(theirs), atol=1e-4)


def test_of_an_int8_model(tmp_path):
    theirs, ours = build(keras_hub), kllama.LlamaCausalLM(kllama.LlamaBackbone(**SIZES))
    theirs.quantize("int8")
    theirs.save_weights(tmp_path / "lm.weights.h5")
    with pytest.raises(CheckpointError, match="missing|unused|int8"):
        ours.load_weights(tmp_path / "lm.weights.h5")
    ours.quantize("int8")
    ours.load_weights(tmp_path / "lm.weights.h5")
    np.testing.assert_allclose(logits(ours), logits(theirs), atol=2e-2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_layers": 1}, "unused: layers/llama_backbone/layers/llama_transformer_decoder_1"),
        ({"num_layers": 3}, "missing tensors: layers/llama_backbone/layers/llama_transformer_decoder_2"),
        ({"intermediate_dim": 25}, "has shape (16, 24); expected (16, 25)"),
        ({"tie_word_embeddings": True}, "unused: layers/llama_backbone/layers/reversible_embedding/vars/1"),
    ],
)
def test_of_another_model(tmp_path, arguments, words):
    build(keras_hub).save_weights(tmp_path / "lm.weights.h5")
    ours = kllama.LlamaCausalLM(kllama.LlamaBackbone(**{**SIZES, **arguments}))
    before = logits(ours)
    with pytest.raises(CheckpointError) as caught:
        ours.load_weights(tmp_path / "lm.weights.h5")
    assert words in str(caught.value)
    np.testing.assert_array_equal(logits(ours), before)


def test_files_of_its_own(tmp_path):
    model, other = build(kllama), kllama.LlamaCausalLM(kllama.LlamaBackbone(**SIZES))
    model.save_weights(tmp_path / "lm.weights.h5")
    other.load_weights(tmp_path / "lm.weights.h5")
    np.testing.assert_array_equal(logits(other), logits(model))
    with pytest.raises(FileNotFoundError):
        other.load_weights(tmp_path / "absent.weights.h5")
