"""Sampling, one function at a time, against recorded vectors of transformers and by its own words."""

import json

import keras_hub
import numpy as np
import pytest
from keras import ops

from kllama.generation.sampling import (
    GREEDY,
    REMOVED,
    Sampling,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sampling_of,
)

PROBABILITIES = np.array([[0.1, 0.2, 0.3, 0.4]])


def logits_of(probabilities) -> np.ndarray:
    return np.log(np.asarray(probabilities, "float32"))


def kept_probabilities(logits) -> np.ndarray:
    logits = ops.convert_to_numpy(logits).astype("float64")
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, [0, 0, 0, 1]), (3, [0, 2 / 9, 3 / 9, 4 / 9]), (4, [0.1, 0.2, 0.3, 0.4])],
)
def test_top_k(k, expected):
    kept = keep_top_k(ops.convert_to_tensor(logits_of(PROBABILITIES)), k)
    np.testing.assert_allclose(kept_probabilities(kept)[0], expected, atol=1e-6)


def test_top_k_keeps_what_equals_the_last():
    kept = keep_top_k(ops.convert_to_tensor(logits_of([[0.2, 0.3, 0.3, 0.2]])), 3)
    np.testing.assert_allclose(kept_probabilities(kept)[0], [0.2, 0.3, 0.3, 0.2], atol=1e-6)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.01, [0, 0, 0, 1]),
        (0.69, [0, 0, 3 / 7, 4 / 7]),
        (0.8, [0, 2 / 9, 3 / 9, 4 / 9]),
        (0.95, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_top_p(p, expected):
    shuffled = [2, 0, 3, 1]
    kept = keep_top_p(ops.convert_to_tensor(logits_of(PROBABILITIES[:, shuffled])), p)
    np.testing.assert_allclose(kept_probabilities(kept)[0], np.array(expected)[shuffled], atol=1e-6)


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.24, [0.1, 0.2, 0.3, 0.4]), (0.26, [0, 2 / 9, 3 / 9, 4 / 9]), (0.51, [0, 0, 3 / 7, 4 / 7]), (1, [0, 0, 0, 1])],
)
def test_min_p(p, expected):
    kept = keep_min_p(ops.convert_to_tensor(logits_of(PROBABILITIES)), p)
    np.testing.assert_allclose(kept_probabilities(kept)[0], expected, atol=1e-6)


def test_recorded_transformers_processors(assets):
    functions = {
        "temperature": lambda scores, temperature: scores / temperature,
        "top_k": lambda scores, top_k, **_: keep_top_k(scores, top_k),
        "top_p": lambda scores, top_p, **_: keep_top_p(scores, top_p),
        "min_p": lambda scores, min_p, **_: keep_min_p(scores, min_p),
    }
    cases = json.loads((assets / "goldens" / "sampling.json").read_text())["transformers"]
    checked = 0
    for case in cases:
        parameters = case["parameters"]
        if case["processor"] not in functions or parameters.get("min_tokens_to_keep", 1) != 1:
            continue
        scores = ops.convert_to_tensor(np.array(case["scores"], "float32"))
        processed = ops.convert_to_numpy(functions[case["processor"]](scores, **parameters))
        expected = np.array([[-np.inf if x is None else x for x in row] for row in case["expected"]], "float64")
        np.testing.assert_array_equal(processed == np.float32(REMOVED), np.isneginf(expected), err_msg=str(parameters))
        finite = np.isfinite(expected)
        np.testing.assert_allclose(processed[finite], expected[finite], rtol=1e-5)
        checked += 1
    assert checked >= 5


def test_draws_follow_the_distribution():
    logits = ops.convert_to_tensor(np.repeat(logits_of(PROBABILITIES), 4000, axis=0))
    tokens = ops.convert_to_numpy(draw(logits, ops.convert_to_tensor(3, "int32"), ops.convert_to_tensor(5, "int32")))
    frequencies = np.bincount(tokens, minlength=4) / len(tokens)
    # Four standard deviations of a frequency near 0.4 in 4,000 draws are 0.03.
    np.testing.assert_allclose(frequencies, PROBABILITIES[0], atol=0.03)


def test_draws_repeat_with_the_seed_and_the_step_alone():
    logits = ops.convert_to_tensor(np.zeros((64, 50), "float32"))

    def tokens(seed, step):
        return ops.convert_to_numpy(
            draw(logits, ops.convert_to_tensor(seed, "int32"), ops.convert_to_tensor(step, "int32"))
        ).tolist()

    assert tokens(1, 2) == tokens(1, 2)
    assert tokens(1, 2) != tokens(2, 2)
    assert tokens(1, 2) != tokens(1, 3)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=1), Sampling(temperature=0, top_p=0.5)])
def test_greedy_takes_the_largest(sampling):
    tokens = choose(ops.convert_to_tensor([[1.0, 3.0, 2.0], [9.0, -1.0, 8.0]]), sampling.plan, sampling.values, 0, 0)
    assert ops.convert_to_numpy(tokens).tolist() == [1, 0]


def test_a_small_temperature_all_but_takes_the_largest():
    logits = ops.convert_to_tensor(np.repeat(logits_of(PROBABILITIES), 100, axis=0))
    seed, step = ops.convert_to_tensor(1, "int32"), ops.convert_to_tensor(2, "int32")
    for temperature, num_different in ((0.01, 1), (3.0, 4)):
        sampling = Sampling(temperature)
        tokens = ops.convert_to_numpy(choose(logits, sampling.plan, sampling.values, seed, step))
        assert len(set(tokens)) == num_different and 3 in tokens


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"temperature": -0.1}, ValueError, "temperature (-0.1)"),
        ({"temperature": float("nan")}, ValueError, "temperature (nan)"),
        ({"temperature": float("inf")}, ValueError, "temperature (inf)"),
        ({"temperature": "hot"}, TypeError, "temperature ('hot')"),
        ({"top_k": 0}, ValueError, "top_k (0) must be at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k (1.5) must be an integer"),
        ({"top_k": True}, TypeError, "top_k (True)"),
        ({"top_p": 0}, ValueError, "top_p (0) must be greater than 0 and at most 1"),
        ({"top_p": 1.1}, ValueError, "top_p (1.1)"),
        ({"top_p": float("nan")}, ValueError, "top_p (nan)"),
        ({"min_p": -0.1}, ValueError, "min_p (-0.1) must be at least 0"),
        ({"min_p": 1.1}, ValueError, "min_p (1.1)"),
    ],
)
def test_settings_out_of_range(arguments, error, words):
    with pytest.raises(error) as caught:
        Sampling(**arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("GreedySampler", {}, GREEDY),
        ("RandomSampler", {"temperature": 0.7}, Sampling(0.7)),
        ("TopKSampler", {"k": 7, "temperature": 0.5}, Sampling(0.5, top_k=7)),
        ("TopPSampler", {"p": 0.3}, Sampling(top_p=0.3)),
        # Its k cuts without normalizing again, which no setting here says.
        ("TopPSampler", {"p": 0.3, "k": 4}, None),
        ("BeamSampler", {"num_beams": 2}, None),
    ],
)
def test_samplers_of_keras_hub(name, arguments, expected):
    assert sampling_of(getattr(keras_hub.samplers, name)(**arguments)) == expected


def test_a_subclass_keeps_its_own_loop():
    class Cautious(keras_hub.samplers.GreedySampler):
        pass

    assert sampling_of(Cautious()) is None
