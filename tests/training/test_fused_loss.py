"""The loss from hidden states: the same training as from logits, and no array of all logits."""

import keras
import numpy as np
import pytest
from keras import ops

import kllama
from kllama.core import linear_cross_entropy as fused
from kllama.training import fused_loss
from kllama.training.losses import TokenCrossentropy
from kllama.training.metrics import Perplexity, TokenAccuracy

VOCABULARY_SIZE, BATCH_SIZE, LENGTH = 50, 3, 11


class Plain(kllama.LlamaCausalLM):
    """A model with a loss of its own, which therefore gets logits."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


@pytest.fixture(autouse=True)
def few_logits_at_once(monkeypatch):
    """Let 33 rows be chunks of 16, the last of which is filled up."""
    monkeypatch.setattr(fused, "LOGITS_AT_ONCE", 16 * VOCABULARY_SIZE)


@pytest.fixture
def calls(monkeypatch):
    """Count what is traced, or run, of the loss from hidden states."""
    seen, original = [], fused_loss.sum_losses

    def spy(*args, **kwargs):
        seen.append(args[1].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr("kllama.models.training_model.sum_losses", spy)
    return seen


def build(make, tied=False, dtype="float32", lora=None, mode=None):
    keras.utils.set_random_seed(2)
    sizes = {"num_query_heads": 4, "hidden_dim": 16, "intermediate_dim": 24, "num_key_value_heads": 2}
    backbone = kllama.LlamaBackbone(
        VOCABULARY_SIZE, 2, **sizes, tie_word_embeddings=tied, dtype=dtype, initializer_range=0.3
    )
    model = make(backbone)
    if mode is not None:
        model.quantize(mode)
    if lora is not None:
        backbone.enable_lora(2, lora)
    return model


def batches(num_batches):
    random = np.random.default_rng(3)
    shape = num_batches * BATCH_SIZE, LENGTH
    ids = random.integers(0, VOCABULARY_SIZE, shape)
    labels = np.where(random.random(shape) < 0.2, -100, np.roll(ids, -1, 1))
    return ids, labels, random.integers(0, 3, shape).astype("float32")


MODELS = {
    "untied": {},
    "tied": {"tied": True},
    "lora": {"lora": ["query", "value"]},
    "lora in the tied head": {"tied": True, "lora": ["token_embedding"]},
    "int8 and lora": {"mode": "int8", "lora": ["query", "feedforward_gate_dense"]},
    "bfloat16": {"dtype": "mixed_bfloat16"},
}


@pytest.mark.parametrize("name", MODELS)
def test_training_is_that_of_logits(name, calls):
    x, y, weights = batches(num_batches=10)
    results = []
    for make in (Plain, kllama.LlamaCausalLM):
        model = build(make, **MODELS[name])
        model.compile(keras.optimizers.SGD(0.03))
        history = model.fit(x, y, BATCH_SIZE, weights, epochs=2, shuffle=False, verbose=0).history
        evaluated = model.evaluate(x, y, BATCH_SIZE, weights, verbose=0, return_dict=True)
        results.append((history, evaluated, [ops.convert_to_numpy(v) for v in model.trainable_variables]))
        has_plain_head = "head" not in name and "int8" not in name
        assert bool(calls) == (make is kllama.LlamaCausalLM and has_plain_head)
    (plain, plain_end, plain_weights), (history, end, weights) = results
    tolerance = 1e-5 if name != "bfloat16" else 2e-2
    for metric, values in plain.items():
        # Of 230 labels one or two may be hits by a rounding; `linear_cross_entropy` has tests of its own.
        is_share = metric == "sparse_categorical_accuracy"
        tolerances = {"rtol": 0 if is_share else 10 * tolerance, "atol": 0.03 if is_share else 0}
        np.testing.assert_allclose(history[metric], values, err_msg=metric, **tolerances)
        np.testing.assert_allclose(end[metric], plain_end[metric], err_msg=metric, **tolerances)
    np.testing.assert_allclose(history["loss"], plain["loss"], rtol=tolerance)
    for ours, theirs in zip(weights, plain_weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())
    assert plain["loss"][1] < plain["loss"][0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
        {"loss": TokenCrossentropy(ignored_id=0)},
        {"weighted_metrics": [keras.metrics.SparseTopKCategoricalAccuracy(3)]},
        {"metrics": [Perplexity()]},
    ],
)
def test_what_else_looks_at_logits_gets_them(arguments, calls):
    model = build(kllama.LlamaCausalLM)
    model.compile("sgd", **arguments)
    x, _, _ = batches(1)
    model.fit(x, verbose=0)
    assert calls == []


@pytest.mark.parametrize("arguments", [{}, {"loss": TokenCrossentropy(), "weighted_metrics": [TokenAccuracy()]}])
def test_what_does_not_gets_none(arguments, calls):
    model = build(kllama.LlamaCausalLM)
    model.compile("sgd", **arguments)
    model.fit(*batches(1)[:2], verbose=0)
    assert {tuple(shape[1:]) for shape in calls} == {(LENGTH, 16)}
    assert model.predict(batches(1)[0], verbose=0).shape == (BATCH_SIZE, LENGTH, VOCABULARY_SIZE)
