"""Sampling, one function at a time, against recorded vectors of transformers and by its own words."""

import json

import keras_hub
import numpy as np
import pytest
from keras import ops

from kllama import backend
from kllama.generation.choosing import Plan, hold_back, penalize, remember
from kllama.generation.noise import uniform_numbers
from kllama.generation.sampling import (
    GREEDY,
    REMOVED,
    Sampling,
    choose,
    keep,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sampling_of,
)

PROBABILITIES = np.array([[0.1, 0.2, 0.3, 0.4]])


def logits_of(probabilities) -> np.ndarray:
    return np.log(np.asarray(probabilities, "float32"))


def noise(num_rows: int, seed: int = 1):
    return ops.convert_to_tensor(uniform_numbers(seed, [0], 0, num_rows)[0])


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


def recorded(assets, name: str) -> list[dict]:
    return json.loads((assets / "goldens" / "sampling.json").read_text())[name]


@pytest.mark.parametrize(
    ("processor", "count"),
    [
        ("temperature", 2),
        ("top_k", 3),
        ("top_p", 3),
        ("min_p", 2),
        ("repetition_penalty", 2),
        ("min_new_tokens", 1),
        ("chain", 2),
    ],
)
def test_recorded_transformers_processors(assets, processor, count):
    others = {"min_tokens_to_keep", "prompt_ignore_length", "no_repeat_ngram_size"}
    cases = [case for case in recorded(assets, "transformers") if case["processor"] == processor]
    cases = [case for case in cases if not others & case["parameters"].keys()]
    assert len(cases) >= count
    for case in cases:
        scores = ops.convert_to_tensor(np.array(case["scores"], "float32"))
        processed = ops.convert_to_numpy(process(scores, np.array(case["input_ids"]), case["parameters"]))
        expected = np.array([[-np.inf if x is None else x for x in row] for row in case["expected"]], "float64")
        np.testing.assert_array_equal(processed == REMOVED, np.isneginf(expected), err_msg=str(case["parameters"]))
        np.testing.assert_allclose(processed, expected, rtol=1e-5)


def process(scores, input_ids, parameters):
    """Do what comes before the draw, as `choose_next` does."""
    parameters = dict(parameters)
    if "min_new_tokens" in parameters:
        is_early = input_ids.shape[1] - parameters["prompt_length"] < parameters["min_new_tokens"]
        stop_token_ids = ops.convert_to_tensor(parameters["eos_token_id"], "int32")
        return hold_back(scores, stop_token_ids, ops.convert_to_tensor([[is_early]] * len(input_ids)))
    if "repetition_penalty" in parameters:
        plan = Plan(GREEDY.plan, penalizes=True)
        seen = remember(plan, list(input_ids), scores.shape[-1], 0).seen
        scores = penalize(scores, seen, parameters.pop("repetition_penalty"))
    sampling = Sampling(**parameters)
    return keep(scores, sampling.plan, sampling.values)


def test_recorded_llama_cpp_samplers(assets):
    names = {"temp": "temperature", "top_k": "k", "top_p": "p", "min_p": "p"}
    functions = {"top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p, "temp": lambda x, t: x / t}
    checked = 0
    for case in recorded(assets, "llama_cpp"):
        value = case["parameters"].get(names.get(case["sampler"]))
        if value is None or value == 0 or (case["sampler"] == "min_p" and value > 1):  # refused here, or greedy
            continue
        if case["sampler"] == "top_p" and value == 0.7:  # 0.4 + 0.3, on either side of 0.7 by the luck of rounding
            continue
        logits = ops.convert_to_tensor(logits_of([case["probs"]]))
        kept = logits if (case["sampler"], value) == ("top_p", 1) else functions[case["sampler"]](logits, float(value))
        expected = sorted(case["expected"], reverse=True)
        expected += [0] * (len(case["probs"]) - len(expected))
        np.testing.assert_allclose(sorted(kept_probabilities(kept)[0], reverse=True), expected, atol=1e-5)
        checked += 1
    assert checked >= 12


def test_recorded_llama_cpp_orders(assets):
    """The orders of theirs that are ours: top-k before top-p before min-p."""
    functions = {"k": ("top_k", keep_top_k), "p": ("top_p", keep_top_p), "m": ("min_p", keep_min_p)}
    checked = 0
    for case in recorded(assets, "llama_cpp_queues"):
        if sorted(case["order"], key="kpm".index) != list(case["order"]) or case["top_p"] == 0:
            continue
        with np.errstate(divide="ignore"):
            logits = ops.convert_to_tensor(np.log(np.arange(case["n_vocab"])[None]).astype("float32"))
        for letter in case["order"]:
            name, function = functions[letter]
            if (name, case[name]) != ("top_p", 1):
                logits = function(logits, float(case[name]))
        kept = np.flatnonzero(kept_probabilities(logits)[0])
        is_all = case["kept"] == case["n_vocab"]  # token 0 has no probability from the start
        assert (len(kept), kept[0]) == (case["kept"] - is_all, case["smallest_kept_id"] + is_all), case
        checked += 1
    assert checked >= 12


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.6),
        Sampling(2.0, top_k=7),
        Sampling(top_p=0.8),
        Sampling(1.3, min_p=0.05),
        Sampling(1.5, top_k=20, top_p=0.9, min_p=0.02),
    ],
    ids=lambda sampling: str(sampling.values),
)
def test_chi_square(sampling):
    """20,000 draws of each way to sample are as frequent as they are probable; what is removed is never drawn."""
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, 40).astype("float32")
    logits[rng.integers(0, 40, 5)] = REMOVED
    count = 20_000
    rows = ops.convert_to_tensor(np.repeat(logits[None], count, axis=0))
    tokens = ops.convert_to_numpy(choose(rows, sampling.plan, sampling.values, noise(count, seed=11)))
    probabilities = slow_probabilities(logits, sampling)
    counts = np.bincount(tokens, minlength=40)
    assert counts[probabilities == 0].sum() == 0
    expected, counts = (x[probabilities > 0] for x in (probabilities * count, counts))
    order = np.argsort(expected)[::-1]
    num_cells = max(2, int((expected >= 10).sum()))  # the rare ones make one cell
    expected, counts = (
        np.append(x[order][: num_cells - 1], x[order][num_cells - 1 :].sum()) for x in (expected, counts)
    )
    statistic, freedom = np.square(counts - expected) @ (1 / expected), num_cells - 1
    # Wilson and Hilferty: the cube root is all but normal; beyond 3.7 deviations lies 0.0001.
    assert ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / np.sqrt(2 / (9 * freedom)) < 3.7


