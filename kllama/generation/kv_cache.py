"""The keys and values of earlier positions, and who sees them: the one place that knows how they are laid out.

A layer's cache is a pair of tensors, keys and values, each (B * K, S, H): the heads of all rows in one axis, so that a
step writes one block of memory, which every framework can do in place. S is the number of slots, not of positions: a
ragged batch is read padded on the right, and what is written afterwards goes to the same slot in every row. With
prompts of 2 and 4 tokens, in a bucket of 8:

    slot     0  1  2  3 | 4  5 ...     first = 4, the longest prompt; what prefill left in slots 4 to 7 is
    row 0    a  b  .  . | x0 x1        overwritten before it is seen; '.' is never seen
    row 1    c  d  e  f | y0 y1

Row b has its token number i after the prompt at slot first + i and at position lengths[b] + i. Called by the engine.
"""

from kllama import backend


def make(keys, values, num_slots: int) -> tuple:
    """Make a layer's cache of the keys and values (B, T, K, H) of prompts, with room for `num_slots` >= T positions."""
    dtype = backend.cache_dtype(keys.dtype)
    return tuple(backend.grow_slots(backend.cast(_flat(x), dtype), num_slots) for x in (keys, values))


def num_bytes(num_rows: int, num_slots: int, num_heads: int, head_dim: int, dtype: str) -> int:
    """Give the memory that a layer's cache takes, for keys and values computed in some dtype."""
    item = {"float64": 8, "float32": 4}.get(backend.cache_dtype(dtype), 2)
    return 2 * item * num_rows * num_slots * num_heads * head_dim


def write(cache: tuple, keys, values, slot) -> tuple:
    """Write the keys and values (B, T, K, H) of new tokens at the slots from `slot` on; the cache given is used up."""
    return tuple(backend.write_slots(old, _flat(new), slot) for old, new in zip(cache, (keys, values), strict=True))


def attend(query, cache: tuple, visible):
    """Attend from queries (B, T, N, H) to the slots that are visible, bool (1 or B, T, S): context (B, T, N, H)."""
    keys, values = cache
    batch_size, length, num_heads, head_dim = backend.shape(query)
    num_groups = backend.shape(keys)[0] // batch_size  # K, and G query heads to each of them
    heads = backend.reshape(query, (batch_size, length, num_groups, num_heads // num_groups, head_dim))
    heads = backend.transpose(heads, (0, 2, 1, 3, 4))
    heads = backend.reshape(heads, (batch_size, num_groups, length * num_heads // num_groups, head_dim))
    if length > 1:
        visible = backend.repeat_axis(visible, num_heads // num_groups, 1)
    context = backend.slot_attention(heads, keys, values, visible[:, None])
    context = backend.reshape(context, (batch_size, num_groups, length, num_heads // num_groups, head_dim))
    return backend.reshape(backend.transpose(context, (0, 2, 1, 3, 4)), (batch_size, length, num_heads, head_dim))


def grow(caches: list, num_slots: int) -> list:
    """Give the caches of all layers more slots."""
    return [tuple(backend.grow_slots(x, num_slots) for x in cache) for cache in caches]


def repeat(caches: list, count: int, rows) -> list:
    """Give each row of the caches `count` times, one after another; `rows` is (B,)."""
    return [tuple(_repeated(x, count, backend.shape(rows)[0]) for x in cache) for cache in caches]


def visible_slots(num_slots: int, lengths, first, index, window: int | None):
    """Tell which slots each row's token number `index` after the prompt sees: bool (B, 1, S).

    Args:
        num_slots: S.
        lengths: int32 (B,), the prompts' lengths.
        first: int32 scalar, the slot of the first token after the prompts.
        index: int32 scalar.
        window: None, or the number of positions that a token sees at most, its own included.
    """
    slots = backend.arange(num_slots, lengths)[None]
    lengths = lengths[:, None]
    visible = (slots < lengths) | ((slots >= first) & (slots <= first + index))
    if window is not None:
        positions = backend.where(slots < lengths, slots, slots - first + lengths)
        visible = visible & (positions > lengths + index - window)
    return visible[:, None]


def _repeated(x, count: int, batch_size: int):
    """(B * K, S, H) -> (B * count * K, S, H)."""
    heads, num_slots, head_dim = backend.shape(x)
    rows = backend.reshape(x, (batch_size, heads // batch_size, num_slots, head_dim))
    return backend.reshape(backend.repeat_axis(rows, count, 0), (heads * count, num_slots, head_dim))


def _flat(x):
    """(B, T, K, H) -> (B * K, T, H)."""
    batch_size, length, num_groups, head_dim = backend.shape(x)
    return backend.reshape(backend.transpose(x, (0, 2, 1, 3)), (batch_size * num_groups, length, head_dim))
