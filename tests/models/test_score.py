"""`score`: logits and losses of given sequences, and a function that looks at what flows between the layers."""

import keras
import numpy as np
import pytest
from keras import ops


@pytest.fixture
def padding_mask():
    mask = np.ones((4, 12), "int32")
    mask[1, 7:] = 0
    mask[2, :3] = 0
    return mask


def test_logits_are_those_of_a_call(random_model, token_ids, padding_mask):
    model = random_model(attention_bias=True, tie_word_embeddings=True)
    for mask in (None, padding_mask):
        expected = ops.convert_to_numpy(model({"token_ids": token_ids, "padding_mask": mask}))
        scores = ops.convert_to_numpy(model.score(token_ids, mask))
        real = np.ones_like(token_ids) > 0 if mask is None else mask > 0
        np.testing.assert_allclose(scores[real], expected[real], atol=1e-5)


def test_losses(random_model, token_ids):
    model, targets = random_model(), np.roll(token_ids, -1, axis=1)
    logits = ops.convert_to_numpy(model({"token_ids": token_ids, "padding_mask": None})).astype("float64")
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, targets[..., None], axis=-1))[..., 0]
    losses = model.score(token_ids, scoring_mode="loss", target_ids=targets)
    np.testing.assert_allclose(ops.convert_to_numpy(losses), expected, atol=1e-5)


def test_the_function_sees_the_embeddings_and_every_layer(random_model, token_ids, padding_mask):
    model, seen = random_model(), {}

    def keep(hidden_states, index):
        seen[index] = ops.convert_to_numpy(hidden_states)
        return hidden_states

    model.score(token_ids, padding_mask, layer_intercept_fn=keep)
    assert list(seen) == [-1, 0, 1] and all(states.shape == (4, 12, 16) for states in seen.values())
    np.testing.assert_array_equal(seen[-1], ops.convert_to_numpy(model.backbone.token_embedding(token_ids)))
    last = model.backbone({"token_ids": token_ids, "padding_mask": padding_mask})
    normed = ops.convert_to_numpy(model.backbone.layer_norm(seen[1]))
    np.testing.assert_allclose(normed[padding_mask > 0], ops.convert_to_numpy(last)[padding_mask > 0], atol=1e-5)


@pytest.mark.parametrize("index", [-1, 0, 1])
def test_what_the_function_gives_flows_on(random_model, token_ids, index):
    model = random_model()
    zeroed = model.score(token_ids, layer_intercept_fn=lambda x, i: ops.zeros_like(x) if i == index else x)
    zeroed, plain = ops.convert_to_numpy(zeroed), ops.convert_to_numpy(model.score(token_ids))
    assert np.abs(zeroed - plain).max() > 1e-2
    if index == 1:  # nothing comes after it but a normalization without a bias, and the head
        np.testing.assert_array_equal(zeroed, np.zeros_like(zeroed))


def test_gradients_reach_the_embeddings(random_model, token_ids):
    keras.utils.set_random_seed(0)
    model, targets = random_model(), np.roll(token_ids, -1, axis=1)

    def loss_of(change):
        def add(x, index):
            return x + change if index == -1 else x

        return ops.mean(model.score(token_ids, scoring_mode="loss", target_ids=targets, layer_intercept_fn=add))

    change = np.zeros((4, 12, 16), "float32")
    gradient = differentiate(loss_of, change)
    largest = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
    step = np.zeros_like(change)
    step[largest] = 1e-3
    after, before = (ops.convert_to_numpy(loss_of(ops.convert_to_tensor(x))) for x in (step, -step))
    slope = (after - before) / 2e-3
    assert gradient.shape == change.shape and gradient[largest] == pytest.approx(slope, rel=2e-2, abs=1e-5)


def differentiate(function, x):
    """The gradient of a function of one array, on the backend of the suite."""
    if keras.config.backend() == "jax":
        import jax

        return np.array(jax.grad(function)(x))
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = function(x)
        return tape.gradient(loss, x).numpy()
    import torch

    x = torch.tensor(x, requires_grad=True)
    function(x).backward()
    return x.grad.numpy()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scoring_mode": "probabilities"}, "scoring_mode ('probabilities') must be 'logits' or 'loss'"),
        ({"scoring_mode": "loss"}, "target_ids (None) must be given"),
    ],
)
def test_wrong_arguments(random_model, token_ids, arguments, words):
    with pytest.raises(ValueError) as caught:
        random_model().score(token_ids, **arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "targets", "error", "words"),
    [
        ([[5, 300]], None, ValueError, "token_ids holds 300; expected ids from 0 to 299"),
        ([[5, -1]], None, ValueError, "token_ids holds -1"),
        ([[5.0, 6.0]], None, TypeError, "token_ids has dtype float"),
        ([[5, 6]], [[6, 300]], ValueError, "target_ids holds 300"),
        ([[5, 6]], [[6, -1]], ValueError, "target_ids holds -1"),
        ([[5, 6]], [[6]], ValueError, "target_ids has shape (1, 1); expected that of token_ids, (1, 2)"),
    ],
)
def test_wrong_ids(random_model, ids, targets, error, words):
    mode = "logits" if targets is None else "loss"
    with pytest.raises(error) as caught:
        random_model().score(
            np.array(ids), scoring_mode=mode, target_ids=None if targets is None else np.array(targets)
        )
    assert words in str(caught.value)


def test_an_ignored_target_has_no_loss(random_model, token_ids):
    targets = np.roll(token_ids, -1, axis=1)
    targets[:, ::2] = -100
    losses = ops.convert_to_numpy(random_model().score(token_ids, scoring_mode="loss", target_ids=targets))
    assert (losses[:, ::2] == 0).all() and (losses[:, 1::2] > 0).all()


def test_a_function_that_gives_nothing(random_model, token_ids):
    with pytest.raises(TypeError, match="gave None for index 0"):
        random_model().score(token_ids, layer_intercept_fn=lambda x, i: None if i == 0 else x)


def test_in_the_middle_of_fit(random_model, token_ids):
    model, scores = random_model(), []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            scores.append(ops.convert_to_numpy(model.score(token_ids[:1])))

    model.fit(token_ids, batch_size=2, verbose=0, callbacks=[Look()])
    assert len(scores) == 2 and np.isfinite(scores).all() and np.abs(scores[0] - scores[1]).max() > 0


def test_logits_are_float32_in_every_dtype(random_model, token_ids, padding_mask):
    model = random_model(dtype="bfloat16")
    expected = ops.convert_to_numpy(model({"token_ids": token_ids, "padding_mask": padding_mask}))
    scores = ops.convert_to_numpy(model.score(token_ids, padding_mask))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores[padding_mask > 0], expected[padding_mask > 0], atol=1e-2)
