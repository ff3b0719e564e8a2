"""The primitives on JAX."""

import contextlib
import functools
import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np

from kllama.backend.host import host_memory
from kllama.backend.jax_programs import compile_function, run_steps, run_while

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

RUNS_AHEAD = True
"""Whether calls return before they are computed; here programs run in the background."""

cos, sin, exp, log, where, reshape = jnp.cos, jnp.sin, jnp.exp, jnp.log, jnp.where, jnp.reshape
maximum, minimum, round = jnp.maximum, jnp.minimum, jnp.round
einsum, softmax, transpose, cumsum = jnp.einsum, jax.nn.softmax, jnp.transpose, jnp.cumsum
reduce_max, reduce_sum, reduce_all, reduce_any = jnp.max, jnp.sum, jnp.all, jnp.any


def one_program(*static: str):
    """Make of a function of arrays one program, where the framework would compile each of its operations.

    Args:
        *static: the names of its arguments that are no arrays.
    """
    return functools.partial(jax.jit, static_argnames=static, inline=True)


def cast(x, dtype):
    """Give `x` in `dtype` (a name or a framework dtype)."""
    return x.astype(dtype)


def constant(array: np.ndarray, like):
    """Put a NumPy array on the device of `like`."""
    del like  # JAX moves constants to where they are used.
    return jnp.asarray(array)


def arange(length, like):
    """Count 0, 1, ..., `length` - 1 as int32 on the device of `like`."""
    del like
    return jnp.arange(length, dtype="int32")


def shape(x) -> tuple:
    """Give the sizes of `x`: integers, or scalars of the framework where a size is not static."""
    return x.shape


def concatenate(tensors, axis: int):
    """Join tensors along an axis."""
    return jnp.concatenate(tensors, axis)


@one_program("function")
def apply_in_float32(function, x):
    """Give the float32 result of an elementwise function in x's dtype."""
    return function(x.astype("float32")).astype(x.dtype)


def rms_normalize(x, epsilon: float):
    """Divide `x` (..., D) by the root of its mean square over the last axis, in float32."""
    x = x.astype("float32")
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + epsilon)


def matmul_float32(x, kernel, transpose: bool = False):
    """Multiply (..., D) by (D, V), or by the transpose of (V, D), accumulated and returned in float32.

    The transpose itself is not made: of an embedding table, it would be one of the largest arrays of a model.
    """
    return _product(x, kernel, transpose, "float32")


def matmul_int32(x, kernel, transpose: bool = False):
    """Multiply int8 (..., D) by int8 (D, F), or by the transpose of (F, D): exact int32 sums."""
    return _product(x, kernel, transpose, "int32")


def cross_entropy(logits, labels):
    """Compare logits float32 (M, V), which are used up, with labels int32 (M,).

    Returns:
        `(losses float32 (M,) in nats, bool (M,) whether the label's logit is the first of the largest, gradient of each
        loss by its logits float32 (M, V))`.
    """
    largest = jnp.max(logits, -1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    normalizer = jnp.sum(exponentials, -1, keepdims=True)
    is_label = jnp.arange(logits.shape[-1], dtype="int32")[None] == labels[:, None]
    of_label = jnp.sum(jnp.where(is_label, logits - largest, 0.0), -1)
    slope = exponentials / normalizer - is_label
    return jnp.log(normalizer[:, 0]) - of_label, argmax(logits) == labels, slope


def scan(function, carry, xs: tuple) -> tuple:
    """Give `(carry, ys)` after `carry, y = function(carry, x)` was done for each x, in order.

    Args:
        function: function (carry, tuple of arrays) -> (carry, float32 array).
        carry: nested arrays.
        xs: tuple of arrays (n, ...).

    Returns:
        The last carry, and the arrays that were given, (n, ...).
    """
    return jax.lax.scan(function, carry, xs)


@one_program("is_causal")
def fused_attention(query, key, value, mask=None, is_causal: bool = False):
    """Attend with grouped heads: (B, T, N, H), (B, S, K, H), (B, S, K, H) -> (B, T, N, H), scaled by H ** -0.5."""
    if query.dtype == "float16" and jax.default_backend() == "cpu":
        # XLA has no float16 product with float32 sums for CPUs.
        wide = (x.astype("float32") for x in (query, key, value))
        return fused_attention(*wide, mask, is_causal).astype("float16")
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)


