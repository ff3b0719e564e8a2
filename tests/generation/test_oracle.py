"""The engine against the plain loop: the same ids from both, for random prompts, settings and seeds.

`python -m pytest tests/generation/test_oracle.py -m slow` compares 200 prompts for each way to choose tokens.
"""

import dataclasses

import numpy as np
import pytest
from keras import ops

import kllama
from kllama import backend
from kllama.errors import NonFiniteError
from kllama.generation import engine
from kllama.generation.decoding import Decoding, Request
from kllama.generation.network import Network
from kllama.generation.programs import Programs
from kllama.generation.sampling import GREEDY, Sampling
from kllama.models.continuation import run_plainly

VOCABULARY_SIZE, NUM_TOKENS, BATCH_SIZE, LONGEST, MAX_NEW = 60, 55, 6, 40, 24
POISON, POISON_LENGTH = 0, 45

few_or_many = pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)], ids=["few", "many"])


class Compiled:
    """What compiles the engine's programs over a model, once each, and counts how often they are traced."""

    def __init__(self, model):
        self._model, self._programs, self.num_traces = model, {}, 0

    def __call__(self, function, **settings):
        def run(*arrays):
            self.num_traces += 1
            return function(Network(self._model.backbone), *arrays, **settings)

        key = function, *settings.values()
        if key not in self._programs:
            donates = function is engine.decode
            self._programs[key] = backend.compile_function(run, self._model.variables, donates=donates)
        return self._programs[key]


@pytest.fixture(scope="module")
def model():
    sizes = {"num_layers": 2, "num_query_heads": 4, "hidden_dim": 16, "intermediate_dim": 24, "num_key_value_heads": 2}
    backbone = kllama.LlamaBackbone(
        VOCABULARY_SIZE, **sizes, sliding_window=20, layer_types=["sliding_attention", "full_attention"]
    )
    rng = np.random.default_rng(8)
    backbone.set_weights([rng.normal(0, 0.6, weight.shape) for weight in backbone.get_weights()])
    return kllama.LlamaCausalLM(backbone)


@pytest.fixture(scope="module")
def compiled(model):
    return Compiled(model)


@pytest.fixture(scope="module")
def programs(model):
    return Programs(model.variables, model.call_with_cache, None)


def alternate(token_ids, lengths, logits):
    """Like even tokens less after an even one; for a row that begins with `POISON`, be no number at some length."""
    last = ops.take_along_axis(token_ids, lengths[:, None] - 1, axis=1)
    is_even = ops.arange(logits.shape[1])[None] % 2 == 0
    logits = ops.where(is_even & (last % 2 == 0), logits - 1.5, logits)
    is_poisoned = (token_ids[:, :1] == POISON) & (lengths[:, None] == POISON_LENGTH)
    return ops.where(is_poisoned, float("nan"), logits)


def every_option(rng) -> dict:
    """Give the settings of a request that takes every step there is; the numbers at random."""
    sampling = Sampling(
        temperature=rng.uniform(0.5, 2),
        top_k=int(rng.integers(5, 50)),
        top_p=rng.uniform(0.5, 0.99),
        min_p=rng.uniform(0.001, 0.1),
        repetition_penalty=rng.uniform(0.8, 1.5),
    )
    min_new_tokens = int(rng.integers(1, 10))
    options = {"logits_processors": (alternate,), "log_probs": True}
    return {"sampling": sampling, "min_new_tokens": min_new_tokens, **options}


def random_request(rng, **settings) -> Request:
    """Give ragged prompts, of which one is so long that all batches share their programs."""
    lengths = [int(rng.integers(33, LONGEST + 1)), *rng.integers(1, LONGEST + 1, BATCH_SIZE - 1)]
    defaults = {
        "rows": [rng.integers(1, VOCABULARY_SIZE, length).astype("int32") for length in rng.permutation(lengths)],
        "max_new": rng.permutation([MAX_NEW, *rng.integers(1, MAX_NEW + 1, BATCH_SIZE - 1)]).astype("int32"),
        "stop_token_ids": tuple(rng.choice(NUM_TOKENS, 2, replace=False).tolist()),
        "sampling": GREEDY,
        "seed": int(rng.integers(2**31)),
        "num_tokens": NUM_TOKENS,
    }
    return Request(**{**defaults, **settings})


def by_engine(compiled, request: Request, chunk: int = 7) -> tuple[list, list]:
    """Give the new ids of each row, and their log-probabilities."""
    chunks = list(Decoding(compiled, request, chunk))
    tokens = np.concatenate([chunk.tokens for chunk in chunks], axis=1)
    if not request.log_probs:
        return [row[row >= 0] for row in tokens], [None] * len(tokens)
    log_probs = np.concatenate([chunk.log_probs for chunk in chunks], axis=1)
    np.testing.assert_array_equal(np.isnan(log_probs), tokens < 0)
    return [row[row >= 0] for row in tokens], [row[~np.isnan(row)] for row in log_probs]


