"""The random numbers of sampling: the same however they are cut, others for another seed, row or token."""

import numpy as np

from kllama.generation.noise import uniform_numbers


def test_a_stream_is_the_same_however_it_is_cut():
    whole = uniform_numbers(3, range(4), 0, 40)
    parts = [uniform_numbers(3, range(4), start, count) for start, count in ((0, 1), (1, 6), (7, 30), (37, 3))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    np.testing.assert_array_equal(uniform_numbers(3, [2], 0, 40), whole[2:3])


def test_seeds_and_rows_have_streams_of_their_own():
    numbers = np.stack([uniform_numbers(seed, range(5), 0, 100) for seed in (0, 1, 2**31 - 1, 2**63)])
    assert len(np.unique(numbers)) > 0.999 * numbers.size


def test_numbers_are_uniform_and_stay_below_one():
    numbers = uniform_numbers(7, range(8), 5, 20_000)
    assert numbers.shape == (8, 20_000) and numbers.dtype == "float32"
    assert 0 <= numbers.min() and numbers.max() < 1
    steps = numbers.astype("float64") * 2**23
    np.testing.assert_array_equal(steps, np.round(steps))
    counts = np.bincount((numbers.ravel() * 100).astype(int), minlength=100)
    # 99 degrees of freedom: a larger statistic has a probability of 0.001.
    assert np.square(counts - 1600).sum() / 1600 < 148.2
