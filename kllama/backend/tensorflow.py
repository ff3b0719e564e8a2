"""The primitives on TensorFlow."""

import contextlib
import functools
import math
import sys

import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.python.xla import dynamic_update_slice, optimization_barrier
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from kllama.backend.host import host_memory

__all__ = [
    "RUNS_AHEAD",
    "apply_in_float32",
    "apply_to_rows",
    "arange",
    "argmax",
    "cache_dtype",
    "cast",
    "compile_function",
    "concatenate",
    "concrete",
    "constant",
    "cos",
    "cross_entropy",
    "cumsum",
    "device_memory",
    "einsum",
    "exp",
    "first_true",
    "full",
    "fused_attention",
    "grow_slots",
    "keep_variables",
    "kth_largest",
    "linear",
    "log",
    "matmul_float32",
    "matmul_int32",
    "maximum",
    "minimum",
    "one_program",
    "reduce_all",
    "reduce_any",
    "reduce_max",
    "reduce_sum",
    "repeat_axis",
    "reshape",
    "rms_normalize",
    "round",
    "run_steps",
    "run_while",
    "scan",
    "shape",
    "sin",
    "slot_attention",
    "smallest_kept",
    "softmax",
    "synchronize",
    "take_last",
    "take_rows",
    "transpose",
    "variables_state",
    "where",
    "write_slots",
]

RUNS_AHEAD = False
"""Whether calls return before they are computed; here a call ends when its program has."""

cos, sin, exp, log, where, cast = tf.cos, tf.sin, tf.exp, tf.math.log, tf.where, tf.cast
maximum, minimum, round = tf.maximum, tf.minimum, tf.round
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

    @tf.custom_gradient  # A wider result type has no gradient of TensorFlow's own.
    def multiply(x, kernel):
        def gradient(upstream):
            with tf.GradientTape() as tape:
                tape.watch((x, kernel))
                product = tf.cast(tf.matmul(x, kernel, transpose_b=transpose), "float32")
            return tape.gradient(product, (x, kernel), upstream)

        return tf.cast(_product(x, kernel, transpose), "float32"), gradient

    return multiply(x, kernel)


def matmul_int32(x, kernel, transpose: bool = False):
    """Multiply int8 (..., D) by int8 (D, F), or by the transpose of (F, D): exact int32 sums."""

    def multiply(x):
        return tf.matmul(x, kernel, transpose_b=transpose, output_type=tf.int32)

    return apply_to_rows(multiply, x, len(x.shape) - 1)


def cross_entropy(logits, labels):
    """Compare logits float32 (M, V), which are used up, with labels int32 (M,).

    Returns:
        `(losses float32 (M,) in nats, bool (M,) whether the label's logit is the first of the largest, gradient of each
        loss by its logits float32 (M, V))`.
    """
    largest = tf.reduce_max(logits, -1, keepdims=True)
    exponentials = tf.exp(logits - largest)
    normalizer = tf.reduce_sum(exponentials, -1, keepdims=True)
    is_label = tf.range(logits.shape[-1], dtype="int32")[None] == labels[:, None]
    of_label = tf.reduce_sum(tf.where(is_label, logits - largest, 0.0), -1)
    slope = exponentials / normalizer - tf.cast(is_label, "float32")
    return tf.math.log(normalizer[:, 0]) - of_label, argmax(logits) == labels, slope


def scan(function, carry, xs: tuple) -> tuple:
    """Give `(carry, ys)` after `carry, y = function(carry, x)` was done for each x, in order.

    Args:
        function: function (carry, tuple of arrays) -> (carry, float32 array).
        carry: nested arrays.
        xs: tuple of arrays (n, ...).

    Returns:
        The last carry, and the arrays that were given, (n, ...).
    """
    length = tf.shape(xs[0])[0]
    ys = tf.TensorArray("float32", length)

    def step(index, carry, ys):
        carry, y = function(carry, tuple(x[index] for x in xs))
        return index + 1, carry, ys.write(index, y)

    _, carry, ys = tf.while_loop(lambda index, *_: index < length, step, (0, carry, ys), maximum_iterations=length)
    return carry, ys.stack()


def concrete(x) -> np.ndarray | None:
    """Give the values of `x`, or None while a program is being traced and there are none yet."""
    return x.numpy() if tf.is_tensor(x) and hasattr(x, "numpy") else None


