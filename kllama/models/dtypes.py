"""Which dtype a loaded model gets."""

import keras


def resolve_dtype(dtype, file_dtype: str):
    """Choose the dtype of a loaded model: the caller's, else a global policy that was changed, else the file's own.

    Args:
        dtype: what the caller asked for: a dtype, a `keras.DTypePolicy`, or None.
        file_dtype: the dtype or policy name that the file states.
    """
    if dtype is not None:
        return dtype
    policy = keras.config.dtype_policy()
    return file_dtype if policy.name == "float32" else policy
