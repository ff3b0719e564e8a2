"""The primitives on PyTorch."""

import contextlib
import functools

import keras
import numpy as np
import torch
import torch.nn.functional as F

from kllama.backend.host import host_memory
from kllama.backend.torch_programs import compile_function, run_steps, run_while

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
"""Whether calls return before they are computed; here operations on a CPU end before they return."""

_FEW_NUMBERS = 256  # of a sorted row, that are looked at first
_MIXER = 6364136223846793005  # of Knuth's MMIX: an odd number by which low bits change high ones
# Rows, elements of a kernel and its columns, by measurement; see `_product`.
_FEW_ROWS, _LARGE_KERNEL, _MANY_COLUMNS = 16, 2**16, 8192

cos, sin, exp, log, where, reshape = torch.cos, torch.sin, torch.exp, torch.log, torch.where, torch.reshape
einsum, round = torch.einsum, torch.round
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


def minimum(x, y):
    """Give the smaller of `x` (a tensor) and `y` (a tensor or a number), element by element."""
    return torch.clamp(x, max=y)


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


def matmul_int32(x, kernel, transpose: bool = False):
    """Multiply int8 (..., D) by int8 (D, F), or by the transpose of (F, D): exact int32 sums."""
    kernel = kernel.T if transpose else kernel
    if x.device.type != "cpu":
        return keras.ops.matmul(x, kernel)  # which knows what each device can do
    return torch._int_mm(x.reshape(-1, x.shape[-1]), kernel).view(*x.shape[:-1], -1)


def fused_attention(query, key, value, mask=None, is_causal: bool = False):
    """Attend with grouped heads: (B, T, N, H), (B, S, K, H), (B, S, K, H) -> (B, T, N, H), scaled by H ** -0.5."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    grouped = query.shape[1] != key.shape[1]
    context = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, enable_gqa=grouped)
    return context.transpose(1, 2)


def cross_entropy(logits, labels):
    """Compare logits float32 (M, V), which are used up, with labels int32 (M,).

    Returns:
        `(losses float32 (M,) in nats, bool (M,) whether the label's logit is the first of the largest, gradient of each
        loss by its logits float32 (M, V))`.
    """
    rows = torch.arange(len(labels), device=labels.device)
    hits = argmax(logits) == labels
    log_probabilities = torch.log_softmax(logits, -1, out=logits)
    losses = -log_probabilities[rows, labels]
    slope = log_probabilities.exp_()
    slope[rows, labels] -= 1
    return losses, hits, slope


def scan(function, carry, xs: tuple) -> tuple:
    """Give `(carry, ys)` after `carry, y = function(carry, x)` was done for each x, in order.

    Args:
        function: function (carry, tuple of arrays) -> (carry, float32 array).
        carry: nested arrays.
        xs: tuple of arrays (n, ...).

    Returns:
        The last carry, and the arrays that were given, (n, ...).
    """
    ys = []
    for rows in zip(*xs, strict=True):
        carry, y = function(carry, rows)
        ys.append(y)
    return carry, torch.stack(ys)


def concrete(x) -> np.ndarray | None:
    """Give the values of `x`, or None while a program is being traced and there are none yet."""
    if x.is_meta or torch.compiler.is_compiling():
        return None
    return x.detach().cpu().numpy()


def argmax(x):
    """Give where the largest number of the last axis first stands, int32; the size of that axis if it is not finite."""
    largest, index = torch.max(x, -1)
    return torch.where(largest - largest == 0, index, x.shape[-1]).int()


def first_true(x):
    """Give the first index along the last axis where bool `x` is True, int32; else the size of that axis."""
    found, index = torch.max(x, -1)
    return torch.where(found, index, x.shape[-1]).int()


def kth_largest(x, k):
    """Give the `k`-th largest number of each row, or the smallest if there are fewer: (B, V), scalar >= 1 -> (B, 1)."""
    if _may_read_back(x):
        return torch.topk(x, min(int(k), x.shape[-1])).values[:, -1:]
    return smallest_kept(x, torch.ones_like(x), k)


def smallest_kept(x, weights, limit):
    """Give the smallest number of each row above which the row's weights sum to less than a limit.

    Args:
        x: float32 (B, V).
        weights: float32 (B, V), at least 0.
        limit: float32 scalar or (B, 1), greater than 0.

    Returns:
        float32 (B, 1); where all weights sum to less than the limit, anything that is not larger than the smallest.
    """
    if _may_read_back(x) and x.shape[-1] > _FEW_NUMBERS:  # a sort takes twenty times as long, and few hold most weight
        numbers, order = torch.topk(x, _FEW_NUMBERS)
        sums = torch.cumsum(torch.gather(weights, -1, order), -1)
        if (sums[:, -1:] >= limit).all():
            return _smallest_kept(numbers, sums, limit)
    numbers, order = torch.sort(x, -1, descending=True)
    return _smallest_kept(numbers, torch.cumsum(torch.gather(weights, -1, order), -1), limit)


def _smallest_kept(numbers, sums, limit):
    """Give the smallest of the largest numbers of each row, in order, above which the sums are less than a limit."""
    num_kept = 1 + torch.sum(sums[:, :-1] < limit, -1, keepdim=True)
    return torch.gather(numbers, -1, num_kept - 1)


def _may_read_back(x) -> bool:
    """Tell whether a program may depend on a number: a GPU would be waited for, and a compiled program broken up."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


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