def slow_probabilities(logits, sampling: Sampling) -> np.ndarray:
    """Sampling by its own words, in float64, one token after another."""
    weights = np.exp(logits.astype("float64") / sampling.temperature)
    if sampling.top_k is not None:
        weights[weights < np.sort(weights)[-sampling.top_k]] = 0
    weights /= weights.sum()
    better = np.array([weights[weights > weight].sum() for weight in weights])
    weights = np.where(better < sampling.top_p, weights, 0)
    weights = np.where(weights < sampling.min_p * weights.max(), 0, weights)
    return weights / weights.sum()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=2, top_p=0.9, min_p=0.1)], ids=str)
def test_rows_without_a_number(sampling):
    """The size of the vocabulary stands for no token."""
    nan, infinity = np.nan, np.inf
    rows = [[1, nan, 3], [nan] * 3, [-infinity] * 3, [1, infinity, 2], [1, 2, -infinity]]

    def run(rows, noise):
        return choose(rows, sampling.plan, sampling.values, noise)

    arrays = (ops.convert_to_tensor(np.array(array, "float32")) for array in (rows, np.full(5, 0.3)))
    tokens = backend.compile_function(run, [])(*arrays)  # XLA for TensorFlow has maxima of its own
    tokens = ops.convert_to_numpy(tokens).tolist()
    assert tokens[:4] == [3] * 4 and tokens[4] in (0, 1)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=1), Sampling(temperature=0, top_p=0.5)])
def test_greedy_takes_the_largest(sampling):
    tokens = choose(
        ops.convert_to_tensor([[1.0, 3.0, 2.0], [9.0, -1.0, 8.0]]), sampling.plan, sampling.values, noise(2)
    )
    assert ops.convert_to_numpy(tokens).tolist() == [1, 0]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [1e-9, 1e-30])
def test_a_tiny_temperature_takes_the_largest(temperature, top_p):
    logits = np.random.default_rng(5).normal(0, 7, (50, 300)).astype("float32")
    sampling = Sampling(temperature, top_p=top_p)
    program = backend.compile_function(lambda x, y: choose(x, sampling.plan, sampling.values, y), [])
    tokens = program(ops.convert_to_tensor(logits), noise(50))
    assert ops.convert_to_numpy(tokens).tolist() == logits.argmax(-1).tolist()


def test_a_small_temperature_all_but_takes_the_largest():
    logits = ops.convert_to_tensor(np.repeat(logits_of(PROBABILITIES), 100, axis=0))
    for temperature, num_different in ((0.01, 1), (3.0, 4)):
        sampling = Sampling(temperature)
        tokens = ops.convert_to_numpy(choose(logits, sampling.plan, sampling.values, noise(100)))
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
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty (0) must be a positive finite number"),
        ({"repetition_penalty": float("inf")}, ValueError, "repetition_penalty (inf)"),
        ({"repetition_penalty": "1"}, TypeError, "repetition_penalty ('1')"),
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
        ("BeamSampler", {"num_beams": 2}, None),
    ],
)
def test_samplers_of_keras_hub(name, arguments, expected):
    assert sampling_of(getattr(keras_hub.samplers, name)(**arguments)) == expected


def test_samplers_that_only_draw_run_in_the_engine():
    class Cautious(keras_hub.samplers.GreedySampler):
        pass

    # The k of this one cuts without normalizing again, which no setting here says.
    for sampler in (Cautious(), keras_hub.samplers.TopPSampler(p=0.3, k=4)):
        assert sampling_of(sampler) == Sampling(sampler=sampler)


@pytest.mark.parametrize("name", ["__call__", "run_loop"])
def test_a_sampler_with_a_loop_keeps_it(name):
    class Own(keras_hub.samplers.GreedySampler):
        pass

    setattr(Own, name, lambda self, *arguments, **keywords: None)
    assert sampling_of(Own()) is None
