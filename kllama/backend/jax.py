"""The primitives on JAX."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np

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

cos, sin, where, maximum, reshape = jnp.cos, jnp.sin, jnp.where, jnp.maximum, jnp.reshape
einsum, softmax, reduce_max = jnp.einsum, jax.nn.softmax, jnp.max


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


def uniform(seed, step, size: tuple[int, ...], like):
    """Draw float32 numbers in [0, 1) that depend on `seed` (int32 scalar), `step` (int32 scalar) and `size` alone."""
    del like
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), step), size)


def compile_function(function, variables, *, is_eager: bool = False, jit_compile: bool = True):
    """Compile `function(*arrays)`, which reads Keras variables.

    Args:
        function: a pure function of nested arrays, traced once for each set of shapes.
        variables: the `keras.Variable`s that it reads. Their values at each call are used, never those at compilation.
        is_eager: whether to leave it as it is, so that it can be debugged.
        jit_compile: whether to compile it with XLA; JAX knows no other way and always does.
    """
    del jit_compile
    if is_eager:
        return function

    @jax.jit
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
