"""The head of a language model and its loss in one: logits are computed a few rows at a time and never kept.

Called by `training/fused_loss.py`. `kllama.training.losses` has the loss of logits that are there.
"""

import math

from keras import ops

from kllama import backend

LOGITS_AT_ONCE = 2**23
"""How many logits exist at any time: 32 MiB, which still makes products large enough to be fast."""


def linear_cross_entropy(
    hidden_states, kernel, labels, weights, *, transpose: bool = False, trains_kernel: bool = True
):
    """Sum the cross-entropy of the logits that a linear head gives, without an array of all of them.

    The gradients are computed on the way forward, while a part of the logits is there; going backward only multiplies
    them by a number. So there are as many products with the head as without this function: three, or two where the head
    is frozen.

    Args:
        hidden_states: (M, D), a row for each label.
        kernel: the head, (D, V), or (V, D) with `transpose`, in the dtype of the hidden states.
        labels: int32 (M,), from 0 to V - 1.
        weights: float32 (M,), of the labels.
        transpose: whether the kernel is a transposed one, as that of an embedding table is.
        trains_kernel: whether there is to be a gradient of the kernel.

    Returns:
        float32 (2,): the weighted sum of the losses in nats, and the weighted number of labels whose logit is the
        largest, the first of them if there are several. The second one has no gradient.

    Reference: Hsu et al., "Liger Kernel" (arXiv:2410.10989), section 3.2, FusedLinearCrossEntropy.
    """

    @ops.custom_gradient
    def sums(hidden_states, kernel):
        chunks = in_chunks((hidden_states, labels, weights), kernel.shape[0 if transpose else 1])
        start = backend.full((2,), 0.0, "float32", weights)
        kernel_start = backend.full(tuple(kernel.shape), 0.0, "float32", weights) if trains_kernel else ()

        def run(carry, rows):
            return _add_with_gradients(carry, rows, kernel, transpose, trains_kernel)

        (total, of_kernel), of_rows = backend.scan(run, (start, kernel_start), chunks)
        of_rows = backend.reshape(of_rows, (-1, hidden_states.shape[-1]))[: backend.shape(hidden_states)[0]]

        def gradient(*args, upstream=None):
            upstream = (args[0] if upstream is None else upstream)[0]
            of_head = backend.cast(of_kernel * upstream, kernel.dtype) if trains_kernel else None
            return backend.cast(of_rows * upstream, hidden_states.dtype), of_head

        return total, gradient

    return sums(hidden_states, kernel)


def in_chunks(arrays: tuple, num_tokens: int) -> tuple:
    """Give arrays (M, ...) as (any number, rows, ...), so many rows that not too many logits are there at any time.

    Rows of zeros fill the last chunk; with a weight of 0 they count for nothing.
    """
    rows = 2 ** int(math.log2(max(16, LOGITS_AT_ONCE // num_tokens)))
    length = backend.shape(arrays[0])[0]
    if isinstance(length, int):
        rows = min(rows, max(1, length))
    return tuple(_in_chunks(x, rows) for x in arrays)


def _in_chunks(x, rows: int):
    length, sizes = backend.shape(x)[0], tuple(x.shape[1:])
    missing = -length % rows
    if not isinstance(missing, int) or missing:
        x = backend.concatenate([x, backend.cast(backend.full((missing, *sizes), 0, "int32", x), x.dtype)], 0)
    return backend.reshape(x, (-1, rows, *sizes))


def _add_with_gradients(carry, rows, kernel, transpose: bool, trains_kernel: bool):
    """Add some rows to the sums and to the gradient of the kernel, and give the gradient of their hidden states."""
    total, of_kernel = carry
    hidden_states, labels, weights = rows
    losses, hits, slope = backend.cross_entropy(backend.matmul_float32(hidden_states, kernel, transpose), labels)
    slope = backend.cast(slope * weights[:, None], hidden_states.dtype)
    if trains_kernel:
        left, right = (slope, hidden_states) if transpose else (hidden_states, slope)
        of_kernel = of_kernel + backend.matmul_float32(backend.transpose(left, (1, 0)), right)
    of_rows = backend.matmul_float32(slope, kernel, not transpose)
    return (total + weighted_sums(losses, hits, weights), of_kernel), of_rows


def weighted_sums(losses, hits, weights):
    """Sum losses float32 (M,) and hits bool (M,), each times its weight float32 (M,): float32 (2,)."""
    sums = [backend.reduce_sum(weights * x, -1) for x in (losses, backend.cast(hits, "float32"))]
    return backend.concatenate([backend.reshape(x, (1,)) for x in sums], 0)
