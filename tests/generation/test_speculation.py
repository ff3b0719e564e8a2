"""Prompt lookup: the drafts themselves, and that texts are those written without drafts, in fewer passes."""

import functools
import itertools
import re

import numpy as np
import pytest
from keras import ops

import kllama
from kllama import backend
from kllama.errors import NonFiniteError
from kllama.generation import decoding, engine
from kllama.generation.decoding import Decoding, Request
from kllama.generation.network import Network
from kllama.generation.sampling import GREEDY, Sampling, choose
from kllama.generation.speculation import (
    LONGEST_NGRAM,
    SHORTEST_NGRAM,
    PromptLookup,
    PromptsInTurn,
    count_accepted,
    find_draft,
    speculate,
)

VOCABULARY_SIZE, NUM_NEW = 8, 60
ROWS = [[1, 2, 3, 4] * 3, [5, 0, 7, 7, 1, 3, 6, 2, 0, 4], [7]]
WARM, HOT = Sampling(0.8, top_k=6, min_p=0.01, repetition_penalty=1.1), Sampling(1.5)


def compiler(model, **compile_options):
    """Compile as `generate` does."""
    programs = {}

    def compiled(function, **settings):
        def run(*arrays):
            return function(Network(model.backbone), *arrays, **settings)

        key = function, *settings.values()
        if key not in programs:
            donates = function is not engine.prefill
            programs[key] = backend.compile_function(run, model.variables, donates=donates, **compile_options)
        return programs[key]

    return compiled


def make_model(**arguments) -> kllama.LlamaCausalLM:
    sizes = {"num_layers": 2, "num_query_heads": 2, "hidden_dim": 8, "intermediate_dim": 12, "num_key_value_heads": 1}
    backbone = kllama.LlamaBackbone(VOCABULARY_SIZE, **{**sizes, **arguments})
    rng = np.random.default_rng(10)
    backbone.set_weights([rng.normal(0, 0.8, weight.shape) for weight in backbone.get_weights()])
    return kllama.LlamaCausalLM(backbone)


@pytest.fixture(scope="module")
def model():
    return make_model(sliding_window=6, layer_types=["sliding_attention", "full_attention"])


@pytest.fixture(scope="module")
def compiled(model):
    return compiler(model)


def no_second_in_a_row(token_ids, lengths, logits):
    """Forbid the token that a row ends with."""
    last = ops.take_along_axis(token_ids, lengths[:, None] - 1, axis=1)
    return ops.where(ops.arange(logits.shape[1])[None] == last, -np.inf, logits)


ALL = {"sampling": WARM, "logits_processors": (no_second_in_a_row,), "min_new_tokens": 9, "log_probs": True}
"""Every option that there is."""


def request_of(rows=ROWS, max_new=NUM_NEW, stop_token_ids=(-1,), **options):
    rows = [np.array(row, "int32") for row in rows]
    max_new = np.broadcast_to(np.array(max_new, "int32"), (len(rows),))
    options = {"sampling": GREEDY, "seed": 0, "num_tokens": VOCABULARY_SIZE, **options}
    return Request(rows, max_new, stop_token_ids, **options)


def texts(chunks, num_rows: int) -> list[list[int]]:
    given = [[] for _ in range(num_rows)]
    for chunk in chunks:
        for row, new in zip(given, chunk.tokens, strict=True):
            row += new[new >= 0].tolist()
    return given


def both(compiled, request: Request, num_draft: int = 4):
    """Give the texts written without drafts and with them, and what wrote the latter."""
    lookup = PromptsInTurn(compiled, request, num_draft)
    num_rows = len(request.rows)
    return texts(Decoding(compiled, request), num_rows), texts(lookup, num_rows), lookup