def concrete(x) -> np.ndarray | None:
    """Give the values of `x`, or None while a program is being traced and there are none yet."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def argmax(x):
    """Give where the largest number of the last axis first stands, int32; the size of that axis if it is not finite."""
    largest = jnp.max(x, -1, keepdims=True)
    return first_true((x == largest) & jnp.isfinite(largest))


def first_true(x):
    """Give the first index along the last axis where bool `x` is True, int32; else the size of that axis."""
    # Two reductions that XLA vectorises: its argmax for CPUs takes ten times as long.
    size = x.shape[-1]
    return jnp.min(jnp.where(x, jnp.arange(size, dtype="int32"), size), -1)


def kth_largest(x, k):
    """Give the `k`-th largest number of each row, or the smallest if there are fewer: (B, V), scalar >= 1 -> (B, 1)."""
    return smallest_kept(x, jnp.ones_like(x), minimum(k, x.shape[-1]))


def smallest_kept(x, weights, limit):
    """Give the smallest number of each row above which the row's weights sum to less than a limit.

    Args:
        x: float32 (B, V).
        weights: float32 (B, V), at least 0.
        limit: float32 scalar or (B, 1), greater than 0.

    Returns:
        float32 (B, 1); where all weights sum to less than the limit, anything that is not larger than the smallest.
    """
    # Bisection over the order of all floats: a sort or a top-k of XLA's takes thirty times as long on CPUs.
    low = jnp.full((x.shape[0], 1), _NUMBER_OF_MINUS_INFINITY, "int32")
    high = jnp.full((x.shape[0], 1), _NUMBER_OF_INFINITY, "int32")

    def halve(_, ends):
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)
        above = jnp.sum(jnp.where(x > _numbered(middle), weights, 0.0), -1, keepdims=True)
        return jnp.where(above < limit, low, middle + 1), jnp.where(above < limit, middle, high)

    return _numbered(jax.lax.fori_loop(0, 32, halve, (low, high))[1])


_NUMBER_OF_INFINITY, _NUMBER_OF_MINUS_INFINITY = 0x7F800000, -0x7F800001


def _numbered(number):
    """Give the float32 with a place in the order of all of them, int32: 0.0 has 0, -0.0 has -1."""
    bits = jnp.where(number < 0, number ^ 0x7FFFFFFF, number)
    return jax.lax.bitcast_convert_type(bits, "float32")


def full(shape, value, dtype, like):
    """Give a tensor of one value on the device of `like`."""
    del like
    return jnp.full(shape, value, dtype)


def take_last(x, lengths):
    """Give the rows' last real entries: (B, T, D), int32 (B,) -> (B, D)."""
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]


def repeat_axis(x, count: int, axis: int):
    """Repeat each entry along an axis `count` times, one after another."""
    return jnp.repeat(x, count, axis)


def take_rows(table, ids):
    """Give the rows of a table (V, D) at int32 ids (B, T): (B, T, D)."""
    # XLA for CPUs reads bfloat16 rows by way of float32. It would do that with the whole table, once, before a loop,
    # but for the barrier, which ties the table to ids that change in the loop.
    table, ids = jax.lax.optimization_barrier((table, ids))
    return table[ids]


def apply_to_rows(function, x, row_axes: int):
    """Apply a function of each row alone to `x`, whose first `row_axes` axes count the rows.

    XLA for CPUs multiplies one row by no bfloat16 or int8 kernel as it is: it would keep a wider kernel all through a
    loop. So it is given the row twice.
    """
    if math.prod(x.shape[:row_axes]) > 1 or jax.default_backend() != "cpu":
        return function(x)
    return function(jnp.concatenate([x, x]))[:1]


