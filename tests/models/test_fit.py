"""`fit`, `evaluate` and `predict` on text and on token ids."""

import copy
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import kllama
from tests.letters import chat_letters, letters

TEXTS = [
    "Once upon a time there was a fox.",
    "The fox had a friend.",
    "They played in the sun all day long, and then it was night.",
    "The end.",
]
CHAT_OF_A_USER = [{"role": "user", "content": "ab"}]


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
    assert (
        after["loss"] < 0.7 * before["loss"]
        and after["sparse_categorical_accuracy"] > before["sparse_categorical_accuracy"]
    )
    assert len(history["loss"]) == 8 and set(history) == {"loss", "sparse_categorical_accuracy", "perplexity"}


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
    given = np.array([1.0, 0.0, 2.0, 0.5]) if shape == "rows" else np.random.default_rng(1).random((4, 12)) ** 8
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


PAIRS = {
    "prompts": ["Once upon a time", "The fox", "They played", ""],
    "responses": [" there was a fox.", " had a friend.", " in the sun all day long.", "The end."],
}


def test_prompts_with_responses_learn_the_responses(story_model):
    """The loss is that of the responses' tokens and end tokens, each seen after its prompt."""
    tokenizer = story_model.preprocessor.tokenizer
    prompts, responses = (tokenizer.tokenize(PAIRS[name]) for name in ("prompts", "responses"))
    rows = [[1, *prompt, *response, 2] for prompt, response in zip(prompts, responses, strict=True)]
    token_ids = np.array([row + [0] * (32 - len(row)) for row in rows], "int32")
    first = np.array([[len(prompt)] for prompt in prompts])  # the position that predicts the response's first token
    last = np.array([[len(row) - 2] for row in rows])
    weights = ((np.arange(32) >= first) & (np.arange(32) <= last)).astype("float64")
    x = {"token_ids": token_ids, "padding_mask": (token_ids > 0).astype("int32")}
    expected = expected_loss(story_model, x, np.roll(token_ids, -1, 1), weights)
    rows = [{"prompt": prompt, "response": response} for prompt, response in zip(*PAIRS.values(), strict=True)]
    for data in (PAIRS, rows):
        loss = story_model.evaluate(data, batch_size=4, verbose=0, return_dict=True)["loss"]
        assert loss == pytest.approx(expected, rel=1e-4)
    story_model.compile(optimizer=keras.optimizers.Adam(3e-3))
    history = story_model.fit(rows, epochs=4, validation_data=PAIRS, verbose=0).history
    assert history["loss"][-1] < 0.9 * history["loss"][0] and len(history["val_loss"]) == 4


def test_masked_tokens_have_no_gradient(random_model):
    """KH-T12: other prompts of the same length change the loss, but nothing is learnt of how to continue them."""
    model = random_model(num_layers=1, vocabulary_size=5)
    model.preprocessor = kllama.LlamaCausalLMPreprocessor(letters(), 8)
    x, labels, weights = (model.preprocessor({"prompts": ["abcab"], "responses": ["c"]})[i] for i in range(3))
    other = ops.convert_to_numpy(labels).copy()
    other[0, :5] = 3  # labels of the prompt
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    initial, trained = model.get_weights(), []
    for y in (ops.convert_to_numpy(labels), other):
        model.set_weights(initial)
        model.fit(keras.tree.map_structure(ops.convert_to_numpy, x), y, sample_weight=weights, verbose=0)
        trained.append(model.get_weights())
    assert all((ours == others).all() for ours, others in zip(*trained, strict=True))
    assert not all((ours == before).all() for ours, before in zip(trained[0], initial, strict=True))


@pytest.fixture(scope="module")
def compiled_model():
    """A model of the five letters, with its weights; one for many tests, since tracing takes longest."""
    arguments = {"vocabulary_size": 5, "num_layers": 1, "num_query_heads": 2, "hidden_dim": 8, "intermediate_dim": 8}
    backbone = kllama.LlamaBackbone(**arguments, num_key_value_heads=1, initializer_range=0.3)
    model = kllama.LlamaCausalLM(backbone)
    return model, model.get_weights()


