"""The activations of the feed-forward gate, by the names that Llama configs use (Hugging Face's `hidden_act`)."""

from collections.abc import Callable

import keras


def _gelu_tanh(x):
    return keras.ops.gelu(x, approximate=True)


def _gelu_erf(x):
    return keras.ops.gelu(x, approximate=False)


def _quick_gelu(x):
    return x * keras.ops.sigmoid(1.702 * x)


def _relu_squared(x):
    return keras.ops.square(keras.ops.relu(x))


ACTIVATIONS: dict[str, Callable] = {
    "gelu": _gelu_erf,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "leaky_relu": lambda x: keras.ops.leaky_relu(x, negative_slope=0.01),
    "linear": lambda x: x,
    "mish": keras.activations.mish,
    "quick_gelu": _quick_gelu,
    "relu": keras.ops.relu,
    "relu2": _relu_squared,
    "relu6": keras.ops.relu6,
    "sigmoid": keras.ops.sigmoid,
    "silu": keras.ops.silu,
    "swish": keras.ops.silu,
    "tanh": keras.ops.tanh,
}


def get_activation(name: str) -> Callable:
    """Give the activation function of a name.

    Args:
        name: one of `ACTIVATIONS`; they mean what they mean in transformers (`gelu` is the exact, `gelu_new` and
            `gelu_pytorch_tanh` the tanh form).

    Returns:
        Function of one tensor.

    Raises:
        ValueError: for an unknown name.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation ({name!r}) must be one of {sorted(ACTIVATIONS)}.")
    return ACTIVATIONS[name]
