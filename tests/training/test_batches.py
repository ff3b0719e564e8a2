"""Sources of batches: each trains and evaluates as the same rows do when they are given as a whole."""

import keras
import numpy as np
import pytest

import kllama
from kllama.training.batches import prepare_batch, unpack_batch
from tests.letters import chat_letters

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in ("Your input ran out of data", ".*shuffle=True", r".*os\.fork\(\)", ".* rows are longer than")
]

TEXTS = ["abcab", "ca", "bbbbb", "acacb", "cb", "aabbc", "b"]
PAIRS = {"prompts": ["ab", "c", "ba", "", "abc", "b", "c"], "responses": ["cab", "a", "bcaa", "c", "ab", "cc", ""]}
CHATS = {
    "messages": [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, response in zip(PAIRS["prompts"], PAIRS["responses"], strict=True)
    ]
}
IDS = {
    "token_ids": np.random.default_rng(1).integers(0, 5, (7, 6)).astype("int32"),
    "padding_mask": (np.arange(6) < np.array([[6], [4], [6], [2], [5], [6], [3]])).astype("int32"),
}
KINDS = {"texts": TEXTS, "pairs": PAIRS, "chats": CHATS, "ids": IDS}
SIZES = [3, 3, 1]


def build_model():
    keras.utils.set_random_seed(1)
    backbone = kllama.LlamaBackbone(
        vocabulary_size=5,
        num_layers=1,
        num_query_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    model = kllama.LlamaCausalLM(backbone, kllama.LlamaCausalLMPreprocessor(chat_letters(), 6, truncate="left"))
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    return model


@pytest.fixture(scope="module")
def compiled():
    """One model for all tests, since tracing it takes longest."""
    model = build_model()
    return model, model.get_weights()


@pytest.fixture
def model(compiled):
    model, weights = compiled
    model.set_weights(weights)
    return model


def slices(x) -> list:
    """Give the batches of some rows."""
    stops = np.cumsum(SIZES)
    if isinstance(x, dict):
        return [
            {name: column[stop - size : stop] for name, column in x.items()}
            for size, stop in zip(SIZES, stops, strict=True)
        ]
    return [x[stop - size : stop] for size, stop in zip(SIZES, stops, strict=True)]


class Batches(keras.utils.PyDataset):
    """The rows of each epoch in another order, the batches as they are."""

    def __init__(self, batches, **kwargs):
        super().__init__(**kwargs)
        self.batches = batches
        self.epochs = 0

    @property
    def num_batches(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]

    def on_epoch_end(self):
        self.epochs += 1


def rows_of(x) -> list:
    return [dict(zip(x, row, strict=True)) for row in zip(*x.values(), strict=True)] if isinstance(x, dict) else x


def loader_of(x, **kwargs):
    torch_data = pytest.importorskip("torch.utils.data", reason="a DataLoader needs PyTorch")
    # Conversations are of several lengths, which PyTorch's own collation cannot take.
    collate = {"collate_fn": list} if "messages" in x else {}
    return torch_data.DataLoader(rows_of(x), **{"batch_size": 3, **collate, **kwargs})


def tf_dataset_of(x):
    tf = pytest.importorskip("tensorflow", reason="a tf.data pipeline needs TensorFlow")
    if "messages" in x:
        turns = {
            name: tf.constant([[turn[name] for turn in chat] for chat in x["messages"]]) for name in ("role", "content")
        }
        x = {"messages": turns}
    return tf.data.Dataset.from_tensor_slices(x).batch(3)


SOURCES = {
    "PyDataset": lambda x: Batches(slices(x)),
    "PyDataset of tuples": lambda x: Batches([(batch,) for batch in slices(x)]),
    "PyDataset with workers": lambda x: Batches(slices(x), workers=2, max_queue_size=2),
    "DataLoader": loader_of,
    "generator": lambda x: (batch for batch in slices(x)),
    "tf.data": tf_dataset_of,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES)
def test_evaluate(model, source, kind):
    expected = model.evaluate(KINDS[kind], batch_size=3, verbose=0, return_dict=True)
    results = model.evaluate(SOURCES[source](KINDS[kind]), verbose=0, return_dict=True)
    # Keras averages the losses of batches by their rows, not by their labels; the metrics do not care.
    assert results["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert results["sparse_categorical_accuracy"] == pytest.approx(expected["sparse_categorical_accuracy"], rel=1e-4)
    assert results["loss"] == pytest.approx(expected["loss"], rel=1e-4)


# With workers the order of the batches is Keras' own.
@pytest.mark.parametrize("source", [source for source in SOURCES if "workers" not in source])
def test_fit_trains_the_same(model, source):
    initial, trained = model.get_weights(), []
    for x, options in ((PAIRS, {"batch_size": 3}), (SOURCES[source](PAIRS), {})):
        model.set_weights(initial)
        model.fit(x, verbose=0, shuffle=False, validation_data=SOURCES[source](TEXTS), **options)
        trained.append(model.get_weights())
    assert not np.allclose(trained[0][0], initial[0], rtol=1e-3)
    for ours, expected in zip(*trained, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_predict(model):
    expected = model.predict(TEXTS, verbose=0)
    for source in ("PyDataset", "DataLoader"):
        np.testing.assert_allclose(model.predict(SOURCES[source](TEXTS), verbose=0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["PyDataset", "PyDataset with workers", "generator", "DataLoader"])
def test_weights_of_rows(model, source):
    weights = np.array([1, 0, 2, 0.5, 0, 1, 3], "float32")
    batches = [(batch, None, part) for batch, part in zip(slices(TEXTS), slices(weights), strict=True)]
    if source == "DataLoader":
        data = loader_of([0, 1, 2], batch_size=1, collate_fn=lambda rows: batches[rows[0]])
    elif source == "generator":
        data = (batch for batch in batches)
    else:
        data = Batches(batches, workers=1 + ("workers" in source))
    expected = model.evaluate(TEXTS, batch_size=3, sample_weight=weights, verbose=0, return_dict=True)
    assert model.evaluate(data, verbose=0, return_dict=True) == pytest.approx(expected, rel=1e-4)
    plain = model.evaluate(TEXTS, batch_size=3, verbose=0, return_dict=True)
    assert expected["perplexity"] != pytest.approx(plain["perplexity"], rel=1e-3)


def test_weights_of_rows_in_a_pipeline(model):
    dataset = tf_dataset_of((TEXTS, [1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 3.0])).map(lambda x, weights: (x, None, weights))
    weights = np.array([1, 0, 2, 0.5, 0, 1, 3])
    expected = model.evaluate(TEXTS, batch_size=3, sample_weight=weights, verbose=0, return_dict=True)
    assert model.evaluate(dataset, verbose=0, return_dict=True) == pytest.approx(expected, rel=1e-4)


def test_a_loader_is_shuffled_in_each_epoch(model):
    seen = []

    class Rows(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    torch_data = pytest.importorskip("torch.utils.data", reason="a DataLoader needs PyTorch")
    loader = torch_data.DataLoader(Rows(TEXTS * 3), batch_size=4, shuffle=True)
    model.fit(loader, epochs=2, verbose=0)
    first, second = seen[-42:-21], seen[-21:]
    assert sorted(first) == sorted(second) == list(range(21)) and first != second


def test_the_worker_processes_of_a_loader(model):
    loader = loader_of(TEXTS, num_workers=1)
    assert len(model.fit(loader, epochs=2, verbose=0).history["loss"]) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_epochs_of_a_dataset(model, workers):
    class Changing(Batches):
        """Other rows in each epoch."""

        def __getitem__(self, index):
            read.append(self.epochs)
            return super().__getitem__(index)

    read = []
    dataset = Changing(slices(TEXTS), workers=workers, max_queue_size=2)
    history = model.fit(dataset, epochs=2, validation_data=Batches(slices(TEXTS)), verbose=0).history
    assert len(history["val_loss"]) == 2
    assert read[-3:] == [read[-1]] * 3 and read[-1] > read[-4]


def test_a_dataset_without_end(model):
    class Endless(Batches):
        num_batches = None

        def __getitem__(self, index):
            return self.batches[index % 3]

    history = model.fit(Endless(slices(TEXTS)), steps_per_epoch=4, epochs=2, verbose=0).history
    assert len(history["loss"]) == 2


def test_a_stream(model):
    torch_data = pytest.importorskip("torch.utils.data", reason="a DataLoader needs PyTorch")

    class Stream(torch_data.IterableDataset):
        def __iter__(self):
            return iter(TEXTS)

    with pytest.warns(UserWarning, match="ran out of data"):  # Keras cannot know how long it is
        history = model.fit(torch_data.DataLoader(Stream(), batch_size=3), epochs=2, verbose=0).history
    assert len(history["loss"]) == 2


def test_a_generator_has_one_pass(model):
    read = []

    def generate():
        for batch in slices(TEXTS) * 2:
            read.append(batch)
            yield batch

    model.fit(generate(), steps_per_epoch=3, epochs=2, verbose=0)
    assert read == slices(TEXTS) * 2
    # TensorFlow hides the class, not the message.
    with pytest.raises(Exception, match="a generator has ended"), pytest.warns(UserWarning, match="ran out of"):
        model.fit(generate(), epochs=2, verbose=0)


@pytest.mark.parametrize(
    "make", [lambda: Batches([]), lambda: loader_of([], batch_size=3), lambda: (batch for batch in [])]
)
def test_no_batches(model, make):
    # F1
    for call in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match="no training rows"):
            call(make(), verbose=0)


@pytest.mark.parametrize(
    "batch, error, message",
    [
        (["a", None], TypeError, r"texts\[1\] = None"),
        ((["a", 5],), TypeError, r"texts\[1\] = 5"),
        ([], ValueError, "no training rows"),
        ((["a"], [1]), ValueError, "y must be None with text"),
        ({"prompts": ["a"], "responses": [b"b"]}, TypeError, r"responses\[0\] = b'b'"),
    ],
)
def test_rows_that_are_refused(model, batch, error, message):
    # F2
    with pytest.raises(error, match=message):
        prepare_batch(batch, model.preprocessor)


def test_a_row_that_is_refused_in_the_middle(model):
    batches = [["abcab"] * 3, ["ab", "a", None]]
    with pytest.raises(Exception, match=r"texts\[2\] = None"):  # TensorFlow hides the class, not the message
        model.fit(Batches(batches), shuffle=False, verbose=0)
    assert np.isfinite(model.evaluate(TEXTS, batch_size=3, verbose=0)[0])


@pytest.mark.parametrize("num_good", [0, 2])
@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_a_model_survives_a_bad_batch(model, method, num_good):
    """On JAX Keras takes the variables away while it runs, and would leave them away."""
    before = model.get_weights()
    batches = [["abcab", "ab", "ba"]] * num_good + [["ab", None, "a"]] * 3
    with pytest.raises(Exception, match=r"texts\[1\] = None"):
        getattr(model, method)(Batches(batches), verbose=0)
    if method != "fit":
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
    assert np.isfinite(model.evaluate(TEXTS, batch_size=3, verbose=0)[0])
    assert np.isfinite(model.fit(TEXTS, batch_size=3, verbose=0).history["loss"][0])


def test_the_first_batch_of_all_is_bad():
    model = build_model()
    with pytest.raises(Exception, match=r"texts\[1\] = None"):
        model.fit(Batches([["ab", "a"], ["a", None], ["a", None]]), shuffle=False, verbose=0)
    assert np.isfinite(model.fit(TEXTS, batch_size=3, verbose=0).history["loss"][0])


def test_what_a_batch_loses_is_said(model):
    with pytest.warns(UserWarning, match="rows longer than .* were cut"):
        prepare_batch(["abcabcabc"], model.preprocessor)
    with pytest.warns(UserWarning, match="no label that the loss counts"):
        prepare_batch({"messages": [[{"role": "user", "content": "ab"}]]}, model.preprocessor)


def test_a_pipeline_of_single_samples(model):
    tf = pytest.importorskip("tensorflow", reason="a tf.data pipeline needs TensorFlow")
    with pytest.raises(ValueError, match=r"Call batch\(\)"):
        model.fit(tf.data.Dataset.from_tensor_slices(TEXTS))


def test_ids_without_a_row(model):
    with pytest.raises(Exception, match="token id 5; expected ids from 0 to 4"):
        model.evaluate(Batches([np.array([[1, 5, 0]])]), verbose=0)


def test_arguments_that_batches_bring_themselves(model):
    for name, value in (("y", TEXTS), ("sample_weight", [1.0]), ("batch_size", 2)):
        with pytest.raises(ValueError, match=f"{name} must be None with a Batches"):
            model.fit(Batches(slices(TEXTS)), **{name: value})


def test_text_without_a_preprocessor(model):
    model = kllama.LlamaCausalLM(model.backbone)
    for x in (TEXTS, PAIRS):
        with pytest.raises(ValueError, match="the model has no preprocessor"):
            model.fit(x)
    with pytest.raises(ValueError, match="the model has no preprocessor"):
        prepare_batch(TEXTS, None)


def test_batches_have_one_shape(model):
    for batch in (["a"], ["abcabcabc"] * 2, PAIRS, CHATS):
        x, y, weights = prepare_batch(batch, model.preprocessor)
        assert {array.shape[1] for array in (*x.values(), y, weights)} == {6}
        assert [a.dtype for a in (x["token_ids"], x["padding_mask"], y, weights)] == ["int32"] * 3 + ["float32"]


A = np.zeros((2, 3), "int32")


@pytest.mark.parametrize(
    "batch, parts",
    [
        (["a", "b"], None),
        (("a", "b"), None),
        ([["a", "b"]], (["a", "b"], None, None)),
        ((("a", "b"), None, [1, 2]), (("a", "b"), None, [1, 2])),
        (np.array(["a"]), None),
        ((np.array(["a"]), None), (np.array(["a"]), None, None)),
        (A, None),
        ([[1, 2], [3, 4]], None),
        ([A[0], A[1]], None),
        ([A, A], (A, A, None)),
        ([[[1, 2], [3, 4]]], ([[1, 2], [3, 4]], None, None)),
        (PAIRS, None),
        (CHATS["messages"][:2], None),
        ((PAIRS,), (PAIRS, None, None)),
        ([{"prompt": "a", "response": "b"}], None),
        (({"token_ids": A}, A), ({"token_ids": A}, A, None)),
        ([{"token_ids": A}, A], ({"token_ids": A}, A, None)),
        ([], None),
    ],
)
def test_unpack_batch(batch, parts):
    unpacked = unpack_batch(batch)
    expected = (batch, None, None) if parts is None else parts
    assert repr(unpacked) == repr(expected)
