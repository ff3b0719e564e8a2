"""Grouped-query attention with rotary positions."""

from collections.abc import Callable

from kllama import backend
from kllama.core.masks import cached_causal_mask


def attention(x, query: Callable, key: Callable, value: Callable, output: Callable, rotary: tuple, attend: Callable):
    """Attend from every position to those that `attend` lets it see: project, rotate, attend, project.

    Args:
        x: normalized hidden states, (B, T, D).
        query: projection (B, T, D) -> (B, T, N, H).
        key: projection (B, T, D) -> (B, T, K, H).
        value: projection (B, T, D) -> (B, T, K, H).
        output: projection (B, T, N, H) -> (B, T, D).
        rotary: cosines and sines of the positions of this call, each (1 or B, T, 1, H / 2).
        attend: function (query, key, value) -> (context (B, T, N, H), memory). It knows the mask and, when decoding,
            the cache; `memory` is whatever it wants handed back, such as the updated cache.

    Returns:
        `(output (B, T, D), memory)`.

    Reference: Ainslie et al., "GQA" (arXiv:2305.13245), section 2.2; Su et al., "RoFormer" (arXiv:2104.09864),
    section 3.2.
    """
    context, memory = attend(rotate(query(x), *rotary), rotate(key(x), *rotary), value(x))
    return output(context), memory


@backend.one_program()
def rotate(x, cos, sin):
    """Turn the pairs (i, i + H / 2) of each head by the angles of their positions.

    This is the half-split layout of Hugging Face checkpoints; Meta's interleaves the pairs (2 i, 2 i + 1).

    Args:
        x: queries or keys, (B, T, N or K, H).
        cos: cosines, (1 or B, T, 1, H / 2).
        sin: sines, the same shape.

    Returns:
        Tensor of x's shape and dtype.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return backend.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def scaled_dot_product(query, key, value, mask=None, is_causal: bool = False, dropout: Callable | None = None):
    """Mix the values by the softmax of the scaled query-key products, heads in groups.

    Query head n reads key/value head n // G; keys and values are never repeated to the query heads. The softmax is
    computed in float32.

    Args:
        query: (B, T, N, H).
        key: (B, S, K, H), where K divides N.
        value: (B, S, K, H).
        mask: None, or bool (1 or B, 1, T, S): True where the query may see the key. It says everything: the causal
            flag is then ignored.
        is_causal: without a mask, whether query t sees only keys 0 to t (T must equal S).
        dropout: function applied to the probabilities, or None.

    Returns:
        Context (B, T, N, H) in query's dtype.
    """
    if dropout is None and backend.fused_attention is not None:
        return backend.fused_attention(query, key, value, mask, is_causal and mask is None)
    if mask is None and is_causal:
        mask = cached_causal_mask(query, backend.shape(key)[1], 0)
    return _grouped_attention(query, key, value, mask, dropout)


def _grouped_attention(query, key, value, mask, dropout):
    num_heads, head_dim = query.shape[2:]
    num_groups = key.shape[2]
    # (B, T, N, H) -> (B, T, K, G, H): heads 0 to G - 1 belong to key/value head 0, and so on.
    batch_size, length = backend.shape(query)[:2]
    # Scaled before the product, which could overflow float16 otherwise.
    grouped = backend.reshape(
        query * head_dim**-0.5, (batch_size, length, num_groups, num_heads // num_groups, head_dim)
    )
    scores = backend.cast(backend.einsum("btkgh,bskh->bkgts", grouped, key), "float32")
    if mask is not None:
        scores = backend.where(mask[:, :, None], scores, -1e30)
    probabilities = backend.cast(backend.softmax(scores), value.dtype)
    if dropout is not None:
        probabilities = dropout(probabilities)
    context = backend.einsum("bkgts,bskh->btkgh", probabilities, value)
    return backend.reshape(context, (batch_size, length, num_heads, head_dim))
