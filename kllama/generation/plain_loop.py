"""The plain decoding loop: one token after another, every row at the same position.

Simple on purpose: it is what faster loops are compared with. Row b of a ragged batch writes its own prompt until that
is used up:

    lengths 2 and 4      position     0  1  2  3  4  5
                         row 0        a  b  x0 x1 x2 x3
                         row 1        c  d  e  f  y0 y1
                         index           ^ starts here: the shortest prompt

Pure functions over arrays; knows no layers and no text. Called by `models/continuation.py`, inside one compiled program
on JAX and TensorFlow.
"""

from collections.abc import Callable

from keras import ops

from kllama import backend


def decode(step: Callable, choose: Callable, token_ids, cache, lengths, limits, stop_token_ids, memory=()) -> tuple:
    """Continue each row until a stop token or its limit.

    Args:
        step: function (token ids (B, 1), cache, index) -> (logits (B, V), cache), where `index` is the position of
            those tokens.
        choose: function (logits (B, V), position, memory) -> (int32 (B,), float32 (B,), memory): the tokens at that
            position, and a number for each that is to be noted.
        token_ids: int32 (B, S), the prompts, padded on the right.
        cache: what `step` takes, filled for the prompts.
        lengths: int32 (B,), the prompts' lengths, at least 1.
        limits: int32 (B,), the length at which each row ends, at most S.
        stop_token_ids: int32 (any number,): a row ends with the first of them that it writes.
        memory: what `choose` takes first.

    Returns:
        `(token_ids (B, S), lengths (B,), numbers (B, S), memory)`: the rows with what was written, their lengths, stop
        token included, what was noted of each token written, and the last memory.
    """

    def is_running(state):
        _, _, index, ends, _, _ = state
        return ops.any(index < ends)

    def write_one(state):
        token_ids, cache, index, ends, numbers, memory = state
        logits, cache = step(_column(token_ids, index - 1), cache, index - 1)
        given = _column(token_ids, index)[:, 0]
        is_written = (index >= lengths) & (index < ends)
        chosen, number, memory = choose(logits, index, memory)
        token = ops.where(is_written, chosen, given)
        token_ids = ops.slice_update(token_ids, (0, index), token[:, None])
        number = ops.where(is_written, number, float("nan"))
        numbers = ops.slice_update(numbers, (0, index), number[:, None])
        has_stopped = is_written & ops.any(ops.equal(token[:, None], stop_token_ids[None]), axis=-1)
        return token_ids, cache, index + 1, ops.where(has_stopped, index + 1, ends), numbers, memory

    ends = ops.maximum(limits, lengths)
    numbers = ops.full(token_ids.shape, float("nan"), "float32")
    state = (token_ids, cache, ops.min(lengths), ends, numbers, memory)
    token_ids, _, _, ends, numbers, memory = backend.run_while(is_running, write_one, state)
    return token_ids, ends, numbers, memory


def _column(token_ids, index):
    return ops.slice(token_ids, (0, index), (token_ids.shape[0], 1))


def bucket(length: int) -> int:
    """Round a length up to the next of 16, 32, 64, ..., so that nearby lengths share one compiled program."""
    return max(16, 1 << (length - 1).bit_length())
