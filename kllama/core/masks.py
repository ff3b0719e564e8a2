"""Who may see whom: the masks of attention.

Row b of a batch of three, T = 4; `1` in the padding mask is a real token. A query sees the real tokens up to itself,
and always itself, so that no row of the softmax is empty (what a pad position computes is never read):

    padding mask   0 1 1 1        query 0 sees  0
                                  query 1 sees    1
                                  query 2 sees    1 2
                                  query 3 sees    1 2 3

With a sliding window of two keys, query 3 sees only keys 2 and 3: the window counts positions, the query's own too.
"""

import numpy as np

from kllama import backend

LAYER_TYPES = ("full_attention", "sliding_attention")
"""What the queries of a layer see: all keys before them, or those of a sliding window. Hugging Face's names."""


def causal_mask(queries, padding_mask=None, window: int | None = None):
    """Build the mask of a whole sequence, or None where the causal flag alone says it.

    That is so without padding, and with padding on the right only: no real token comes after a pad, so none sees one.
    Inside a compiled program the values are not known, and a mask given is a mask built. A window is felt only by
    sequences that are longer.

    Args:
        queries: a tensor (B, T, ...), for T and the device alone.
        padding_mask: None, or (B, T) with 1 for real tokens.
        window: None, or the number of keys that a query sees at most.

    Returns:
        None, or bool (1 or B, 1, T, T): True where query t may see key s.
    """
    length = backend.shape(queries)[1]
    has_padding = padding_mask is not None and not _is_right_padded(backend.concrete(padding_mask))
    if not has_padding and (window is None or (isinstance(length, int) and length <= window)):
        return None
    positions = backend.arange(length, queries)
    visible = _visible(positions, positions, window)
    if not has_padding:
        return visible[None, None]
    real = backend.cast(padding_mask, "bool")
    itself = positions[None, :] == positions[:, None]
    return (visible[None] & (real[:, None, :] | itself[None]))[:, None]


def cached_causal_mask(queries, num_slots, start, window: int | None = None):
    """Build the mask of T queries at slots `start` to `start + T - 1` of a cache: query t sees slots 0 to start + t.

    Args:
        queries: a tensor (B, T, ...), for T and the device alone.
        num_slots: S, the number of slots of the cache.
        start: int or int32 scalar, the slot of the first query.
        window: None, or the number of slots that a query sees at most.

    Returns:
        bool (1, 1, T, S).
    """
    positions = backend.arange(backend.shape(queries)[1], queries) + start
    return _visible(positions, backend.arange(num_slots, queries), window)[None, None]


@backend.one_program("window")
def _visible(queries, keys, window: int | None):
    """Tell which keys come no later than a query, and no more than a window before: bool (T, S), from positions."""
    visible = keys[None, :] <= queries[:, None]
    return visible if window is None else visible & (keys[None, :] > queries[:, None] - window)


def _is_right_padded(padding_mask: np.ndarray | None) -> bool:
    if padding_mask is None:
        return False
    real = padding_mask > 0
    return bool(np.all(real[:, :-1] >= real[:, 1:]))
