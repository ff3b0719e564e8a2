"""The decoding loop over a made-up model: the next token is the last one plus the number of tokens so far."""

import numpy as np
import pytest
from keras import ops

from kllama.generation.plain_loop import bucket, decode

VOCABULARY_SIZE = 50


def step(token, cache, index):
    following = (token[:, 0] + index) % VOCABULARY_SIZE
    return ops.one_hot(following, VOCABULARY_SIZE), cache + ops.cast(token, "float32")


def choose(logits, position, memory):
    return ops.cast(ops.argmax(logits, axis=-1), "int32"), logits[:, 0], memory


def run(prompts, limits, stop_token_ids=(), width=16):
    token_ids = np.zeros((len(prompts), width), "int32")
    for row, prompt in zip(token_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    arrays = token_ids, np.zeros((len(prompts), 1)), [len(prompt) for prompt in prompts], limits
    token_ids, cache, lengths, limits = (
        ops.convert_to_tensor(np.array(array), dtype)
        for array, dtype in zip(arrays, ("int32", "float32", "int32", "int32"), strict=True)
    )
    stop_token_ids = ops.convert_to_tensor(np.array(stop_token_ids, "int32"))
    token_ids, ends, _, _ = decode(step, choose, token_ids, cache, lengths, limits, stop_token_ids)
    ends = ops.convert_to_numpy(ends)
    return [row[:end].tolist() for row, end in zip(ops.convert_to_numpy(token_ids), ends, strict=True)]


def expected(prompt, limit, stop_token_ids=()):
    row = list(prompt)
    while len(row) < limit:
        row.append((row[-1] + len(row) - 1) % VOCABULARY_SIZE)
        if row[-1] in stop_token_ids:
            break
    return row


@pytest.mark.parametrize(
    ("prompts", "limits", "stop_token_ids"),
    [
        ([[3]], [8], ()),
        ([[3, 9], [1, 2, 3, 4]], [9, 9], ()),
        ([[3, 9], [1, 2, 3, 4], [7]], [4, 16, 2], ()),
        ([[3, 9], [1, 2, 3, 4]], [16, 16], (12, 14)),
        # A stop token inside a prompt ends nothing.
        ([[3, 12, 3], [1, 12]], [10, 10], (12,)),
        # A prompt as long as its limit, or longer, stays as it is.
        ([[3, 9, 4], [1]], [3, 5], ()),
        ([[3, 9, 4], [1]], [2, 5], ()),
    ],
)
def test_rows(prompts, limits, stop_token_ids):
    rows = [expected(prompt, limit, stop_token_ids) for prompt, limit in zip(prompts, limits, strict=True)]
    assert run(prompts, limits, stop_token_ids) == rows


def test_it_stops_as_soon_as_all_rows_have_ended():
    calls = []

    def counting_step(token, cache, index):
        calls.append(index)
        return step(token, cache, index)

    token_ids = ops.convert_to_tensor(np.array([[3, 9, 0, 0, 0, 0, 0, 0]], "int32"))
    int32 = {"dtype": "int32"}
    arguments = (ops.convert_to_tensor([2], **int32), ops.convert_to_tensor([4], **int32))
    decode(counting_step, choose, token_ids, ops.zeros((1, 1)), *arguments, ops.convert_to_tensor([], **int32))
    # Compiled loops trace the step once; PyTorch's calls it for each of the two new tokens.
    assert len(calls) <= 2


def test_numbers_are_noted_of_what_was_written_and_the_memory_goes_on():
    def choose_and_count(logits, position, memory):
        token, _, _ = choose(logits, position, memory)
        return token, ops.cast(token, "float32"), (memory[0] + 1,)

    arrays = ([[3, 9, 0, 0], [5, 0, 0, 0]], [2, 1], [4, 3], [])
    token_ids, *others = (ops.convert_to_tensor(array, "int32") for array in arrays)
    arguments = token_ids, ops.zeros((2, 1)), *others
    memory = (ops.convert_to_tensor(0, "int32"),)
    token_ids, _, numbers, (count,) = decode(step, choose_and_count, *arguments, memory)
    token_ids, numbers = ops.convert_to_numpy(token_ids), ops.convert_to_numpy(numbers)
    assert int(count) == 3
    np.testing.assert_array_equal(np.isnan(numbers), [[True, True, False, False], [True, False, False, True]])
    np.testing.assert_array_equal(numbers[~np.isnan(numbers)], token_ids[~np.isnan(numbers)])


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (1000, 1024), (1025, 2048)]
)
def test_buckets(length, expected):
    assert bucket(length) == expected
