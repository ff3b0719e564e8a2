"""Kept caches: which one is found, when none is, and what is dropped."""

import threading

import keras
import numpy as np
import pytest

from kllama import backend
from kllama.generation.prefix_cache import Kept, PrefixCaches, count_common


def kept(token_ids, weights="now", num_slots=4) -> Kept:
    keys = np.zeros((1, num_slots, 2), "float32")
    return Kept(np.array(token_ids, "int32"), [(keys, keys)], weights)


def ids(*token_ids):
    return np.array(token_ids, "int32")


@pytest.mark.parametrize(
    ("first", "second", "count"), [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1], [2], 0), ([], [1], 0)]
)
def test_count_common(first, second, count):
    assert count_common(ids(*first), ids(*second)) == count_common(ids(*second), ids(*first)) == count


@pytest.mark.parametrize(
    ("held", "asked", "num_found"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3, 4], [1, 2, 3, 4], 3),  # the last one has to be read: its logits are wanted
        ([1, 2, 3, 4], [1, 2], 1),
        ([1, 2, 3, 9, 9], [1, 2, 3, 4], 3),  # an earlier message was edited
        ([1, 2], [1, 2, 3, 4, 5, 6], 2),  # all of it, although it is little
        ([1, 9, 9], [1, 2, 3], None),  # another conversation that begins with the same token
        ([7, 8, 9], [1, 2, 3], None),
        ([1, 2, 3], [1], None),
    ],
)
def test_what_is_found(held, asked, num_found):
    caches = PrefixCaches()
    caches.put(kept(held))
    found = caches.take(ids(*asked), "now")
    assert (found and found.token_ids.tolist()) == (num_found and held[:num_found])


def test_the_longest_one_is_taken_out():
    caches = PrefixCaches()
    caches.put(kept([1, 2, 3, 4]))
    caches.put(kept([1, 2, 3, 4, 5, 6]))
    asked = ids(1, 2, 3, 4, 5, 6, 7)
    assert [len(caches.take(asked, "now").token_ids) for _ in range(2)] == [6, 4]
    assert caches.take(asked, "now") is None


def test_what_other_weights_made_is_dropped():
    caches = PrefixCaches()
    caches.put(kept([1, 2, 3], "before"))
    assert caches.take(ids(1, 2, 3, 4), "now") is None
    assert caches.take(ids(1, 2, 3, 4), "before") is None


def test_room():
    size = kept([1, 2]).num_bytes
    assert size == 2 * 4 * 2 * 4
    caches = PrefixCaches(num_kept=2, max_bytes=3 * size)
    for first in (1, 2, 3):
        caches.put(kept([first, 5]))
    assert [caches.take(ids(first, 5, 6), "now") is not None for first in (1, 2, 3)] == [False, True, True]
    caches.put(kept([1, 5]))
    caches.put(kept([2, 5], num_slots=12))  # as large as is allowed, alone
    assert [caches.take(ids(first, 5, 6), "now") is not None for first in (1, 2)] == [False, True]
    caches.put(kept([1, 5], num_slots=13))
    assert caches.take(ids(1, 5, 6), "now") is None


def test_nothing_is_kept():
    caches = PrefixCaches(num_kept=2)
    for first in (1, 2):
        caches.put(kept([first, 5]))
    caches.limit(1)
    assert caches.take(ids(1, 5, 6), "now") is None
    caches.clear()
    assert caches.take(ids(2, 5, 6), "now") is None
    caches.limit(0)
    caches.put(kept([1, 5]))
    assert caches.take(ids(1, 5, 6), "now") is None


def test_no_two_threads_get_the_same_one():
    caches, taken = PrefixCaches(num_kept=8), []
    for _ in range(8):
        caches.put(kept([1, 2, 3]))

    def work():
        while (found := caches.take(ids(1, 2, 3, 4), "now")) is not None:
            taken.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 8


def flip_signs(array):
    return -array


def swap_two(array):
    array = array.copy()
    array.reshape(-1)[[0, 1]] = array.reshape(-1)[[1, 0]]
    return array


def change_one_bit(array):
    array = array.copy()
    array.reshape(-1).view(f"uint{8 * array.itemsize}")[3] ^= 1
    return array


@pytest.mark.parametrize("change", [flip_signs, swap_two, change_one_bit])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float64"])
def test_the_state_of_variables_sees_every_change(change, dtype):
    values = np.random.default_rng(1).integers(-99, 99, (6, 4))
    variables = [keras.Variable(x, dtype=dtype, trainable=False) for x in (values, np.ones(3))]
    state = backend.variables_state(variables)
    assert state == backend.variables_state(variables)
    variables[0].assign(change(keras.ops.convert_to_numpy(variables[0].value)))
    assert state != backend.variables_state(variables)
    assert state != backend.variables_state(variables[:1])


@pytest.mark.only_on("torch")
def test_the_state_of_variables_sees_what_pytorch_does_not_count():
    variable = keras.Variable(np.arange(6.0).reshape(2, 3))
    state = backend.variables_state([variable])
    version = variable.value._version
    variable.value.data.add_(1.0)
    assert variable.value._version == version and state != backend.variables_state([variable])


@pytest.mark.only_on("torch")
@pytest.mark.parametrize("rows", [[0, 2, 1, 3], [3, 2, 1, 0], [2, 3, 0, 1]])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_state_of_variables_sees_another_order(is_transposed, dtype, rows):
    variable = keras.Variable([[1.0, 7.0], [1.0, -7.0], [2.0, 0.0], [2.0, -0.0]], dtype=dtype)
    if is_transposed:
        variable.value.data = variable.value.data.T.contiguous().T
    state = backend.variables_state([variable])
    variable.value.data[:] = variable.value.data[rows]
    assert state != backend.variables_state([variable])
    variable.value.data[:] = variable.value.data[np.argsort(rows).tolist()]
    assert state == backend.variables_state([variable])


@pytest.mark.only_on("torch")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_state_of_variables_sees_other_signs(dtype):
    variable = keras.Variable(np.arange(8.0), dtype=dtype)
    state = backend.variables_state([variable])
    variable.value.data.neg_()
    assert state != backend.variables_state([variable])


@pytest.mark.only_on("torch")
def test_the_state_of_variables_copies_no_transposed_kernel():
    from torch.profiler import profile

    variable = keras.Variable(np.ones((1024, 2048), "float32"))
    variable.value.data = variable.value.data.T.contiguous().T
    backend.variables_state([variable])
    with profile(profile_memory=True) as run:
        backend.variables_state([variable])
    largest = max(event.self_cpu_memory_usage for event in run.events())
    assert 0 < largest < 4 * 1024 * 2048