@pytest.fixture
def small_model(compiled_model):
    """That model as it was, with rows of at most seven."""
    model, weights = compiled_model
    model.set_weights(weights)
    model.preprocessor = kllama.LlamaCausalLMPreprocessor(chat_letters(), 6)
    return model


def test_conversations(small_model):
    chats = [
        [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}],
        [{"role": "user", "content": "b"}, {"role": "assistant", "content": "ba"}],
    ]
    token_ids = np.array([[3, 0, 1, 2, 2, 4, 0], [3, 1, 2, 1, 0, 4, 0]])
    counts = np.array([[0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0]], "float64")
    x = {"token_ids": token_ids, "padding_mask": np.tile(np.arange(7) < 6, (2, 1))}
    expected = expected_loss(small_model, x, np.roll(token_ids, -1, 1), counts)
    for data in ({"messages": chats}, [{"messages": chat} for chat in chats]):
        loss = small_model.evaluate(data, verbose=0, return_dict=True)["loss"]
        assert loss == pytest.approx(expected, rel=1e-4)
    assert np.isfinite(small_model.fit({"messages": chats[0]}, verbose=0).history["loss"][0])


@pytest.mark.parametrize(
    "x",
    [
        [],
        (),
        np.array([], "U1"),
        {"prompts": [], "responses": []},
        {"messages": []},
        {"token_ids": np.zeros((0, 5), "int32")},
    ],
)
def test_no_rows(small_model, x):
    # F1
    for call in (small_model.fit, small_model.evaluate, small_model.predict):
        with pytest.raises(ValueError, match="no training rows"):
            call(x)
    with pytest.raises(ValueError, match="no training rows"):
        small_model.fit(["a"], validation_data=x)


@pytest.mark.parametrize(
    "x, message",
    [
        (["a", None], r"texts\[1\] = None"),
        ([1, "a"], r"texts\[0\] = 1"),
        (["a", 1.5], r"texts\[1\] = 1.5"),
        (["a", b"a"], r"texts\[1\] = b'a'"),
        (np.array(["a", None], object), r"texts\[1\] = None"),
        (None, "x = None"),
        ({"story": ["a"]}, r"the keys \['story'\]"),
        ({"prompts": ["a", None], "responses": ["a", "b"]}, r"prompts\[1\] = None"),
    ],
)
def test_rows_that_are_no_text(small_model, x, message):
    # F2
    for call in (small_model.fit, small_model.evaluate, small_model.predict):
        with pytest.raises(TypeError, match=message):
            call(x)


@pytest.mark.parametrize("truncate, side", [(None, "right"), ("left", "left")])
def test_rows_that_are_cut_are_reported_once(small_model, truncate, side):
    # F3
    small_model.preprocessor = kllama.LlamaCausalLMPreprocessor(letters(), 3, truncate=truncate)
    message = rf"2 of 4 rows are longer than sequence_length \(3\) and were cut on the {side}; sequence_length="
    with pytest.warns(UserWarning, match=message) as reports:
        small_model.fit(["ab", "abc", "", "abcabc"], epochs=2, verbose=0)
    assert [report.filename for report in reports if "rows are longer" in str(report.message)] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_model.fit(["ab", "a"], verbose=0)


def test_batches_without_labels_that_count(random_model):
    # F5: the first batch has none, and neither moves the weights nor spoils the loss.
    model = random_model(num_layers=1, vocabulary_size=5)
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    x = {"token_ids": np.array([[3, 1, 2, 4]] * 4), "padding_mask": np.ones((4, 4), "int32")}
    weights = np.array([0.0, 0.0, 1.0, 1.0])
    expected = model.evaluate(x, verbose=0, return_dict=True)["perplexity"]
    results = model.evaluate(x, sample_weight=weights, batch_size=2, verbose=0, return_dict=True)
    assert results["perplexity"] == pytest.approx(expected, rel=1e-4) and np.isfinite(results["loss"])
    before = model.get_weights()
    history = model.fit(x, sample_weight=0 * weights, batch_size=2, verbose=0).history
    assert history["loss"] == [0]
    assert all((now == then).all() for now, then in zip(model.get_weights(), before, strict=True))


