"""What stands beside attention: normalization, activations, the feed-forward network, and how they are joined."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from kllama.core.activations import ACTIVATIONS, get_activation
from kllama.core.decoder_block import decoder_block
from kllama.core.feed_forward import feed_forward
from kllama.core.normalization import rms_norm
from tests import oracle


def numpy(x):
    """Give float32 NumPy."""
    return ops.convert_to_numpy(ops.cast(x, "float32"))


class TestRMSNorm:
    @pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 33)])
    @pytest.mark.parametrize("epsilon", [1e-6, 0.1])
    def test_float32(self, shape, epsilon):
        rng = np.random.default_rng(0)
        x, scale = rng.normal(size=shape).astype("float32"), rng.normal(size=shape[-1:]).astype("float32")
        got = rms_norm(ops.convert_to_tensor(x), ops.convert_to_tensor(scale), epsilon)
        assert oracle.relative_error(numpy(got), oracle.rms_norm(x, scale, epsilon)) < 1e-6

    @pytest.mark.parametrize("size", [1e-4, 1e4])
    def test_epsilon_is_added_to_the_mean_square(self, size):
        x, ones = ops.full((2, 8), size), ops.ones((8,))
        np.testing.assert_allclose(numpy(rms_norm(x, ones, 1e-5)), size / np.sqrt(size**2 + 1e-5), rtol=1e-6)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_is_rounded_before_the_gain(self, dtype):
        """transformers' order: normalize in float32, round, multiply. Rounding once, at the end, gives other bits."""
        rng = np.random.default_rng(0)
        half = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
        x, scale = rng.normal(size=(64, 33)).astype(half), rng.normal(1, 0.3, 33).astype(half)
        got = rms_norm(*(ops.convert_to_tensor(a.astype("float32"), dtype) for a in (x, scale)), 1e-6)
        assert keras.backend.standardize_dtype(got.dtype) == dtype
        normalized = oracle.rms_norm(x.astype("float64"), 1.0, 1e-6)
        first = normalized.astype(half) * scale
        last = (normalized * scale.astype("float64")).astype(half)
        assert (numpy(got) == first.astype("float32")).mean() > 0.99
        assert (numpy(got) == last.astype("float32")).mean() < 0.9

    def test_mean_square_does_not_overflow(self):
        x = ops.full((1, 8), 300.0, "float16")  # 300 ** 2 is past float16's largest number
        np.testing.assert_allclose(numpy(rms_norm(x, ops.ones((8,), "float16"), 1e-6)), 1, rtol=1e-3)


X = np.linspace(-8, 8, 101)
DEFINITIONS = {
    **oracle.ACTIVATIONS,
    "swish": oracle.ACTIVATIONS["silu"],
    "gelu_fast": oracle.ACTIVATIONS["gelu_new"],
    "gelu_pytorch_tanh": oracle.ACTIVATIONS["gelu_new"],
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


class TestActivations:
    def test_every_one_is_tested(self):
        assert set(DEFINITIONS) == set(ACTIVATIONS)

    @pytest.mark.parametrize("name", DEFINITIONS)
    def test_definition(self, name):
        got = numpy(get_activation(name)(ops.convert_to_tensor(X, "float32")))
        np.testing.assert_allclose(got, DEFINITIONS[name](X), rtol=1e-5, atol=1e-6)

    def test_tanh_and_erf_gelu_differ(self):
        gelu, gelu_new = (
            numpy(get_activation(name)(ops.convert_to_tensor(X, "float32"))) for name in ("gelu", "gelu_new")
        )
        assert np.abs(gelu - gelu_new).max() > 1e-4

    @pytest.mark.parametrize("name", DEFINITIONS)
    def test_transformers_means_the_same_by_the_name(self, name):
        transformers = pytest.importorskip("transformers.activations", reason="transformers is not installed")
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        expected = transformers.ACT2FN[name](torch.tensor(X, dtype=torch.float64)).numpy()
        np.testing.assert_allclose(DEFINITIONS[name](X), expected, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("name", ["SiLU", "gelu_10", "", "silu ", None, ["silu"], np.tanh])
    def test_unknown_name(self, name):
        with pytest.raises(ValueError, match="activation") as caught:
            get_activation(name)
        assert repr(name) in str(caught.value) and "'silu'" in str(caught.value)


class TestFeedForward:
    @pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
    def test_activation_is_on_the_gate(self, activation):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, 3, 4))
        kernels = [rng.normal(size=shape) for shape in ((4, 6), (4, 6), (6, 4))]
        in_numpy = [lambda x, kernel=kernel: x @ kernel for kernel in kernels]
        in_keras = [
            lambda x, kernel=kernel: ops.matmul(x, ops.convert_to_tensor(kernel, "float32")) for kernel in kernels
        ]
        got = feed_forward(ops.convert_to_tensor(x, "float32"), *in_keras, activation=get_activation(activation))
        assert oracle.relative_error(numpy(got), oracle.feed_forward(x, *in_numpy, activation)) < 1e-6

    @pytest.mark.parametrize("name", ["silu", "gelu"])
    def test_activation_is_rounded_once(self, name):
        """In bfloat16 the result is the float32 one rounded; steps in bfloat16 would often miss it."""
        x = np.random.default_rng(3).normal(0, 2, (1, 100, 50)).astype(ml_dtypes.bfloat16).astype("float32")

        def identity(x):
            return x

        def run(dtype):
            gate = ops.convert_to_tensor(x, dtype)
            output = feed_forward(gate, identity, ops.ones_like, identity, get_activation(name))
            assert keras.backend.standardize_dtype(output.dtype) == dtype
            return numpy(ops.cast(output, "float32"))

        expected = run("float32").astype(ml_dtypes.bfloat16).astype("float32")
        assert np.mean(run("bfloat16") != expected) < 0.01


def test_decoder_block_adds_twice():
    """x + attention(norm(x)), then that + feed_forward(norm(that)); memory passes through."""
    x = ops.full((1, 1, 1), 2.0)
    output, memory = decoder_block(
        x,
        attention_norm=lambda x: 10 * x,
        attention=lambda x: (x + 1, "memory"),
        feed_forward_norm=lambda x: 100 * x,
        feed_forward=lambda x: x + 3,
    )
    assert memory == "memory"
    assert float(numpy(output).item()) == 23 + 2303
