"""The primitives on TensorFlow."""

import contextlib

import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.python.xla import dynamic_update_slice

__all__ = [
    "RUNS_AHEAD",
    "apply_in_float32",
    "arange",
    "argmax",
    "cache_dtype",
    "cast",
    "compile_function",
    "concatenate",
    "concrete",
    "constant",
    "cos",
    "cumsum",
    "einsum",
    "exp",
    "first_true",
    "full",
    "fused_attention",
    "grow_slots",
    "keep_variables",
    "linear",
    "matmul_float32",
    "maximum",
    "one_program",
    "reduce_all",
    "reduce_any",
    "reduce_max",
    "reduce_sum",
    "repeat_axis",
    "reshape",
    "rms_normalize",
    "run_while",
    "shape",
    "sin",
    "slot_attention",
    "softmax",
    "synchronize",
    "take_last",
    "take_rows",
    "transpose",
    "where",
    "write_slots",
]

RUNS_AHEAD = False
"""Whether calls return before they are computed; here a call ends when its program has."""

cos, sin, exp, where, maximum, cast = tf.cos, tf.sin, tf.exp, tf.where, tf.maximum, tf.cast
einsum, softmax, concatenate, reshape = tf.einsum, tf.nn.softmax, tf.concat, tf.reshape
transpose, cumsum = tf.transpose, tf.cumsum
reduce_max, reduce_sum, reduce_all, reduce_any = tf.reduce_max, tf.reduce_sum, tf.reduce_all, tf.reduce_any

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


def argmax(x):
    """Give the first index of the largest element along the last axis, int32; the size of that axis for NaN."""
    return first_true(tf.equal(x, tf.reduce_max(x, -1, keepdims=True)))


def first_true(x):
    """Give the first index along the last axis where bool `x` is True, int32; else the size of that axis."""
    # Two reductions that XLA vectorises: its argmax for CPUs takes ten times as long.
    size = x.shape[-1]
    return tf.reduce_min(tf.where(x, tf.range(size), size), -1)


def full(shape, value, dtype, like):
    """Give a tensor of one value on the device of `like`."""
    del like
    return tf.fill(shape, tf.cast(value, dtype))


def take_last(x, lengths):
    """Give the rows' last real entries: (B, T, D), int32 (B,) -> (B, D)."""
    return tf.gather(x, lengths - 1, axis=1, batch_dims=1)


def repeat_axis(x, count: int, axis: int):
    """Repeat each entry along an axis `count` times, one after another."""
    return tf.repeat(x, count, axis)


def take_rows(table, ids):
    """Give the rows of a table (V, D) at int32 ids (B, T): (B, T, D)."""
    return tf.gather(table, ids)


def linear(x, kernel, bias=None):
    """Multiply (..., D) by (D, F), accumulated in float32 and rounded to x's dtype, and add a bias (F,)."""
    rows = tf.reshape(x, (-1, x.shape[-1]))
    product = tf.reshape(tf.matmul(rows, kernel), (*shape(x)[:-1], kernel.shape[-1]))
    return product if bias is None else product + bias


def cache_dtype(dtype: str) -> str:
    """Give the dtype in which keys and values of some dtype are kept for later steps."""
    return dtype


def write_slots(cache, new, start):
    """Write new entries (R, T, H) into a cache (R, S, H) at the slots `start` to `start + T - 1`, in place."""
    return dynamic_update_slice(cache, tf.cast(new, cache.dtype), tf.stack([0, start, 0]))


def grow_slots(cache, num_slots: int):
    """Give a cache (R, S, H) more slots, of zeros."""
    return tf.pad(cache, ((0, 0), (0, num_slots - cache.shape[1]), (0, 0)))


def slot_attention(query, keys, values, visible):
    """Attend to cached slots in float32, scaled by H ** -0.5.

    Args:
        query: (B, K, Q, H).
        keys: (B * K, S, H), of any dtype.
        values: (B * K, S, H), of any dtype.
        visible: bool (1 or B, 1, 1 or Q, S), True where a query may see a slot.

    Returns:
        Context (B, K, Q, H) in query's dtype.
    """
    rows, num_slots, head_dim = keys.shape
    heads, keys, values = (tf.cast(x, "float32") for x in (tf.reshape(query, (rows, -1, head_dim)), keys, values))
    scores = tf.matmul(heads, keys, transpose_b=True) * head_dim**-0.5
    scores = tf.where(visible, tf.reshape(scores, (*query.shape[:3], num_slots)), -1e30)
    probabilities = tf.reshape(tf.nn.softmax(scores, -1), (rows, -1, num_slots))
    return tf.cast(tf.reshape(tf.matmul(probabilities, values), query.shape), query.dtype)


def run_while(is_running, step, state):
    """Give the state after `state = step(state)` was done for as long as `is_running(state)`."""
    return tf.while_loop(lambda *state: is_running(state[0]), lambda *state: (step(state[0]),), (state,))[0]


def compile_function(function, variables, *, donates: bool = False, is_eager: bool = False, jit_compile: bool = True):
    """Compile `function(*arrays)`, which reads Keras variables.

    Args:
        function: a pure function of nested arrays, traced once for each set of shapes.
        variables: the `keras.Variable`s that it reads. Their values at each call are used, never those at compilation.
        donates: whether the first argument may be used up; TensorFlow cannot, and never does.
        is_eager: whether to leave it as it is, so that it can be debugged.
        jit_compile: whether to compile it with XLA.
    """
    del variables, donates  # A tf.function reads its variables at each call.
    return (
        function
        if is_eager
        else tf.function(function, jit_compile=jit_compile, reduce_retracing=False, autograph=False)
    )


def synchronize(model) -> None:
    """Give the variables of a model that is being trained their current values; here they always have them."""


def keep_variables(model):
    """Give a context in which a model keeps its variables; here Keras never takes them away."""
    del model
    return contextlib.nullcontext()
