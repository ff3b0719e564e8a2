"""Root mean square normalization."""

from kllama import backend


@backend.one_program("epsilon")
def rms_norm(x, scale, epsilon: float):
    """Normalize by the root mean square: `x / sqrt(mean(x ** 2) + epsilon) * scale`.

    Computed in float32 and cast back to x's dtype *before* the multiplication with `scale`, as transformers and Meta
    do (KerasHub and llama.cpp multiply first: in bfloat16 a quarter of the results differ by one unit in the last
    place).

    Args:
        x: hidden states, (..., D).
        scale: the learned gain, (D,).
        epsilon: positive float, added to the mean square.

    Returns:
        Tensor of x's shape and dtype.

    Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv:1910.07467), equation 4.
    """
    return backend.cast(backend.rms_normalize(x, epsilon), x.dtype) * backend.cast(scale, x.dtype)
