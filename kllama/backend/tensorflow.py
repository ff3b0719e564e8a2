"""The primitives on TensorFlow."""

import contextlib

import numpy as np
import tensorflow as tf

__all__ = [
    "apply_in_float32",
    "arange",
    "cast",
    "compile_function",
    "concatenate",
    "concrete",
    "constant",
    "cos",
    "einsum",
    "fused_attention",
    "keep_variables",
    "matmul_float32",
    "maximum",
    "one_program",
    "reduce_max",
    "reshape",
    "rms_normalize",
    "shape",
    "sin",
    "softmax",
    "synchronize",
    "uniform",
    "where",
]

cos, sin, where, maximum, cast = tf.cos, tf.sin, tf.where, tf.maximum, tf.cast
einsum, softmax, concatenate, reshape = tf.einsum, tf.nn.softmax, tf.concat, tf.reshape
reduce_max = tf.reduce_max

# TensorFlow has no fused attention with grouped heads (and `keras.ops.dot_product_attention` fails on one key/value
# head), so `core/attention.py` takes its own path here.
fused_attention = None


def one_program(*static: str):
    """Leave a function as it is: operations that run one by one are compiled already."""
    del static
    return lambda function: function


def constant(array: np.ndarray, like):
    """Put a NumPy array on the device of `like`."""
    del like  # TensorFlow moves constants to where they are used.
    return tf.constant(array)


def arange(length, like):
    """Count 0, 1, ..., `length` - 1 as int32 on the device of `like`."""
    del like
    return tf.range(length, dtype="int32")


def shape(x) -> tuple:
    """Give the sizes of `x`: integers, or scalars of the framework where a size is not static."""
    sizes = tf.shape(x)
    return tuple(sizes[axis] if size is None else size for axis, size in enumerate(x.shape))


def apply_in_float32(function, x):
    """Give the float32 result of an elementwise function in x's dtype."""
    return tf.cast(function(tf.cast(x, "float32")), x.dtype)


def rms_normalize(x, epsilon: float):
    """Divide `x` (..., D) by the root of its mean square over the last axis, in float32."""
    x = tf.cast(x, "float32")
    return x * tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + epsilon)


def matmul_float32(x, kernel, transpose: bool = False):
    """Multiply (..., D) by (D, V), or by the transpose of (V, D), accumulated and returned in float32.

    The transpose itself is not made: of an embedding table, it would be one of the largest arrays of a model.
    """
    # Rounded once to a half-precision x's dtype before it is widened; a wider result type has no gradient here.
    return tf.cast(tf.matmul(x, kernel, transpose_b=transpose), "float32")


def concrete(x) -> np.ndarray | None:
    """Give the values of `x`, or None while a program is being traced and there are none yet."""
    return x.numpy() if tf.is_tensor(x) and hasattr(x, "numpy") else None


def uniform(seed, step, size: tuple[int, ...], like):
    """Draw float32 numbers in [0, 1) that depend on `seed` (int32 scalar), `step` (int32 scalar) and `size` alone."""
    del like
    return tf.random.stateless_uniform(size, seed=tf.stack([seed, step]))


def compile_function(function, variables, *, is_eager: bool = False, jit_compile: bool = True):
    """Compile `function(*arrays)`, which reads Keras variables.

    Args:
        function: a pure function of nested arrays, traced once for each set of shapes.
        variables: the `keras.Variable`s that it reads. Their values at each call are used, never those at compilation.
        is_eager: whether to leave it as it is, so that it can be debugged.
        jit_compile: whether to compile it with XLA.
    """
    del variables  # A tf.function reads its variables at each call.
    return function if is_eager else tf.function(function, jit_compile=jit_compile, reduce_retracing=False)


def synchronize(model) -> None:
    """Give the variables of a model that is being trained their current values; here they always have them."""


def keep_variables(model):
    """Give a context in which a model keeps its variables; here Keras never takes them away."""
    del model
    return contextlib.nullcontext()
