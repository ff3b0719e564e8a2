"""`fit`, `evaluate` and `predict` on text and on token ids."""

import keras
import numpy as np
import pytest
from keras import ops

import kllama

TEXTS = [
    "Once upon a time there was a fox.",
    "The fox had a friend.",
    "They played in the sun all day long, and then it was night.",
    "The end.",
]


@pytest.fixture
def story_model(assets):
    """The 260K model, to be trained on."""
    model = kllama.LlamaCausalLM.from_preset(assets / "models" / "stories260K")
    model.preprocessor.sequence_length = 32
    return model


def expected_loss(model, x, labels, weights) -> float:
    logits = ops.convert_to_numpy(model(x)).astype("float64")
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (losses * weights).sum() / weights.sum()


def test_fit_on_strings_learns_them(story_model):
    story_model.compile(optimizer=keras.optimizers.Adam(3e-3))
    before = story_model.evaluate(TEXTS, batch_size=2, return_dict=True, verbose=0)
    history = story_model.fit(TEXTS, batch_size=2, epochs=8, verbose=0).history
    after = story_model.evaluate(TEXTS, batch_size=2, return_dict=True, verbose=0)
    assert after["loss"] < 0.7 * before["loss"] and after["token_accuracy"] > before["token_accuracy"]
    assert len(history["loss"]) == 8 and set(history) == {"loss", "token_accuracy", "perplexity"}


def test_strings_and_their_ids_are_the_same(story_model):
    x, y, weights = story_model.preprocessor(TEXTS)
    on_text = story_model.evaluate(TEXTS, batch_size=4, return_dict=True, verbose=0)
    on_ids = story_model.evaluate(
        {name: ops.convert_to_numpy(array) for name, array in x.items()},
        ops.convert_to_numpy(y),
        sample_weight=ops.convert_to_numpy(weights),
        batch_size=4,
        return_dict=True,
        verbose=0,
    )
    assert on_text == pytest.approx(on_ids, rel=1e-4)
    assert on_text["perplexity"] == pytest.approx(np.exp(on_text["loss"]), rel=1e-4)


@pytest.mark.parametrize("sequence_length", [24, 64, 200])
def test_the_loss_does_not_depend_on_padding(story_model, sequence_length):
    reference = story_model.evaluate(TEXTS[:1], verbose=0, return_dict=True)["loss"]
    x, y, weights = kllama.LlamaCausalLMPreprocessor(
        story_model.preprocessor.tokenizer, sequence_length=sequence_length
    )(TEXTS[:1])
    padded = story_model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)["loss"]
    assert padded == pytest.approx(reference, rel=1e-4)


