"""Whether what a call writes fits into memory: computed from shapes, before anything is allocated."""

import numpy as np

from kllama import backend
from kllama.errors import ResourceError
from kllama.generation import kv_cache


def check_memory(backbone, limits: np.ndarray, num_sequences: int, one_by_one: bool = False) -> None:
    """Raise a ResourceError for rows whose keys and values are more than the device could ever hold.

    Args:
        backbone: a `LlamaBackbone`.
        limits: int32 (B,), the length at which each prompt's rows end.
        num_sequences: how many rows each prompt has.
        one_by_one: whether the rows are written one after another.
    """
    available = backend.device_memory()
    if available is None or not len(limits):  # TensorFlow does not tell the memory of a GPU
        return
    num_rows, num_slots = 1 if one_by_one else len(limits) * num_sequences, int(limits.max())
    sizes = backbone.num_key_value_heads, backbone.head_dim, backbone.compute_dtype
    needed = backbone.num_layers * kv_cache.num_bytes(num_rows, num_slots, *sizes)
    if needed > available:
        raise ResourceError(
            f"{num_rows} rows of up to {num_slots} positions need {needed} bytes for their keys and values; the device "
            f"has {available} bytes in all. Continue fewer rows at once, or lower max_new_tokens or max_length."
        )
