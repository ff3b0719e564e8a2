"""The product of inputs that are rounded to int8 row by row with an int8 kernel."""

from kllama import backend


def matmul_int8(x, kernel, scale, value_range: tuple[int, int], epsilon: float, transpose: bool = False):
    """Multiply (..., D), rounded to int8, by an int8 kernel (D, F), or by the transpose of (F, D).

    Each row is divided by its largest number, so that it fills the range of int8. The sums are exact; what Keras'
    quantised layers compute, over two axes instead of four, which needs no transpose of the kernel.

    Args:
        x: float (..., D).
        kernel: int8 (D, F), or (F, D) with `transpose`.
        scale: float (F,), what the kernel was multiplied by before it was rounded.
        value_range: the smallest and the largest int8 that a rounded number becomes.
        epsilon: positive float, added to a row's largest number.
        transpose: whether the kernel is transposed.

    Returns:
        Tensor (..., F) in the dtype of `scale`.

    Reference: Dettmers et al., "LLM.int8()" (arXiv:2208.07339), section 2.1, of which this is the vector-wise part.
    """
    smallest, largest = value_range
    row_scale = largest / (backend.reduce_max(abs(x), -1)[..., None] + epsilon)
    rounded = backend.minimum(backend.maximum(backend.round(x * row_scale), smallest), largest)
    sums = backend.matmul_int32(backend.cast(rounded, "int8"), kernel, transpose)
    return backend.cast(sums, scale.dtype) / (backend.cast(row_scale, scale.dtype) * scale)