def slow_counts(prompt: list[int], text: list[int], num_draft: int, max_new: int = NUM_NEW) -> tuple[int, int, int]:
    """Count passes, drafted and accepted tokens of a text whose first token took no pass."""
    num_passes = num_proposed = num_accepted = 0
    given = 1
    while given < len(text):
        draft = slow_draft(prompt + text[:given], num_draft) or []
        differs = [i for i, pair in enumerate(zip(draft, text[given:], strict=False)) if len(set(pair)) == 2]
        taken = min([*differs, len(draft), len(text) - given])
        num_passes += 1
        num_proposed += min(len(draft), max_new - given)
        num_accepted += taken
        given += taken + 1
    return num_passes, num_proposed, num_accepted


def check_counts(request: Request, given: list[list[int]], lookup, num_draft: int = 4):
    rows = zip(request.rows, given, request.max_new, strict=True)
    expected = [slow_counts(row.tolist(), text, num_draft, max_new) for row, text, max_new in rows]
    assert (lookup.num_passes, lookup.num_proposed, lookup.num_accepted) == tuple(np.sum(expected, 0))
    assert lookup.acceptance_rate == lookup.num_accepted / lookup.num_proposed


def slow_draft(text: list[int], num_draft: int) -> list[int] | None:
    for n in range(min(LONGEST_NGRAM, len(text) - 1), SHORTEST_NGRAM - 1, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                draft = list(text)
                for _ in range(num_draft):
                    draft.append(draft[end + len(draft) - len(text)])
                return draft[len(text) :]
    return None


def test_drafts_are_those_of_a_slow_reader():
    rng, size, num_draft = np.random.default_rng(0), 24, 5
    find = backend.compile_function(lambda token_ids, length: find_draft(token_ids, length, num_draft), [])
    num_found = 0
    for _ in range(200):
        token_ids = rng.integers(0, rng.integers(1, 12), size)
        length = int(rng.integers(1, size + 1))
        draft, is_found = find(ops.convert_to_tensor(token_ids, "int32"), ops.convert_to_tensor(length, "int32"))
        expected = slow_draft(token_ids[:length].tolist(), num_draft)
        assert bool(is_found) == (expected is not None)
        if expected is not None:
            assert ops.convert_to_numpy(draft).tolist() == expected
            num_found += 1
    assert 50 < num_found < 200


@pytest.mark.parametrize(
    ("draft", "tokens", "expected"),
    [([1, 2, 3], [1, 2, 3, 4], 3), ([1, 2, 3], [1, 2, 0, 4], 2), ([1, 2, 3], [0, 2, 3, 4], 0)],
)
def test_a_draft_is_accepted_up_to_the_first_difference(draft, tokens, expected):
    assert int(count_accepted(ops.convert_to_tensor(draft), ops.convert_to_tensor(tokens))) == expected


def test_greedy_texts_are_those_without_drafts(compiled):
    plain, drafted, lookup = both(compiled, request_of())
    check_counts(request_of(), drafted, lookup)
    assert drafted == plain and [len(text) for text in drafted] == [NUM_NEW] * 3
    assert 0.3 < lookup.acceptance_rate < 1 and lookup.num_passes < 3 * NUM_NEW / 2


def test_sampled_texts_are_those_without_drafts(compiled):
    """With all options: they see the tokens of a draft as if each had been written alone."""
    for seed in range(3):
        request = request_of(**ALL, seed=seed, stop_token_ids=(4,))
        plain, drafted, lookup = both(compiled, request)
        assert drafted == plain and {text[-1] for text in plain} == {4}
        assert all(9 < len(text) < NUM_NEW and not (np.diff(text) == 0).any() for text in plain)
        check_counts(request, drafted, lookup)


def test_log_probabilities_are_those_without_drafts(compiled):
    plain, drafted = [], []
    request = request_of(**ALL)
    for written, chunks in ((plain, Decoding(compiled, request)), (drafted, PromptsInTurn(compiled, request, 4))):
        for tokens, log_probs in chunks:
            assert (np.isfinite(log_probs) == (tokens >= 0)).all()
            written.append(log_probs)
    plain, drafted = ([row[np.isfinite(row)] for row in np.concatenate(rows, 1)] for rows in (plain, drafted))
    np.testing.assert_allclose(np.stack(drafted), np.stack(plain), atol=1e-5)


@pytest.mark.only_on("torch")
def test_logits_that_are_no_numbers(compiled):
    def broken(token_ids, lengths, logits):
        return ops.where(lengths[:, None] < 30, logits, np.nan)

    request = request_of(ROWS[:1], logits_processors=(broken,))
    messages = []
    for chunks in (Decoding(compiled, request), PromptLookup(compiled, request, 4)):
        with pytest.raises(NonFiniteError) as caught:
            texts(chunks, 1)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "new token 19" in messages[0]


@pytest.mark.only_on("torch")
@pytest.mark.parametrize("num_seeds", [1, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_draft", range(1, 11))
def test_drafts_of_any_size(compiled, num_draft, num_seeds):
    for seed in range(num_seeds):
        rows = np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, (2, 9)).tolist() if seed else ROWS
        for options in ({}, {"sampling": HOT}, ALL):
            request = request_of(rows, seed=seed, **options)
            plain, drafted, lookup = both(compiled, request, num_draft)
            assert drafted == plain
            check_counts(request, drafted, lookup, num_draft)


def test_stop_tokens_and_limits_inside_a_draft(compiled):
    """The greedy texts soon repeat themselves, so that every place lies in some draft."""
    whole = texts(Decoding(compiled, request_of()), 3)
    for max_new in ([1, 2, NUM_NEW], [59, 58, NUM_NEW], [40, 41, NUM_NEW]):
        expected = [text[:end] for text, end in zip(whole, max_new, strict=True)]
        assert texts(PromptsInTurn(compiled, request_of(max_new=max_new), 4), 3) == expected
    for stop in range(VOCABULARY_SIZE):
        ends = [text.index(stop) + 1 if stop in text else NUM_NEW for text in whole]
        expected = [text[:end] for text, end in zip(whole, ends, strict=True)]
        assert texts(PromptsInTurn(compiled, request_of(stop_token_ids=(stop,)), 4), 3) == expected


@pytest.mark.only_on("torch")
def test_stop_tokens_and_limits_inside_an_accepted_draft(compiled):
    def count_on(token_ids, lengths, logits):
        last = ops.take_along_axis(token_ids, lengths[:, None] - 1, axis=1)
        return ops.where(ops.arange(8)[None] == (last + 1) % 8, 0.0, -np.inf)

    prompt = [*range(8), 0, 1]
    for stop, max_new, expected in ((5, 9, [2, 3, 4, 5]), (3, 9, [2, 3]), (1, 3, [2, 3, 4]), (1, 5, [2, 3, 4, 5, 6])):
        request = request_of([prompt], max_new, (stop,), logits_processors=(count_on,))
        lookup = PromptsInTurn(compiled, request, 4)
        assert texts(lookup, 1) == [expected] and lookup.num_passes == 1
        check_counts(request, [expected], lookup)


def test_caches_grow(compiled, monkeypatch):
    monkeypatch.setattr(decoding, "_FIRST_SLOTS", 16)
    plain, drafted, lookup = both(compiled, request_of(max_new=150))
    assert drafted == plain and [len(text) for text in plain] == [150] * 3
    check_counts(request_of(max_new=150), drafted, lookup)


def test_the_size_of_a_chunk_changes_nothing(compiled):
    request = request_of(ROWS[:1], **ALL)
    expected = texts(PromptLookup(compiled, request, 4), 1)
    assert texts(PromptLookup(compiled, request, 4, chunk=1), 1) == expected
    lookup = PromptLookup(compiled, request, 4, chunk=7)
    chunks = []
    for chunk in lookup:
        chunks.append(chunk)
        lookup.chunk = 3
        if len(chunks) == 5:
            lookup.end(0)
    text = texts(chunks, 1)[0]
    assert len(chunks) == 5 and 1 + 4 * 3 <= len(text) < NUM_NEW and text == expected[0][: len(text)]
    # The caches hold all but the last token.
    assert int(lookup.state.num_new) == len(text) and ops.convert_to_numpy(lookup.state.token).tolist() == text[-1:]


def test_what_repeats_itself_takes_few_passes(compiled):
    """The greedy text of this prompt ends in one token again and again."""
    lookup = PromptLookup(compiled, request_of(ROWS[2:]), 4)
    (text,) = texts(lookup, 1)
    start = next(i for i in range(NUM_NEW) if len(set(text[i:])) == 1)
    assert start < 25 and lookup.num_passes <= start + 2 + (NUM_NEW - start) / 5
    assert lookup.num_accepted > 0.75 * (NUM_NEW - start)


def test_without_a_match_nothing_is_proposed(compiled):
    lookup = PromptLookup(compiled, request_of(ROWS[2:], max_new=[2]), 4)
    assert len(texts(lookup, 1)[0]) == 2
    assert (lookup.num_passes, lookup.num_proposed, lookup.num_accepted) == (1, 0, 0)
    assert np.isnan(lookup.acceptance_rate)


@pytest.mark.only_on("torch")
def test_passes_are_those_of_the_network(compiled, monkeypatch):
    shapes, run = [], Network.run
    monkeypatch.setattr(Network, "run", lambda *args: shapes.append(tuple(args[1].shape)) or run(*args))
    lookup = PromptLookup(compiled, request_of(ROWS[:1], **ALL), 4)
    (text,) = texts(lookup, 1)
    assert shapes[0] == (1, 16) and set(shapes[1:]) == {(1, 1), (1, 5)} and len(shapes) == 1 + lookup.num_passes
    # Each pass gives one token of its own, but for the last one where the limit comes before it.
    assert lookup.num_passes + lookup.num_accepted - (len(text) - 1) in (0, 1)
    # Near the limit, drafts lose one to three tokens.
    assert 0 <= 4 * shapes.count((1, 5)) - lookup.num_proposed <= 6


@pytest.mark.only_on("torch")
@pytest.mark.parametrize("options", [{}, {**ALL, "logits_processors": ()}], ids=["greedy", "sampled"])
def test_passes_with_and_without_a_draft_are_a_graph_each(model, compiled, monkeypatch, options):
    import torch

    def note(graph, _):
        graphs.append(graph)
        return graph.forward

    graphs, request = [], request_of(ROWS[:1], **options)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=note))
    given = texts(PromptLookup(compiler(model, jit_compile=True), request, 4, chunk=16), 1)
    assert len(graphs) == 2 and given == texts(PromptLookup(compiled, request, 4), 1)


