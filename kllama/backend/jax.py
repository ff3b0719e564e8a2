"""The primitives on JAX."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np

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

RUNS_AHEAD = True
"""Whether calls return before they are computed; here programs run in the background."""

cos, sin, exp, where, maximum, reshape = jnp.cos, jnp.sin, jnp.exp, jnp.where, jnp.maximum, jnp.reshape
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
    axes = (((x.ndim - 1,), (int(transpose),)), ((), ()))
    return jax.lax.dot_general(x, kernel, axes, preferred_element_type="float32")


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
    """Give the first index of the largest element along the last axis, int32; the size of that axis for NaN."""
    return first_true(x == jnp.max(x, -1, keepdims=True))


def first_true(x):
    """Give the first index along the last axis where bool `x` is True, int32; else the size of that axis."""
    # Two reductions that XLA vectorises: its argmax for CPUs takes ten times as long.
    size = x.shape[-1]
    return jnp.min(jnp.where(x, jnp.arange(size, dtype="int32"), size), -1)


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
    return table[ids]


def linear(x, kernel, bias=None):
    """Multiply (..., D) by (D, F), accumulated in float32 and rounded to x's dtype, and add a bias (F,)."""
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), preferred_element_type="float32")
    product = product.reshape(*x.shape[:-1], kernel.shape[-1]).astype(x.dtype)
    return product if bias is None else product + bias


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
    context = jnp.einsum("rqs,rsh->rqh", probabilities, values, preferred_element_type="float32")
    return context.reshape(query.shape).astype(query.dtype)


def run_while(is_running, step, state):
    """Give the state after `state = step(state)` was done for as long as `is_running(state)`."""
    return jax.lax.while_loop(is_running, step, state)


def compile_function(function, variables, *, donates: bool = False, is_eager: bool = False, jit_compile: bool = True):
    """Compile `function(*arrays)`, which reads Keras variables.

    Args:
        function: a pure function of nested arrays, traced once for each set of shapes.
        variables: the `keras.Variable`s that it reads. Their values at each call are used, never those at compilation.
        donates: whether the memory of the first argument may be used for the result: the caller gives it away.
        is_eager: whether to leave it as it is, so that it can be debugged.
        jit_compile: whether to compile it with XLA; JAX knows no other way and always does.
    """
    del jit_compile
    if is_eager:
        return function

    @functools.partial(jax.jit, donate_argnums=1 if donates else ())
    def traced(values, *arrays):
        with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
            return function(*arrays)

    return lambda *arrays: traced([variable.value for variable in variables], *arrays)


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
