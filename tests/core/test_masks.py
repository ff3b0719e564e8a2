"""Who may see whom: the masks, entry by entry."""

import numpy as np
import pytest
from keras import ops

from kllama.core.masks import cached_causal_mask, causal_mask
from tests import oracle

ROWS = {
    "none": [1, 1, 1, 1, 1],
    "right": [1, 1, 1, 0, 0],
    "left": [0, 0, 1, 1, 1],
    "both": [0, 1, 1, 1, 0],
    "hole": [1, 0, 1, 0, 1],
    "all": [0, 0, 0, 0, 0],
}


def build(rows, dtype="int32", window=None):
    """Run kllama's, and give NumPy or None."""
    padding_mask = ops.convert_to_tensor(np.array(rows), dtype)
    mask = causal_mask(padding_mask, padding_mask, window)
    return None if mask is None else ops.convert_to_numpy(mask)


def test_worked_example():
    """The rows of the module's docstring."""
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    mask = build([[0, 1, 1, 1]])
    assert mask.dtype == bool and mask.shape == (1, 1, 4, 4)
    np.testing.assert_array_equal(mask[0, 0], expected)


@pytest.mark.parametrize("dtype", ["int32", "bool", "float32"])
def test_every_kind_of_padding(dtype):
    rows = list(ROWS.values())
    mask = build(rows, dtype)
    assert mask.shape == (len(rows), 1, 5, 5)
    np.testing.assert_array_equal(mask[:, 0], oracle.allowed_keys(5, 5, rows))


@pytest.mark.parametrize("kind", ROWS)
def test_only_right_padding_needs_no_mask(kind):
    """Nothing real comes after a pad there, so the causal flag alone says it all."""
    assert (build([ROWS["none"], ROWS[kind]]) is None) == (kind in ("none", "right", "all"))


def test_no_padding_mask():
    assert causal_mask(ops.ones((1, 3))) is None


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_window(window):
    rows = list(ROWS.values())
    np.testing.assert_array_equal(build(rows, window=window)[:, 0], oracle.allowed_keys(5, 5, rows, window=window))
    mask = causal_mask(ops.ones((2, 5)), window=window)
    np.testing.assert_array_equal(ops.convert_to_numpy(mask)[:, 0], oracle.allowed_keys(5, 5, window=window))


def test_a_window_as_long_as_the_sequence_needs_no_mask():
    assert causal_mask(ops.ones((2, 5)), window=5) is None


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("start, num_queries, num_slots", [(0, 5, 5), (0, 3, 7), (4, 1, 7), (2, 3, 7), (6, 1, 7)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_cached(start, num_queries, num_slots, as_tensor, window):
    queries = ops.zeros((2, num_queries), "int32")
    first = ops.convert_to_tensor(np.int32(start)) if as_tensor else start
    mask = cached_causal_mask(queries, num_slots, first, window)
    mask = ops.convert_to_numpy(mask)
    assert mask.dtype == bool and mask.shape == (1, 1, num_queries, num_slots)
    expected = oracle.allowed_keys(num_queries, num_slots, start=start, window=window or 99)
    np.testing.assert_array_equal(mask[:, 0], expected)
