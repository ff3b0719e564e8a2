"""The primitives on PyTorch."""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F

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
"""Whether calls return before they are computed; here operations on a CPU end before they return."""

_FEW_ROWS, _LARGE_KERNEL = 16, 2**17  # rows and elements, by measurement; see benchmarks/README.md

cos, sin, exp, where, einsum, reshape = torch.cos, torch.sin, torch.exp, torch.where, torch.einsum, torch.reshape
transpose, cumsum = torch.permute, torch.cumsum
reduce_max, reduce_sum, reduce_all, reduce_any = torch.amax, torch.sum, torch.all, torch.any


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
    return _product(x, kernel.T if transpose else kernel).float()


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


def argmax(x):
    """Give the first index of the largest element along the last axis, int32; the size of that axis for NaN."""
    largest, index = torch.max(x, -1)
    return torch.where(largest == largest, index, x.shape[-1]).int()


def first_true(x):
    """Give the first index along the last axis where bool `x` is True, int32; else the size of that axis."""
    found, index = torch.max(x, -1)
    return torch.where(found, index, x.shape[-1]).int()


def full(shape, value, dtype, like):
    """Give a tensor of one value on the device of `like`."""
    return torch.full(shape, value, dtype=getattr(torch, dtype), device=like.device)


def take_last(x, lengths):
    """Give the rows' last real entries: (B, T, D), int32 (B,) -> (B, D)."""
    return x[torch.arange(x.shape[0], device=x.device), lengths.long() - 1]


def repeat_axis(x, count: int, axis: int):
    """Repeat each entry along an axis `count` times, one after another."""
    return torch.repeat_interleave(x, count, axis)


def take_rows(table, ids):
    """Give the rows of a table (V, D) at int32 ids (B, T): (B, T, D)."""
    return F.embedding(ids, table)


def linear(x, kernel, bias=None):
    """Multiply (..., D) by (D, F), accumulated in float32 and rounded to x's dtype, and add a bias (F,)."""
    product = _product(x, kernel)
    return product if bias is None else product + bias


def _product(x, kernel):
    """Multiply (..., D) by (D, F); a few rows by all threads.

    MKL multiplies a few float32 rows on one thread, which cannot read the kernel as fast as the memory gives it. Parts
    of the sum, one for each thread, are a batch of products, and these run side by side.
    """
    num_rows, num_parts = x.numel() // x.shape[-1], torch.get_num_threads()
    is_few = num_rows <= _FEW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu"
    if not is_few or num_parts == 1 or kernel.shape[0] % num_parts or kernel.numel() < _LARGE_KERNEL:
        return torch.matmul(x, kernel)
    parts = x.reshape(num_rows, num_parts, -1).transpose(0, 1)
    product = torch.bmm(parts, kernel.unflatten(0, (num_parts, -1))).sum(0)
    return product.view(*x.shape[:-1], -1)


def cache_dtype(dtype: str) -> str:
    """Give the dtype in which keys and values of some dtype are kept for later steps."""
    return dtype


def write_slots(cache, new, start):
    """Write new entries (R, T, H) into a cache (R, S, H) at the slots `start` to `start + T - 1`, in place."""
    slots = start if new.shape[1] == 1 else start + torch.arange(new.shape[1], device=cache.device)
    return cache.index_copy_(1, slots.reshape(-1).long(), new.to(cache.dtype))


def grow_slots(cache, num_slots: int):
    """Give a cache (R, S, H) more slots, of zeros."""
    return F.pad(cache, (0, 0, 0, num_slots - cache.shape[1]))


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
    keys, values = (x.view(*query.shape[:2], *x.shape[1:]) for x in (keys, values))
    return F.scaled_dot_product_attention(query, keys, values, visible)


def run_while(is_running, step, state):
    """Give the state after `state = step(state)` was done for as long as `is_running(state)`."""
    while is_running(state):
        state = step(state)
    return state


def compile_function(function, variables, *, donates: bool = False, is_eager: bool = False, jit_compile: bool = True):
    """Compile `function(*arrays)`, which reads Keras variables.

    PyTorch runs it as it is, without gradients: its variables are read at each call.

    Args:
        function: a pure function of nested arrays.
        variables: the `keras.Variable`s that it reads. Their values at each call are used, never those at compilation.
        donates: whether the first argument may be changed in place: the caller gives it away.
        is_eager: whether to leave it as it is, so that it can be debugged.
        jit_compile: whether to compile it with XLA, which PyTorch has not.
    """
    del variables, donates, is_eager, jit_compile
    return torch.inference_mode()(function)


def synchronize(model) -> None:
    """Give the variables of a model that is being trained their current values; here they always have them."""


def keep_variables(model):
    """Give a context in which a model keeps its variables; here Keras never takes them away."""
    del model
    return contextlib.nullcontext()
