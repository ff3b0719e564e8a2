"""The plain decoding loop: one token after another, every row at the same position.

Simple on purpose: it is what faster loops are compared with. Row b of a ragged batch writes its own prompt until that
is used up:

    lengths 2 and 4      position     0  1  2  3  4  5
                         row 0        a  b  x0 x1 x2 x3
                         row 1        c  d  e  f  y0 y1
                         index           ^ starts here: the shortest prompt

Pure functions over arrays; knows no layers and no text. Called by `models/llama_causal_lm.py`, inside one compiled
program on JAX and TensorFlow.
"""

from collections.abc import Callable

from keras import ops


def decode(step: Callable, choose: Callable, token_ids, cache, lengths, limits, stop_token_ids) -> tuple:
    """Continue each row until a stop token or its limit.

    Args:
        step: function (token ids (B, 1), cache, index) -> (logits (B, V), cache), where `index` is the position of
            those tokens.
        choose: function (logits (B, V), position) -> int32 (B,).
        token_ids: int32 (B, S), the prompts, padded on the right.
        cache: what `step` takes, filled for the prompts.
        lengths: int32 (B,), the prompts' lengths, at least 1.
        limits: int32 (B,), the length at which each row ends, at most S.
        stop_token_ids: int32 (any number,): a row ends with the first of them that it writes.

    Returns:
        `(token_ids (B, S), lengths (B,))`: the rows with what was written, and their lengths, stop token included.
    """

    def is_running(token_ids, cache, index, ends):
        return ops.any(index < ends)

    def write_one(token_ids, cache, index, ends):
        logits, cache = step(_column(token_ids, index - 1), cache, index - 1)
        given = _column(token_ids, index)[:, 0]
        is_written = (index >= lengths) & (index < ends)
        token = ops.where(is_written, choose(logits, index), given)
        token_ids = ops.slice_update(token_ids, (0, index), token[:, None])
        has_stopped = is_written & ops.any(ops.equal(token[:, None], stop_token_ids[None]), axis=-1)
        return token_ids, cache, index + 1, ops.where(has_stopped, index + 1, ends)

    ends = ops.maximum(limits, lengths)
    state = (token_ids, cache, ops.min(lengths), ends)
    token_ids, _, _, ends = ops.while_loop(is_running, write_one, state)
    return token_ids, ends


def _column(token_ids, index):
    return ops.slice(token_ids, (0, index), (token_ids.shape[0], 1))


def bucket(length: int) -> int:
    """Round a length up to the next of 16, 32, 64, ..., so that nearby lengths share one compiled program."""
    return max(16, 1 << (length - 1).bit_length())