def assert_equal(found: tuple, expected: tuple) -> None:
    for row, other in zip(found[0], expected[0], strict=True):
        assert row.tolist() == other.tolist()
    for row, other in zip(found[1], expected[1], strict=True):
        if row is not None:
            np.testing.assert_allclose(row, other, atol=2e-4)


@few_or_many
@pytest.mark.parametrize("settings", [lambda rng: {}, every_option], ids=["greedy", "every option"])
def test_the_ids_of_the_plain_loop(model, compiled, programs, settings, count):
    rng = np.random.default_rng(3)
    for _ in range(count // BATCH_SIZE + 1):
        request = random_request(rng, **settings(rng))
        assert_equal(by_engine(compiled, request), run_plainly(model, programs, request))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"sampling": dataclasses.replace(GREEDY, repetition_penalty=1.3)},
        {"sampling": GREEDY, "min_new_tokens": 5, "log_probs": True},
        {"sampling": Sampling()},
        {"sampling": Sampling(0.7, top_k=10)},
        {"sampling": Sampling(1.2, top_p=0.9)},
        {"sampling": Sampling(1.5, min_p=0.05)},
        {"sampling": Sampling(0.9, top_k=20, top_p=0.95)},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_200_prompts_for_each_way_to_choose(model, compiled, programs, settings, seed):
    rng = np.random.default_rng(seed)
    for _ in range(200 // BATCH_SIZE + 1):
        request = random_request(rng, **settings)
        assert_equal(by_engine(compiled, request), run_plainly(model, programs, request))


@pytest.mark.slow
def test_a_row_alone(compiled):
    """A greedy row does not depend on the rows beside it, nor on the chunks."""
    rng = np.random.default_rng(6)
    for _ in range(10):
        request = random_request(rng)
        together = by_engine(compiled, request)[0]
        for index, row in enumerate(request.rows):
            alone = dataclasses.replace(request, rows=[row], max_new=request.max_new[index : index + 1])
            assert by_engine(compiled, alone, chunk=64)[0][0].tolist() == together[index].tolist()


def test_log_probabilities_are_those_of_whole_forward_passes(model, compiled):
    request = random_request(np.random.default_rng(4), **every_option(np.random.default_rng(4)))
    new, log_probs = by_engine(compiled, request)
    rows = [np.concatenate(parts) for parts in zip(request.rows, new, strict=True)]
    width = max(map(len, rows))
    token_ids = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    padding_mask = np.arange(width) < np.array([[len(row)] for row in rows])
    logits = ops.convert_to_numpy(model({"token_ids": token_ids, "padding_mask": padding_mask})).astype("float64")
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, prompt, tokens, found in zip(expected, request.rows, new, log_probs, strict=True):
        positions = np.arange(len(tokens)) + len(prompt) - 1
        np.testing.assert_allclose(found, row[positions, tokens], atol=2e-4)


@pytest.mark.only_on("jax", "tensorflow")
def test_other_numbers_are_no_other_programs(compiled):
    rng = np.random.default_rng(5)
    by_engine(compiled, random_request(rng, **every_option(rng)))
    before = compiled.num_traces
    for _ in range(3):
        by_engine(compiled, random_request(rng, **every_option(rng)))
    assert compiled.num_traces == before


def test_several_sequences_of_a_prompt(compiled):
    rng = np.random.default_rng(7)
    request = random_request(rng, **every_option(rng))
    rows, max_new = [row for row in request.rows[:2] for _ in range(3)], np.repeat(request.max_new[:2], 3)
    rows[0] = rows[1] = rows[2] = np.resize(rows[0], 36)
    apart = dataclasses.replace(request, rows=rows, max_new=max_new)
    together = dataclasses.replace(apart, num_sequences=3)
    found = by_engine(compiled, together)
    assert_equal(found, by_engine(compiled, apart))
    assert len({tuple(row.tolist()) for row in found[0][:3]}) > 1


@pytest.mark.parametrize("loop", ["engine", "plain"])
def test_logits_that_are_no_numbers(model, compiled, programs, loop):
    rng = np.random.default_rng(9)
    no_stop_token_ids = (NUM_TOKENS + 1, NUM_TOKENS + 2)
    settings = {**every_option(rng), "stop_token_ids": no_stop_token_ids, "max_new": np.full(BATCH_SIZE, MAX_NEW)}
    request = random_request(rng, **settings)
    request.rows[2] = np.concatenate([[POISON], request.rows[2][:10], np.full(30, 7)]).astype("int32")[:40]
    num_before = POISON_LENGTH - len(request.rows[2])
    with pytest.raises(NonFiniteError, match=f"row 2, new token {num_before + 1}: the logits are NaN or infinite"):
        by_engine(compiled, request) if loop == "engine" else run_plainly(model, programs, request)