def linear(x, kernel, bias=None):
    """Multiply (..., D) by (D, F), accumulated in float32 and rounded to x's dtype, and add a bias (F,)."""
    product = _product(x.reshape(-1, x.shape[-1]), kernel, False, "float32")
    product = product.reshape(*x.shape[:-1], kernel.shape[-1]).astype(x.dtype)
    return product if bias is None else product + bias


def _product(x, kernel, transpose, dtype):
    """Multiply (..., D) by (D, F), or by the transpose of (F, D), with sums of some dtype."""

    def multiply(x):
        axes = (((x.ndim - 1,), (int(transpose),)), ((), ()))
        return jax.lax.dot_general(x, kernel, axes, preferred_element_type=dtype)

    return apply_to_rows(multiply, x, x.ndim - 1) if kernel.dtype in ("bfloat16", "int8") else multiply(x)


def cache_dtype(dtype: str) -> str:
    """Give the dtype in which keys and values of some dtype are kept for later steps."""
    # XLA for CPUs would widen a bfloat16 cache, write one position, and narrow it again, at each layer and step.
    return "float32" if jax.default_backend() == "cpu" else dtype


def write_slots(cache, new, start):
    """Write new entries (R, T, H) into a cache (R, S, H) at the slots `start` to `start + T - 1`, in place."""
    return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), (0, start, 0))


def grow_slots(cache, num_slots: int):
    """Give a cache (R, S, H) more slots, of zeros."""
    return jnp.pad(cache, ((0, 0), (0, num_slots - cache.shape[1]), (0, 0)))


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
    rows, (*_, head_dim) = keys.shape[0], query.shape
    heads = query.reshape(rows, -1, head_dim)
    scores = jnp.einsum("rqh,rsh->rqs", heads, keys, preferred_element_type="float32") * head_dim**-0.5
    scores = jnp.where(visible, scores.reshape(*query.shape[:3], -1), -1e30)
    probabilities = jax.nn.softmax(scores, -1).reshape(rows, -1, keys.shape[1])
    probabilities = probabilities.astype(values.dtype)
    context = jnp.einsum("rqs,rsh->rqh", probabilities, values, preferred_element_type="float32")
    return context.reshape(query.shape).astype(query.dtype)


class _SameArray:
    """Stands for an array without keeping it alive; equal to what stands for the same one."""

    def __init__(self, array):
        self._array = weakref.ref(array)

    def __eq__(self, other):
        return self._array() is not None and self._array() is other._array()


def variables_state(variables) -> list:
    """Give what stands for the values of variables: equal to what it gives later as long as none has changed.

    It keeps no value alive. Arrays never change here, so a variable that has changed has another one.
    """
    return [_SameArray(variable.value) for variable in variables]


def device_memory() -> int | None:
    """Give how many bytes of memory the device has on which variables are made, or None where nobody tells."""
    device = jax.config.jax_default_device or jax.local_devices()[0]
    if device.platform == "cpu":
        return host_memory()
    return (device.memory_stats() or {}).get("bytes_limit")


def synchronize(model) -> None:
    """Give the variables of a model that is being trained their current values, which Keras holds elsewhere."""
    model.jax_state_sync()


@contextlib.contextmanager
def keep_variables(model):
    """Give a model its variables back if what runs inside fails: Keras takes them away meanwhile."""
    optimizer = model.optimizer if model.compiled else None
    before = [(variable, variable._value) for variable in (*model.variables, *getattr(optimizer, "variables", ()))]
    try:
        yield
    except BaseException:
        model.jax_state_sync()  # what the steps so far have made of them
        for variable, value in before:
            if variable._value is None:
                variable._value = value
        if optimizer is not None and any(variable._value is None for variable in optimizer.variables):
            model.optimizer = type(optimizer).from_config(optimizer.get_config())  # it had no values before
        raise
