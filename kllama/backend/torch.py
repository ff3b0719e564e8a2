"""The primitives on PyTorch."""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F

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

cos, sin, where, einsum, reshape = torch.cos, torch.sin, torch.where, torch.einsum, torch.reshape
reduce_max = torch.amax


def one_program(*static: str):
    """Leave a function as it is: operations that run one by one are compiled already."""
    del static
    return lambda function: function


def cast(x, dtype):
    """Give `x` in `dtype` (a name or a framework dtype)."""
    return x.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def constant(array: np.ndarray, like):
    """Put a NumPy array on the device of `like`."""
    return torch.as_tensor(array, device=like.device)


def arange(length, like):
    """Count 0, 1, ..., `length` - 1 as int32 on the device of `like`."""
    return torch.arange(length, dtype=torch.int32, device=like.device)


def shape(x) -> tuple:
    """Give the sizes of `x`: integers, or scalars of the framework where a size is not static."""
    return tuple(x.shape)


def maximum(x, y):
    """Give the larger of `x` (a tensor) and `y` (a tensor or a number), element by element."""
    return torch.clamp(x, min=y)


def concatenate(tensors, axis: int):
    """Join tensors along an axis."""
    return torch.cat(tensors, axis)


def softmax(x, axis: int = -1):
    """Exponentiate and normalise along an axis."""
    return torch.softmax(x, axis)


def apply_in_float32(function, x):
    """Give the float32 result of an elementwise function in x's dtype; PyTorch's kernels widen by themselves."""
    return function(x)


def rms_normalize(x, epsilon: float):
    """Divide `x` (..., D) by the root of its mean square over the last axis, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=epsilon)


def matmul_float32(x, kernel, transpose: bool = False):
    """Multiply (..., D) by (D, V), or by the transpose of (V, D), accumulated and returned in float32.

    The transpose itself is not made: of an embedding table, it would be one of the largest arrays of a model.
    """
    # A half-precision product is rounded once before it is widened, as in transformers: PyTorch's CPU matmul has no
    # wider result type, and widening the (D, V) kernel instead would copy the largest matrix of the model.
    return torch.matmul(x, kernel.T if transpose else kernel).float()


def fused_attention(query, key, value, mask=None, is_causal: bool = False):
    """Attend with grouped heads: (B, T, N, H), (B, S, K, H), (B, S, K, H) -> (B, T, N, H), scaled by H ** -0.5."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    grouped = query.shape[1] != key.shape[1]
    context = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, enable_gqa=grouped)
    return context.transpose(1, 2)


def concrete(x) -> np.ndarray | None:
    """Give the values of `x`, or None while a program is being traced and there are none yet."""
    if x.is_meta or torch.compiler.is_compiling():
        return None
    return x.detach().cpu().numpy()


def uniform(seed, step, size: tuple[int, ...], like):
    """Draw float32 numbers in [0, 1) that depend on `seed` (int32 scalar), `step` (int32 scalar) and `size` alone."""
    # Counter-based, as JAX's and TensorFlow's: PyTorch's own CPU generator reads only 32 bits of a seed.
    generator = np.random.Generator(np.random.Philox(key=int(seed), counter=int(step)))
    return torch.as_tensor(generator.random(size, dtype="float32"), device=like.device)


def compile_function(function, variables, *, is_eager: bool = False, jit_compile: bool = True):
    """Compile `function(*arrays)`, which reads Keras variables.

    PyTorch runs it as it is, without gradients: its variables are read at each call.

    Args:
        function: a pure function of nested arrays.
        variables: the `keras.Variable`s that it reads. Their values at each call are used, never those at compilation.
        is_eager: whether to leave it as it is, so that it can be debugged.
        jit_compile: whether to compile it with XLA, which PyTorch has not.
    """
    del variables, is_eager, jit_compile
    return torch.no_grad()(function)


def synchronize(model) -> None:
    """Give the variables of a model that is being trained their current values; here they always have them."""


def keep_variables(model):
    """Give a context in which a model keeps its variables; here Keras never takes them away."""
    del model
    return contextlib.nullcontext()