@pytest.mark.only_on("jax")
def test_no_pass_copies_a_cache():
    texts_of_programs, compile_one = [], compiler(make_model(num_key_value_heads=2))

    def compiled(function, **settings):
        program = compile_one(function, **settings)
        if function is not speculate:
            return program
        return lambda *arrays: texts_of_programs.append(program.lower(*arrays).compile().as_text()) or program(*arrays)

    list(PromptLookup(compiled, request_of(ROWS[:1]), 4))
    (text,) = texts_of_programs
    assert "f32[2,128,4]" in text and not re.search(r"= f32\[2,128,4\]\S* copy\(", text)


@pytest.mark.only_on("torch")
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_stay_those_of_the_prompt(rope_type):
    factors = {"short_factor": [1.0, 1.0], "long_factor": [3.0, 2.0], "original_max_position_embeddings": 16}
    scaling = {"rope_type": rope_type, "factor": 4.0} | (factors if rope_type == "longrope" else {})
    compiled = compiler(make_model(rope_scaling=scaling, max_sequence_length=16))
    for row in (ROWS[0], ROWS[0] * 2):
        plain, drafted, _ = both(compiled, request_of([row], **ALL))
        assert drafted == plain


def test_stories(assets):
    model = kllama.LlamaCausalLM.from_preset(assets / "models" / "stories260K")
    row = [1, *model.preprocessor.tokenizer("Lily had a red ball. Tom had a blue ball. " * 2)]
    plain, drafted, lookup = both(compiler(model), request_of([row], 100, num_tokens=model.backbone.vocabulary_size), 8)
    assert drafted == plain
    assert lookup.num_passes < 80


