"""Grouped-query attention against the definition in float64."""

import keras
import numpy as np
import pytest
from keras import ops

from kllama import backend
from kllama.core.attention import attention, rotate, scaled_dot_product
from kllama.core.masks import causal_mask
from tests import oracle

# (N, K, H): grouped, one key head, one head in all, no groups; head dims whose halves are odd too.
HEADS = [(4, 2, 8), (6, 2, 10), (4, 1, 6), (1, 1, 2), (3, 3, 14)]
PADDING = np.array(
    [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 0]], "int32"
)


def draw(num_heads, num_groups, head_dim, batch_size=4, num_queries=7, num_keys=7, seed=0):
    """Query (B, T, N, H), key and value (B, S, K, H)."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(batch_size, num_queries, num_heads, head_dim))
    key, value = rng.normal(size=(2, batch_size, num_keys, num_groups, head_dim))
    return [array.astype("float32") for array in (query, key, value)]


def build_mask(padding):
    padding_mask = ops.convert_to_tensor(padding)
    return causal_mask(padding_mask, padding_mask)


def run(arrays, mask=None, dtype="float32", **kwargs):
    """Run kllama's attention, and give float32 NumPy."""
    tensors = [ops.convert_to_tensor(array, dtype) for array in arrays]
    context = scaled_dot_product(*tensors, mask, **kwargs)
    assert keras.backend.standardize_dtype(context.dtype) == dtype
    return ops.convert_to_numpy(ops.cast(context, "float32"))


def as_mask(allowed):
    return ops.convert_to_tensor(allowed[:, None])


@pytest.fixture(params=["in_groups", *(["fused"] if backend.fused_attention is not None else [])])
def both_paths(request, monkeypatch):
    """Attention as `core` writes it out (for dropout, say), and as the framework does it where it does."""
    if request.param == "in_groups":
        monkeypatch.setattr(backend, "fused_attention", None)


