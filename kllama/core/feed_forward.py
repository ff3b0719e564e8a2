"""The gated feed-forward network."""

from collections.abc import Callable

from kllama import backend


def feed_forward(x, gate: Callable, up: Callable, down: Callable, activation: Callable):
    """Apply `down(activation(gate(x)) * up(x))`.

    The activation is computed in float32 and cast back.

    Args:
        x: hidden states, (B, T, D).
        gate: projection (B, T, D) -> (B, T, F).
        up: projection (B, T, D) -> (B, T, F).
        down: projection (B, T, F) -> (B, T, D).
        activation: function of one tensor.

    Returns:
        Tensor (B, T, D).

    Reference: Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202), equation 6.
    """
    return down(backend.apply_in_float32(activation, gate(x)) * up(x))