def argmax(x):
    """Give where the largest number of the last axis first stands, int32; the size of that axis if it is not finite."""
    largest = tf.reduce_max(x, -1, keepdims=True)
    has_nan = tf.reduce_any(tf.math.is_nan(x), -1, keepdims=True)  # the largest may leave it out
    return first_true(tf.equal(x, largest) & tf.math.is_finite(largest) & ~has_nan)


def first_true(x):
    """Give the first index along the last axis where bool `x` is True, int32; else the size of that axis."""
    # Two reductions that XLA vectorises: its argmax for CPUs takes ten times as long.
    size = x.shape[-1]
    return tf.reduce_min(tf.where(x, tf.range(size), size), -1)


def kth_largest(x, k):
    """Give the `k`-th largest number of each row, or the smallest if there are fewer: (B, V), scalar >= 1 -> (B, 1)."""
    return smallest_kept(x, tf.ones_like(x), tf.minimum(tf.cast(k, "float32"), float(x.shape[-1])))


def smallest_kept(x, weights, limit):
    """Give the smallest number of each row above which the row's weights sum to less than a limit.

    Args:
        x: float32 (B, V).
        weights: float32 (B, V), at least 0.
        limit: float32 scalar or (B, 1), greater than 0.

    Returns:
        float32 (B, 1); where all weights sum to less than the limit, anything that is not larger than the smallest.
    """
    # Bisection over the order of all floats, as on JAX.
    low = tf.fill((shape(x)[0], 1), _NUMBER_OF_MINUS_INFINITY)
    high = tf.fill((shape(x)[0], 1), _NUMBER_OF_INFINITY)

    def halve(step, low, high):
        middle = tf.bitwise.bitwise_and(low, high) + tf.bitwise.right_shift(tf.bitwise.bitwise_xor(low, high), 1)
        above = tf.reduce_sum(tf.where(x > _numbered(middle), weights, 0.0), -1, keepdims=True)
        return step + 1, tf.where(above < limit, low, middle + 1), tf.where(above < limit, middle, high)

    return _numbered(tf.while_loop(lambda step, low, high: step < 32, halve, (0, low, high))[2])


_NUMBER_OF_INFINITY, _NUMBER_OF_MINUS_INFINITY = 0x7F800000, -0x7F800001


def _numbered(number):
    """Give the float32 with a place in the order of all of them, int32: 0.0 has 0, -0.0 has -1."""
    return tf.bitcast(tf.where(number < 0, tf.bitwise.bitwise_xor(number, 0x7FFFFFFF), number), "float32")


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
    if table.dtype == tf.bfloat16 and _is_for_xla():
        # XLA for CPUs reads bfloat16 rows by way of float32. It would do that with the whole table, once, before a
        # loop, but for the barrier, which ties the table to ids that change in the loop.
        table, ids = optimization_barrier(table, ids)
    return tf.gather(table, ids)


def apply_to_rows(function, x, row_axes: int):
    """Apply a function of each row alone to `x`, whose first `row_axes` axes count the rows.

    XLA for CPUs multiplies one row by no bfloat16 or int8 kernel as it is: it would keep a wider kernel all through a
    loop. So it is given the row twice.
    """
    sizes = x.shape[:row_axes]
    if None in sizes or math.prod(sizes) > 1:
        return function(x)
    return function(tf.concat([x, x], 0))[:1]


def linear(x, kernel, bias=None):
    """Multiply (..., D) by (D, F), accumulated in float32 and rounded to x's dtype, and add a bias (F,)."""
    product = tf.cast(_product(tf.reshape(x, (-1, x.shape[-1])), kernel, False), x.dtype)
    product = tf.reshape(product, (*shape(x)[:-1], kernel.shape[-1]))
    return product if bias is None else product + bias


def _product(x, kernel, transpose):
    """Multiply (..., D) by (D, F), or by the transpose of (F, D); rounded to x's dtype only where there is no XLA."""
    if x.dtype == tf.float32 or not _is_for_xla():
        return tf.matmul(x, kernel, transpose_b=transpose)

    def multiply(x):
        return tf.matmul(x, kernel, transpose_b=transpose, output_type=tf.float32)

    return apply_to_rows(multiply, x, len(x.shape) - 1)


def _is_for_xla() -> bool:
    """Tell whether a program for XLA is being traced: some operations exist there alone."""
    return not tf.executing_eagerly() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def cache_dtype(dtype: str) -> str:
    """Give the dtype in which keys and values of some dtype are kept for later steps."""
    # XLA for CPUs would widen a bfloat16 cache, write one position, and narrow it again, at each layer and step.
    return dtype if tf.config.list_physical_devices("GPU") else "float32"


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