def apply_to_rows(function, x, row_axes: int):
    """Apply a function of each row alone to `x`, whose first `row_axes` axes count the rows; here one row is enough."""
    del row_axes
    return function(x)


def linear(x, kernel, bias=None):
    """Multiply (..., D) by (D, F), accumulated in float32 and rounded to x's dtype, and add a bias (F,)."""
    product = _product(x, kernel)
    return product if bias is None else product + bias


def _product(x, kernel):
    """Multiply (..., D) by (D, F); a few rows by all threads.

    MKL multiplies a few float32 rows on one thread, which cannot read the kernel as fast as the memory gives it. Parts
    of the kernel's columns, one for each thread, are a batch of products, and these run side by side.
    """
    num_rows, num_parts = x.numel() // x.shape[-1], _num_threads()
    is_few = num_rows <= _FEW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu"
    if not is_few or num_parts == 1 or kernel.shape[1] % num_parts or kernel.numel() < _LARGE_KERNEL:
        return torch.matmul(x, kernel)
    rows = x.reshape(1, num_rows, -1).expand(num_parts, -1, -1)
    columns = kernel.unflatten(1, (num_parts, -1)).transpose(0, 1)
    if kernel.shape[1] > _MANY_COLUMNS and kernel.stride(0) == 1:  # as PyTorch's files have it: (F, D) in memory
        product = torch.bmm(columns.transpose(1, 2), rows.transpose(1, 2)).permute(2, 0, 1)
    else:
        product = torch.bmm(rows, columns).transpose(0, 1)
    return product.reshape(*x.shape[:-1], -1)


@torch.compiler.assume_constant_result  # Its call cannot be part of a compiled program.
def _num_threads() -> int:
    return torch.get_num_threads()


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


def variables_state(variables) -> list:
    """Give what stands for the values of variables: equal to what it gives later as long as none has changed.

    It keeps no value alive. PyTorch counts what is written to a tensor, but not all of it: fused optimizers
    and `.data` go past the counter. So all values are read once, too, at about the price of a token.
    """
    values = [variable.value.detach() for variable in variables]
    sums = torch.stack([_sum_bits(value) for value in values]).tolist() if values else []
    counts = [None if value.is_inference() else value._version for value in values]
    places = [(value.data_ptr(), value.shape, value.dtype) for value in values]
    return list(zip(places, counts, sums, strict=True))


def _sum_bits(x):
    """Give a number of 64 bits that every byte of `x`, and its place, have a part in."""
    # As it lies in memory, so that a transposed matrix is not copied.
    data = x.permute(sorted(range(x.dim()), key=lambda axis: -x.stride(axis))).reshape(-1).view(torch.uint8)
    if len(data) % 8 == 0:
        data = data.view(torch.int64)
    total, places = torch.zeros((), dtype=torch.int64, device=x.device), _places(x.device)
    for block in data.split(len(places)):  # so that memory stays bounded
        words = block.long() * _MIXER
        words ^= words >> 32  # The highest bits alone, signs say, would get lost in the products.
        total = total * 3 + words.mul_(places[: len(block)]).sum()
    return total


@functools.cache
def _places(device):
    """Give the first odd numbers, by which the words of a block are multiplied."""
    return torch.arange(1, 2**19, 2, device=device)


def device_memory() -> int | None:
    """Give how many bytes of memory the device has on which variables are made, or None where nobody tells."""
    device = keras.ops.convert_to_tensor(0).device
    if device.type != "cuda":
        return host_memory() if device.type == "cpu" else None
    return torch.cuda.get_device_properties(device).total_memory


def synchronize(model) -> None:
    """Give the variables of a model that is being trained their current values; here they always have them."""


def keep_variables(model):
    """Give a context in which a model keeps its variables; here Keras never takes them away."""
    del model
    return contextlib.nullcontext()