@pytest.mark.usefixtures("both_paths")
class TestScaledDotProduct:
    @pytest.mark.parametrize("heads", HEADS)
    def test_causal(self, heads):
        arrays = draw(*heads)
        expected = oracle.attend(*arrays, oracle.allowed_keys(7, 7))
        assert oracle.relative_error(run(arrays, is_causal=True), expected) < 1e-6

    @pytest.mark.parametrize("heads", HEADS[:2])
    def test_no_mask_sees_everything(self, heads):
        arrays = draw(*heads, num_keys=5)
        expected = oracle.attend(*arrays, np.ones((1, 7, 5), bool))
        assert oracle.relative_error(run(arrays), expected) < 1e-6

    @pytest.mark.parametrize("heads", HEADS)
    def test_padding(self, heads):
        arrays = draw(*heads)
        mask = build_mask(PADDING)
        expected = oracle.attend(*arrays, oracle.allowed_keys(7, 7, PADDING))
        assert oracle.relative_error(run(arrays, mask), expected) < 1e-6

    def test_a_mask_says_everything(self):
        """With a mask the causal flag is ignored: here every key is allowed."""
        arrays = draw(4, 2, 8)
        allowed = np.ones((4, 7, 7), bool)
        expected = oracle.attend(*arrays, allowed)
        assert oracle.relative_error(run(arrays, as_mask(allowed), is_causal=True), expected) < 1e-6

    @pytest.mark.parametrize("heads", HEADS[1:3])
    def test_a_few_queries_among_more_keys(self, heads):
        arrays = draw(*heads, num_queries=2, num_keys=9)
        allowed = oracle.allowed_keys(2, 9, start=4)
        assert oracle.relative_error(run(arrays, as_mask(allowed)), oracle.attend(*arrays, allowed)) < 1e-6

    @pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.02), ("float16", 0.002)])
    @pytest.mark.parametrize("padding", [None, PADDING], ids=["causal", "padding"])
    def test_half_precision(self, dtype, tolerance, padding):
        arrays = draw(6, 2, 10)
        mask = None if padding is None else build_mask(padding)
        rounded = [ops.convert_to_numpy(ops.cast(ops.cast(array, dtype), "float32")) for array in arrays]
        expected = oracle.attend(*rounded, oracle.allowed_keys(7, 7, padding))
        assert oracle.relative_error(run(arrays, mask, dtype, is_causal=True), expected) < tolerance

    def test_softmax_of_many_keys_in_bfloat16(self):
        """300 equal probabilities add up to 1: a sum of ones in bfloat16 would stop at 256."""
        query = np.zeros((1, 1, 2, 4), "float32")
        key, value = np.ones((2, 1, 300, 1, 4), "float32")
        np.testing.assert_allclose(run([query, key, value], dtype="bfloat16"), 1, rtol=0.01)

    def test_large_scores(self):
        query, key, value = draw(4, 2, 8)
        arrays = [100 * query, 100 * key, value]
        expected = oracle.attend(*arrays, oracle.allowed_keys(7, 7))
        assert oracle.relative_error(run(arrays, is_causal=True), expected) < 1e-4

    def test_heads_are_read_in_groups(self):
        """Query head n reads key head n // G: 0 0 0 1 1 1, not 0 1 0 1 0 1."""
        query, key, value = draw(6, 2, 4)
        value[:, :, 0], value[:, :, 1] = 0, 1
        context = run([query, key, value], is_causal=True)
        np.testing.assert_allclose(context, np.broadcast_to(np.arange(6)[:, None] // 3, context.shape), atol=1e-6)

    def test_keys_are_read_in_groups(self):
        query, key, value = draw(6, 2, 4)
        other = key.copy()
        other[:, :, 1] += 1
        changed = run([query, key, value]) != run([query, other, value])
        assert changed.any(axis=(0, 1, 3)).tolist() == [False] * 3 + [True] * 3


def gradient(function, variable) -> np.ndarray:
    """The gradient of the sum of squares of `function(variable)`, on any backend."""

    def loss(value):
        return ops.sum(ops.square(ops.cast(function(value), "float32")))

    match keras.backend.backend():
        case "jax":
            import jax

            result = jax.grad(loss)(variable.value)
        case "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                total = loss(variable.value)
            result = tape.gradient(total, variable.value)
        case "torch":
            loss(variable.value).backward()
            result = variable.value.grad
    return ops.convert_to_numpy(ops.cast(result, "float32"))


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fully_padded_rows_are_finite(dtype):
    """N8, and gradients too."""
    arrays = draw(4, 2, 8)
    mask = build_mask(np.vstack([0 * PADDING[:1], PADDING[1:]]))
    assert np.isfinite(run(arrays, mask, dtype)).all()

    def attend(scale):
        return scaled_dot_product(*(ops.cast(array, dtype) * scale for array in arrays), mask)

    result = gradient(attend, keras.Variable(np.ones(8), dtype=dtype))
    assert np.isfinite(result).all() and np.abs(result).max() > 0


class TestRotate:
    @pytest.mark.parametrize("head_dim", [2, 6, 16])
    def test_against_complex_multiplication(self, head_dim):
        rng = np.random.default_rng(1)
        x = rng.normal(size=(2, 5, 3, head_dim)).astype("float32")
        frequencies = rng.uniform(0.01, 1, head_dim // 2)
        positions = np.array([0, 1, 3, 50, 200])
        angles = np.outer(positions, frequencies)[None, :, None]
        rotated = rotate(
            *(ops.convert_to_tensor(a, "float32") for a in (x, 1.2 * np.cos(angles), 1.2 * np.sin(angles)))
        )
        expected = oracle.rotate(x, positions, frequencies, 1.2)
        assert oracle.relative_error(ops.convert_to_numpy(rotated), expected) < 1e-6

    def test_quarter_turn(self):
        """(first half, second half) -> (-second half, first half)."""
        x = ops.convert_to_tensor(np.arange(1.0, 7).reshape(1, 1, 1, 6), "float32")
        rotated = rotate(x, ops.zeros((1, 1, 1, 3)), ops.ones((1, 1, 1, 3)))
        np.testing.assert_array_equal(ops.convert_to_numpy(rotated).ravel(), [-4, -5, -6, 1, 2, 3])

    def test_dtype(self):
        x, cos, sin = (ops.ones(shape, "bfloat16") for shape in ((1, 2, 3, 4), (1, 2, 1, 2), (1, 2, 1, 2)))
        assert keras.backend.standardize_dtype(rotate(x, cos, sin).dtype) == "bfloat16"


def test_attention_rotates_queries_and_keys_alone():
    """Project, rotate, attend, project; values are not rotated, and memory passes through."""
    seen = {}

    def attend(query, key, value):
        seen.update(query=query, key=key, value=value)
        return value + 1, "memory"

    x = ops.ones((1, 2, 4))
    zero, one = ops.zeros((1, 2, 1, 2)), ops.ones((1, 2, 1, 2))
    projections = [lambda x, factor=factor: factor * x[:, :, None] for factor in (2.0, 3.0, 5.0)]
    output, memory = attention(x, *projections, lambda context: 10 * context, (zero, one), attend)
    quarter_turn = np.array([-1, -1, 1, 1])
    for name, expected in {"query": 2 * quarter_turn, "key": 3 * quarter_turn, "value": 5 * np.ones(4)}.items():
        np.testing.assert_array_equal(ops.convert_to_numpy(seen[name])[0, 0, 0], expected)
    assert memory == "memory"
    np.testing.assert_array_equal(ops.convert_to_numpy(output), np.full((1, 2, 1, 4), 60))
