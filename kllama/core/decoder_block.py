"""One decoder layer of a Llama, over any attention and any feed-forward network."""

from collections.abc import Callable


def decoder_block(
    x, attention_norm: Callable, attention: Callable, feed_forward_norm: Callable, feed_forward: Callable
):
    """Add the attention of the normalized input, then the feed-forward network of the normalized sum.

    Args:
        x: hidden states, (B, T, D).
        attention_norm: function (B, T, D) -> (B, T, D).
        attention: function (B, T, D) -> ((B, T, D), memory); see `core.attention.attention`.
        feed_forward_norm: function (B, T, D) -> (B, T, D).
        feed_forward: function (B, T, D) -> (B, T, D).

    Returns:
        `(hidden states (B, T, D), memory)`.

    Reference: Touvron et al., "LLaMA" (arXiv:2302.13971), section 2.2 (pre-normalization).
    """
    attended, memory = attention(attention_norm(x))
    x = x + attended
    return x + feed_forward(feed_forward_norm(x)), memory