def chi_square(counts, probabilities) -> float:
    """Give how many standard deviations too large the statistic is (Wilson and Hilferty's approximation)."""
    expected = counts.sum() * probabilities
    common = expected >= 5
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def probabilities_of(logits, sampling: Sampling) -> np.ndarray:
    """What `choose` draws from, in float64: for temperature and min-p alone."""
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / sampling.temperature)
    weights = weights * (weights >= sampling.min_p)
    return weights / weights.sum(-1, keepdims=True)


def test_the_first_two_tokens_have_the_exact_distribution():
    """A chain of tokens with known probabilities, and a draft of two for each of many rows."""
    rng, sampling, num_rows = np.random.default_rng(7), Sampling(0.8, min_p=0.05), 20_000
    first, after = rng.normal(0, 1.5, 8), rng.normal(0, 1.5, (8, 8))
    first, after = first.astype("float32"), after.astype("float32")

    def draw(logits, noise):
        tokens = choose(ops.convert_to_tensor(logits), sampling.plan, sampling.values, ops.convert_to_tensor(noise))
        return ops.convert_to_numpy(tokens)

    for draft in ([int(first.argmax()), 2], [5, 5], [int(first.argmin()), 0]):
        noise = rng.random((num_rows, 3), dtype="float32")
        logits = np.stack([first, after[draft[0]], after[draft[1]]])
        tokens = draw(np.tile(logits, (num_rows, 1)), noise.reshape(-1)).reshape(num_rows, 3)
        drafts = np.broadcast_to(np.array(draft, "int32"), (num_rows, 2))
        counts = count_accepted(ops.convert_to_tensor(drafts), ops.convert_to_tensor(tokens))
        is_rejected = ops.convert_to_numpy(counts) == 0
        second = np.where(is_rejected, draw(after[tokens[:, 0]], noise[:, 1]), tokens[:, 1])
        exact = probabilities_of(first, sampling)[:, None] * probabilities_of(after, sampling)
        pairs = np.bincount(tokens[:, 0] * 8 + second, minlength=64)
        assert abs(chi_square(pairs, exact.reshape(-1))) < 4
        np.testing.assert_allclose((~is_rejected).mean(), probabilities_of(first, sampling)[draft[0]], atol=0.02)


