"""Rows of ids, cut and padded."""

import numpy as np
import pytest

from kllama.text.rows import Row, cut, pad

pytestmark = pytest.mark.backend_independent

REPLY = Row([9, 1, 2, 3, 4, 8], [False, False, False, True, True, True], num_start=1, num_end=1)


@pytest.mark.parametrize(
    "side, width, ids, counts",
    [
        ("right", 6, [9, 1, 2, 3, 4, 8], [0, 0, 0, 1, 1, 1]),
        ("right", 5, [9, 1, 2, 3, 8], [0, 0, 0, 1, 1]),
        ("right", 4, [9, 1, 2, 8], [0, 0, 0, 0]),  # the end of a prompt is not to be learnt
        ("right", 2, [9, 8], [0, 0]),
        ("left", 5, [9, 2, 3, 4, 8], [0, 0, 1, 1, 1]),
        ("left", 2, [9, 8], [0, 1]),
        ("left", 1, [9], [0]),
    ],
)
def test_cut(side, width, ids, counts):
    row = cut(REPLY, width, side)
    assert row.ids == ids and row.counts == [bool(count) for count in counts]


def test_cut_without_start_and_end():
    row = Row([1, 2, 3], [True] * 3)
    assert cut(row, 2, "right").ids == [1, 2] and cut(row, 2, "left").ids == [2, 3]


def test_pad():
    ids, mask, counts = pad([Row([5, 6], [False, True]), Row([], []), Row([7], [True])], 3, pad_id=4)
    assert ids.tolist() == [[5, 6, 4], [4, 4, 4], [7, 4, 4]] and ids.dtype == "int32"
    assert mask.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0]] and mask.dtype == bool
    assert counts.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]] and counts.dtype == bool
    assert all(array.shape == (0, 3) for array in pad([], 3, 0))


def test_cut_leaves_its_row_alone():
    before = Row(list(REPLY.ids), list(REPLY.counts), 1, 1)
    cut(REPLY, 3, "left"), cut(REPLY, 3, "right")
    assert before == REPLY and np.all(before.ids == REPLY.ids)