def run_while(is_running, step, state, is_capturable: bool = False):
    """Give the state after `state = step(state)` was done for as long as `is_running(state)`.

    Args:
        is_running: function (state) -> bool scalar.
        step: function (state) -> state.
        state: nested arrays, used up.
        is_capturable: as for `run_steps`.
    """
    del is_capturable
    return tf.while_loop(lambda *state: is_running(state[0]), lambda *state: (step(state[0]),), (state,))[0]


def run_steps(step, is_over, caches, rest, num_steps, most_steps: int, is_capturable: bool = True):
    """Take steps until there were `num_steps` of them, or it is over.

    Args:
        step: function (caches, rest) -> (caches, rest), both nested arrays. It writes to the caches in place, and if
            it is taken once too often, it writes there only what the next step would write, too.
        is_over: function (rest) -> bool scalar.
        caches: used up.
        rest: the rest of the state.
        num_steps: int32 scalar.
        most_steps: what `num_steps` is at most.
        is_capturable: whether a step does nothing but compute; TensorFlow knows no other steps.

    Returns:
        `(caches, rest)`.
    """
    del most_steps, is_capturable

    def is_running(num_taken, caches, rest):
        return (num_taken < num_steps) & ~is_over(rest)

    def take(num_taken, caches, rest):
        return num_taken + 1, *step(caches, rest)

    return tf.while_loop(is_running, take, (0, caches, rest))[1:]


def compile_function(
    function, variables, *, donates: bool = False, is_eager: bool = False, jit_compile: bool | str = "auto"
):
    """Compile `function(*arrays)`, which reads Keras variables.

    Args:
        function: a pure function of nested arrays, traced once for each set of shapes.
        variables: the `keras.Variable`s that it reads. Their values at each call are used, never those at compilation.
        donates: whether the first argument may be used up; TensorFlow cannot, and never does.
        is_eager: whether to leave it as it is, so that it can be debugged.
        jit_compile: whether to compile it with XLA. "auto" does wherever TensorFlow has it: on Apple's GPUs it has not.
    """
    del variables, donates  # A tf.function reads its variables at each call.
    if is_eager:
        return function
    if jit_compile == "auto":
        jit_compile = not (sys.platform == "darwin" and tf.config.list_physical_devices("GPU"))
    program = tf.function(function, jit_compile=jit_compile, reduce_retracing=False, autograph=False)
    program._omit_frequent_tracing_warning = True  # to trace it for each bucket of lengths is what it is for
    return program


def variables_state(variables) -> list:
    """Give what stands for the values of variables: equal to what it gives later as long as none has changed.

    It keeps no value alive. Nothing tells here whether a variable was written to, so all values are read once,
    at about the price of a token.
    """
    values = [tf.convert_to_tensor(variable.value) for variable in variables]
    return [(value.shape, value.dtype, int(_hash(value))) for value in values]


def _hash(x):
    """Give a number of 32 bits that every element and its place have a part in."""
    unsigned = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint32"}[x.dtype.size]  # two of them for 8 bytes
    bits = x if x.dtype == unsigned else tf.bitcast(x, unsigned)
    return _hash_program(unsigned)(tf.reshape(bits, (-1,)))


@functools.cache
def _hash_program(dtype: str):
    # For all shapes at once: TensorFlow warns of functions that are traced again and again.
    @tf.function(jit_compile=True, autograph=False, input_signature=[tf.TensorSpec([None], dtype)])
    def run(bits):
        places = tf.cast(tf.range(tf.size(bits)), "uint32")
        return tf.reduce_sum(_mix(tf.cast(bits, "uint32")) * (_mix(places) | 1))

    return run


def _mix(x):
    """Let every bit of uint32 `x` change those below it and above it; no two numbers become the same one."""
    x = x * np.uint32(0x85EBCA6B)  # of MurmurHash 3
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, np.uint32(13)))


def device_memory() -> int | None:
    """Give how many bytes of memory the device has on which variables are made, or None where nobody tells."""
    return None if tf.config.list_logical_devices("GPU") else host_memory()


def synchronize(model) -> None:
    """Give the variables of a model that is being trained their current values; here they always have them."""


def keep_variables(model):
    """Give a context in which a model keeps its variables; here Keras never takes them away."""
    del model
    return contextlib.nullcontext()