@pytest.mark.only_on("torch")
@pytest.mark.parametrize("num_prompts", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_texts_have_the_exact_distribution(model, compiled, num_prompts):
    """Three tokens after one prompt: the first without a draft, the others with one."""
    prompt = [5, 0, 5, 1, 5, 2, 5, 3, 5, 4, 5, 6, 5, 7, 5]  # what may follow has followed before, and then came a 5
    pairs = np.array([[*prompt, *pair] for pair in itertools.product(range(8), repeat=2)], "int32")
    inputs = {"token_ids": pairs, "padding_mask": np.ones_like(pairs)}
    logits = ops.convert_to_numpy(model(inputs)).astype("float64")
    first, second, third = (probabilities_of(logits[:, len(prompt) + i], HOT) for i in (-1, 0, 1))
    exact = first[0][:, None, None] * second.reshape(8, 8, 8)[:, 0][:, :, None] * third.reshape(8, 8, 8)
    lookup = PromptsInTurn(compiled, request_of([prompt] * num_prompts, max_new=3, sampling=HOT, seed=11), 4)
    given = np.array(texts(lookup, num_prompts))
    assert lookup.num_accepted > num_prompts / 20
    for axis, columns in ((0, [1, 2]), (2, [0, 1])):
        counts = np.bincount(given[:, columns] @ [8, 1], minlength=64)
        assert abs(chi_square(counts, exact.sum(axis).reshape(-1))) < 4