def test_ids_alone_predict_their_next(random_model, token_ids):
    model = random_model()
    mask = (np.arange(12) < np.array([[12], [5], [9], [2]])).astype("int32")
    x = {"token_ids": token_ids, "padding_mask": mask}
    labels, weights = np.roll(token_ids, -1, 1), np.roll(mask, -1, 1).astype("float64")
    weights[:, -1] = 0
    loss = model.evaluate(x, batch_size=4, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(expected_loss(model, x, labels, weights), rel=1e-4)
    whole = model.evaluate(token_ids, batch_size=4, verbose=0, return_dict=True)["loss"]
    weights = np.ones((4, 12)) * (np.arange(12) < 11)
    assert whole == pytest.approx(expected_loss(model, {**x, "padding_mask": None}, labels, weights), rel=1e-4)


def test_labels_of_minus_100_are_ignored(random_model, token_ids):
    model = random_model()
    labels = np.where(np.arange(12) < 6, token_ids, -100)
    x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    loss = model.evaluate(x, labels, batch_size=4, verbose=0, return_dict=True)["loss"]
    expected = expected_loss(model, x, np.maximum(labels, 0), (labels >= 0).astype("float64"))
    assert loss == pytest.approx(expected, rel=1e-4)
    assert np.isfinite(model.fit(x, np.full_like(labels, -100), verbose=0).history["loss"][0])


@pytest.mark.parametrize("shape", ["rows", "tokens"])
def test_weights_of_ids(random_model, token_ids, shape):
    """They multiply what counts anyway: padding and the row's end have no next token."""
    model = random_model()
    mask = (np.arange(12) < np.array([[12], [5], [9], [2]])).astype("int32")
    given = np.array([1.0, 0.0, 2.0, 0.5]) if shape == "rows" else np.random.default_rng(1).random((4, 12))
    is_real = np.roll(mask, -1, 1).astype("float64")
    is_real[:, -1] = 0
    weights = is_real * (given[:, None] if shape == "rows" else given)
    x = {"token_ids": token_ids, "padding_mask": mask}
    plain = model.evaluate(x, batch_size=4, verbose=0, return_dict=True)["loss"]
    loss = model.evaluate(x, sample_weight=given, batch_size=4, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(expected_loss(model, x, np.roll(token_ids, -1, 1), weights), rel=1e-4)
    assert loss != pytest.approx(plain, rel=1e-3)


def test_weights_of_texts(story_model):
    first = story_model.evaluate(TEXTS[:1], verbose=0, return_dict=True)["loss"]
    weighted = story_model.evaluate(TEXTS[:2], sample_weight=[1.0, 0.0], verbose=0, return_dict=True)["loss"]
    assert weighted == pytest.approx(first, rel=1e-4)
    with pytest.raises(ValueError, match="y must be None with text"):
        story_model.fit(TEXTS, y=TEXTS)


def test_kinds_of_ids(random_model, token_ids):
    model = random_model()
    expected = model.evaluate(token_ids, verbose=0, return_dict=True)["loss"]
    for ids in (token_ids.tolist(), ops.convert_to_tensor(token_ids), {"token_ids": token_ids.tolist()}):
        assert model.evaluate(ids, verbose=0, return_dict=True)["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("labels", [False, True])
def test_a_pipeline_of_ids(random_model, token_ids, labels):
    tensorflow = pytest.importorskip("tensorflow", reason="a tf.data pipeline needs TensorFlow")
    model = random_model()
    mask = (np.arange(12) < np.array([[12], [5], [9], [2]])).astype("int32")
    x = {"token_ids": token_ids, "padding_mask": mask}
    arguments = (x, np.roll(token_ids, -1, 1)) if labels else (x,)
    dataset = tensorflow.data.Dataset.from_tensor_slices(arguments if labels else x).batch(4)
    expected = model.evaluate(*arguments, batch_size=4, verbose=0, return_dict=True)["loss"]
    assert model.evaluate(dataset, verbose=0, return_dict=True)["loss"] == pytest.approx(expected, rel=1e-4)
    history = model.fit(token_ids, validation_data=dataset, verbose=0).history
    assert np.isfinite(history["val_loss"][0])


def test_recorded_loss(assets, stories260k):
    recorded = np.load(assets / "models" / "stories260K" / "expected" / "forward.npz")
    loss = stories260k.evaluate(recorded["loss_ids"].astype("int32"), verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(float(recorded["loss"]), rel=1e-4)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_validation_data(story_model, as_tuple):
    x, y, weights = (
        ops.convert_to_numpy(a) if not isinstance(a, dict) else a for a in story_model.preprocessor(TEXTS[2:])
    )
    validation = (x, y, weights) if as_tuple else TEXTS[2:]
    history = story_model.fit(TEXTS[:2], validation_data=validation, verbose=0).history
    expected = story_model.evaluate(TEXTS[2:], verbose=0, return_dict=True)
    assert history["val_loss"][0] == pytest.approx(expected["loss"], rel=1e-4)


def test_validation_split(story_model):
    history = story_model.fit(TEXTS * 2, validation_split=0.25, batch_size=2, verbose=0).history
    assert np.isfinite(history["val_loss"][0])


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_small_dtypes(assets, dtype):
    folder = assets / "models" / "stories260K"
    whole = kllama.LlamaCausalLM.from_preset(folder).evaluate(TEXTS, verbose=0, return_dict=True)
    model = kllama.LlamaCausalLM.from_preset(folder, dtype=dtype)
    rounded = model.evaluate(TEXTS, verbose=0, return_dict=True)
    assert rounded["loss"] == pytest.approx(whole["loss"], rel=0.02)
    assert rounded["token_accuracy"] == pytest.approx(whole["token_accuracy"], abs=0.06)
    assert np.isfinite(model.fit(TEXTS, verbose=0).history["loss"][0])


def test_dropout_acts_in_training_only(random_model, token_ids):
    model = random_model(dropout=0.4, attention_dropout=0.4)
    assert model.evaluate(token_ids, verbose=0) == model.evaluate(token_ids, verbose=0)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    losses = [model.fit(token_ids, verbose=0).history["loss"][0] for _ in range(2)]
    assert losses[0] != losses[1]


def test_predict_gives_float32_logits(story_model):
    logits = story_model.predict(TEXTS, verbose=0)
    assert logits.dtype == np.float32 and logits.shape[0] == 4 and logits.shape[-1] == 512


def test_a_users_own_loss_and_metrics(story_model):
    story_model.compile(
        optimizer="sgd",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.SparseTopKCategoricalAccuracy(k=3, name="top3")],
    )
    assert set(story_model.fit(TEXTS, verbose=0).history) == {"loss", "top3"}


def test_train_on_batch(story_model):
    first = story_model.train_on_batch(TEXTS, return_dict=True)["loss"]
    assert float(ops.convert_to_numpy(first)) == pytest.approx(
        story_model.evaluate(TEXTS, verbose=0, return_dict=True)["loss"], rel=0.2
    )
