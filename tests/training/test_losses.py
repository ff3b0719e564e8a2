"""The loss and the metrics against NumPy, and against what padding and small dtypes do to Keras' own."""

import keras
import numpy as np
import pytest
from keras import ops

from kllama.training.losses import TokenCrossentropy
from kllama.training.metrics import Perplexity, TokenAccuracy

VOCABULARY_SIZE = 700


@pytest.fixture
def batch():
    random = np.random.default_rng(1)
    labels = random.integers(0, VOCABULARY_SIZE, (3, 5))
    logits = random.normal(0, 3, (3, 5, VOCABULARY_SIZE)).astype("float32")
    weights = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0.5, 2, 1, 1, 0]], "float32")
    return labels, logits, weights


def token_losses(labels, logits):
    logits = logits.astype("float64")
    chosen = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - chosen


def value(loss, labels, logits, weights=None) -> float:
    return float(ops.convert_to_numpy(loss(labels, logits, weights)))


def result(metric, *batches) -> float:
    for arguments in batches:
        metric.update_state(*arguments)
    return float(ops.convert_to_numpy(metric.result()))


def test_loss_is_the_mean_over_the_weights(batch):
    labels, logits, weights = batch
    expected = (token_losses(labels, logits) * weights).sum() / weights.sum()
    assert value(TokenCrossentropy(), labels, logits, weights) == pytest.approx(expected, rel=1e-5)
    assert value(TokenCrossentropy(), labels, logits) == pytest.approx(token_losses(labels, logits).mean(), rel=1e-5)


def test_weights_of_whole_rows(batch):
    labels, logits, _ = batch
    weights = np.array([1.0, 0.0, 2.0], "float32")
    expected = np.average(token_losses(labels, logits).mean(1), weights=weights)
    assert value(TokenCrossentropy(), labels, logits, weights) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("padding", [3, 59])
def test_padding_does_not_dilute(batch, padding):
    labels, logits, weights = batch
    expected = value(TokenCrossentropy(), labels, logits, weights)
    labels, weights = (np.pad(array, ((0, 0), (0, padding))) for array in (labels, weights))
    logits = np.pad(logits, ((0, 0), (0, padding), (0, 0)))
    assert value(TokenCrossentropy(), labels, logits, weights) == pytest.approx(expected, rel=1e-5)
    keras_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert value(keras_loss, labels, logits, weights) < 0.7 * expected  # what this loss is for


@pytest.mark.parametrize("make", [TokenCrossentropy, TokenAccuracy, Perplexity])
def test_ignored_labels_count_for_nothing(batch, make):
    labels, logits, weights = batch
    labels = np.where(weights > 0, labels, -100)
    evaluate = value if make is TokenCrossentropy else lambda metric, *arguments: result(metric, arguments)
    hidden = evaluate(make(), labels, logits, np.ones_like(weights))
    assert hidden == pytest.approx(evaluate(make(), labels, logits, (weights > 0).astype("float32")), rel=1e-6)
    other = make(ignored_id=-7)
    assert evaluate(other, np.where(labels == -100, -7, labels), logits, None) == pytest.approx(hidden, rel=1e-6)


def test_nothing_to_learn_from_is_zero_and_finite(batch):
    labels, logits, weights = batch
    assert value(TokenCrossentropy(), np.full_like(labels, -100), logits, weights) == 0
    assert value(TokenCrossentropy(), labels, logits, 0 * weights) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_accuracy_compares_whole_ids(batch, dtype):
    labels, _, weights = batch
    # Every prediction is one off: next to the label in id, equal to it in bfloat16 above 256.
    logits = ops.cast(ops.one_hot(labels + 1, VOCABULARY_SIZE + 1), dtype)
    assert result(TokenAccuracy(), (labels, logits, weights)) == 0
    right = ops.cast(ops.one_hot(labels, VOCABULARY_SIZE + 1), dtype)
    assert result(TokenAccuracy(), (labels, right, weights)) == 1


def test_accuracy_is_weighted(batch):
    labels, _, weights = batch
    is_right = np.array([[1, 0, 1, 0, 1], [0, 1, 1, 1, 1], [1, 1, 0, 0, 1]], bool)
    logits = ops.one_hot(np.where(is_right, labels, (labels + 1) % VOCABULARY_SIZE), VOCABULARY_SIZE)
    expected = (is_right * weights).sum() / weights.sum()
    assert result(TokenAccuracy(), (labels, logits, weights)) == pytest.approx(expected, rel=1e-6)


def test_perplexity_averages_over_tokens_before_the_exponential(batch):
    labels, logits, weights = batch
    first, rest = (labels[:1], logits[:1], weights[:1]), (labels[1:], logits[1:], weights[1:])
    expected = np.exp((token_losses(labels, logits) * weights).sum() / weights.sum())
    assert result(Perplexity(), first, rest) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("make", [TokenCrossentropy, TokenAccuracy, Perplexity])
def test_configs(make):
    original = make(ignored_id=-7, name="other")
    assert make.from_config(original.get_config()).get_config() == {"name": "other", "ignored_id": -7}
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(original))
    assert type(restored) is make and restored.get_config() == original.get_config()