@pytest.mark.parametrize("x", [{"prompts": ["abcabcabc"] * 2, "responses": ["a", "b"]}, {"messages": CHAT_OF_A_USER}])
def test_no_label_that_counts_at_all(small_model, x):
    # F5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in (small_model.fit, small_model.evaluate):
            with pytest.raises(ValueError, match="no label that the loss counts.*loss_on='all'"):
                call(x, verbose=0)
        small_model.predict(x, verbose=0)
        small_model.preprocessor = kllama.LlamaCausalLMPreprocessor(chat_letters(), 6, loss_on="all")
        assert np.isfinite(small_model.fit(x, verbose=0).history["loss"][0])


def test_inputs_are_left_alone(small_model):
    # KH-T9
    chats = {"messages": [CHAT_OF_A_USER + [{"role": "assistant", "content": "b"}]], "tools": [{"type": "function"}]}
    for x in ({"prompts": ["a"], "responses": ["b"]}, chats, [{"prompt": "a", "response": "b"}]):
        before = copy.deepcopy(x)
        small_model.evaluate(x, verbose=0)
        assert x == before


@pytest.mark.parametrize("form", ["texts", "tuple", "rows", "generator"])
def test_forms_of_validation_data(small_model, form):
    rows = ["abc", "cb", "a"]
    data = {
        "texts": rows,
        "tuple": (rows, None, np.ones(3)),
        "rows": [{"prompt": "", "response": row} for row in rows],
        "generator": (rows for _ in range(1)),
    }[form]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = small_model.fit(["abcabc", "ba"], validation_data=data, verbose=0).history
    expected = small_model.evaluate(rows, verbose=0, return_dict=True)
    assert history["val_loss"][0] == pytest.approx(expected["loss"], rel=1e-4)


def test_padding_on_the_left_predicts_nothing(random_model, token_ids):
    model = random_model()
    losses = []
    for left, right in ((0, 0), (0, 3), (3, 0)):
        padding = (0, 0), (left, right)
        x = {"token_ids": np.pad(token_ids, padding), "padding_mask": np.pad(np.ones_like(token_ids), padding)}
        losses.append(model.evaluate(x, verbose=0, return_dict=True)["loss"])
        tensorflow = pytest.importorskip("tensorflow", reason="a tf.data pipeline needs TensorFlow")
        dataset = tensorflow.data.Dataset.from_tensor_slices(x).batch(4)
        losses.append(model.evaluate(dataset, verbose=0, return_dict=True)["loss"])
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-4)


@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0], "balanced", np.ones((4, 3))])
def test_weights_of_another_shape(random_model, token_ids, weights):
    with pytest.raises(ValueError, match="sample_weight has shape"):
        random_model().fit(token_ids, sample_weight=weights)


def test_rows_of_several_lengths(random_model):
    with pytest.raises(ValueError, match="different lengths"):
        random_model().fit([[1, 2, 3], [4, 5]])


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
    assert rounded["sparse_categorical_accuracy"] == pytest.approx(whole["sparse_categorical_accuracy"], abs=0.06)
    assert np.isfinite(model.fit(TEXTS, verbose=0).history["loss"][0])


def test_dropout_acts_in_training_only(random_model, token_ids):
    model = random_model(dropout=0.4, attention_dropout=0.4)
    assert model.evaluate(token_ids, verbose=0) == model.evaluate(token_ids, verbose=0)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    losses = [model.fit(token_ids, verbose=0).history["loss"][0] for _ in range(2)]
    assert losses[0] != losses[1]


def test_predict_needs_no_compilation(random_model, token_ids):
    model = random_model()
    uncompiled = kllama.LlamaCausalLM(model.backbone, compile=False)
    np.testing.assert_allclose(uncompiled.predict(token_ids, verbose=0), model.predict(token_ids, verbose=0), atol=1e-5)


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


def test_predict_pads_text_to_the_sequence_length(story_model):
    tf = pytest.importorskip("tensorflow")
    logits = story_model.predict(TEXTS, verbose=0)
    assert logits.shape[1] == story_model.preprocessor.sequence_length
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).batch(len(TEXTS))
    np.testing.assert_allclose(story_model.predict(dataset, verbose=0), logits, atol=1e-5)
