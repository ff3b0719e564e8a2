"""Choosing one token, step by step: when stop tokens may come, and what is remembered."""

import numpy as np
import pytest
from keras import ops

from kllama.errors import NonFiniteError
from kllama.generation.choosing import choose_next, make_plan, only_for, remember
from kllama.generation.decoding import check_tokens
from kllama.generation.engine import Inputs
from kllama.generation.sampling import GREEDY, Sampling

NUM_TOKENS = 6
ROWS = [np.array([4, 5, 4, 7], "int32"), np.array([2], "int32")]  # 7 has logits, and is no token
LOGITS = np.array([[0, 1, 2, 3, 4, 5, 6, 9], [0, 5, 9, 4, 3, 2, 1, 9]], "float32")
NOISE = np.full(2, 0.5, "float32")


def inputs(sampling: Sampling, min_new: int) -> Inputs:
    lengths, max_new = [len(row) for row in ROWS], [9, 9]
    int32 = (ops.convert_to_tensor(array, "int32") for array in (lengths, max_new, [5, 2, NUM_TOKENS]))
    return Inputs(*int32, ops.convert_to_tensor(sampling.values, "float32"), ops.convert_to_tensor(min_new, "int32"))


def step(plan, memory, num_new: int, sampling=GREEDY, min_new: int = 0, logits=LOGITS):
    arrays = ops.convert_to_tensor(NOISE), ops.convert_to_tensor(num_new, "int32"), NUM_TOKENS
    token, log_prob, memory = choose_next(
        ops.convert_to_tensor(logits), plan, inputs(sampling, min_new), memory, *arrays
    )
    return ops.convert_to_numpy(token).tolist(), log_prob, memory


def test_stop_tokens_come_after_the_fewest_new_tokens_and_no_later():
    plan = make_plan(GREEDY, min_new_tokens=3)
    tokens = [step(plan, remember(plan, ROWS, NUM_TOKENS, 8), num_new, min_new=3)[0] for num_new in range(4)]
    assert tokens == [[4, 1]] * 3 + [[5, 2]]


def test_what_is_remembered():
    calls = []

    def look(token_ids, lengths, logits):
        calls.append((ops.convert_to_numpy(token_ids).tolist(), ops.convert_to_numpy(lengths).tolist(), logits.shape))
        return logits

    sampling = Sampling(temperature=0, repetition_penalty=2)
    plan = make_plan(sampling, logits_processors=[look])
    memory = remember(plan, ROWS, NUM_TOKENS, 8)
    tokens = []
    for num_new in range(3):
        token, _, memory = step(plan, memory, num_new, sampling)
        tokens.append(token)
    # Row 0 holds 4 and 5: 3, then 2.5 of 5 / 2. Row 1 holds 2: 5, 4.5 of 9 / 2, which is 2 once more, and again.
    assert tokens == [[3, 1], [5, 2], [5, 2]]
    assert [lengths for _, lengths, _ in calls] == [[4, 1], [5, 2], [6, 3]]
    assert [row[:length] for row, length in zip(calls[2][0], calls[2][1], strict=True)] == [
        [4, 5, 4, 7, 3, 5],
        [2, 1, 2],
    ]
    assert tuple(calls[0][2]) == (2, NUM_TOKENS)
    assert np.argwhere(ops.convert_to_numpy(memory.seen)).tolist() == [[0, 3], [0, 4], [0, 5], [1, 1], [1, 2]]


def test_rows_that_go_on_alone():
    sampling = Sampling(temperature=0, repetition_penalty=2)
    plan = make_plan(sampling, logits_processors=[lambda token_ids, lengths, logits: logits])
    before = remember(plan, ROWS, NUM_TOKENS, 8)
    _, _, after = step(plan, before, 0, sampling)
    kept = only_for(ops.convert_to_tensor([True, False]), after, before)
    for found, gone_on, old in zip(kept[:2], after[:2], before[:2], strict=True):
        found, gone_on, old = (ops.convert_to_numpy(array).tolist() for array in (found, gone_on, old))
        assert found == [gone_on[0], old[1]] and gone_on[1] != old[1]


def test_log_probabilities_are_of_all_raw_logits():
    """Neither the penalty nor the ids that are no tokens change what the network gave."""
    sampling = Sampling(temperature=0, repetition_penalty=2)
    plan = make_plan(sampling, log_probs=True)
    token, log_prob, _ = step(plan, remember(plan, ROWS, NUM_TOKENS, 8), 0, sampling)
    expected = LOGITS[[0, 1], token] - np.log(np.exp(LOGITS.astype("float64")).sum(-1))
    np.testing.assert_allclose(ops.convert_to_numpy(log_prob), expected, rtol=1e-5)


def test_a_row_of_which_no_token_is_left():
    def remove_all(token_ids, lengths, logits):
        return ops.where(lengths[:, None] == 1, float("-inf"), logits)

    plan = make_plan(GREEDY, logits_processors=[remove_all])
    token, _, _ = step(plan, remember(plan, ROWS, NUM_TOKENS, 8), 0)
    assert token == [5, NUM_TOKENS]
    with pytest.raises(NonFiniteError, match="row 4, new token 8: .* or none is left"):
        check_tokens(np.array([token]).T, NUM_TOKENS, 3, 7)
