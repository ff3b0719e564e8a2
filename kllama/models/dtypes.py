"""Which dtype a loaded model gets."""

import keras

from kllama.checkpoints.presets.dtype import INT8, LayerDtypes

_INT8_FROM = f"{INT8}_from_"
_TOO_NARROW = ("float16", "mixed_float16")


def check_dtype(dtype) -> None:
    """Raise a ValueError for a dtype that Keras does not know, and for a policy that would quantise every layer."""
    try:
        policy = keras.dtype_policies.get(dtype)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"dtype ({dtype!r}) must be a dtype such as 'bfloat16', a policy such as 'mixed_bfloat16', or None."
        ) from error
    if not isinstance(policy, keras.dtype_policies.DTypePolicyMap) and policy.quantization_mode is not None:
        raise ValueError(
            f"dtype ({dtype!r}) must not be a quantised policy, or be a DTypePolicyMap that gives it to single layers. "
            "Build or load the model, and call quantize."
        )


def resolve_dtype(dtype, file_dtype: str | LayerDtypes):
    """Choose the dtype of a loaded model: the caller's, else a global policy that was changed, else the file's own.

    Layers that the file holds as int8 stay int8; the choice is then that of their scales, and of the other layers.

    Args:
        dtype: what the caller asked for: a dtype, a `keras.DTypePolicy`, or None.
        file_dtype: the dtype or policy name that the file states, or those of its layers.

    Raises:
        ValueError: for a dtype that Keras does not know, or that the layers cannot have.
    """
    if dtype is None and keras.config.dtype_policy().name != "float32":
        dtype = keras.config.dtype_policy()
    if isinstance(dtype, str) and not isinstance(file_dtype, str):
        dtype = dtype.removeprefix(_INT8_FROM)
    if dtype is not None:
        check_dtype(dtype)
    if isinstance(file_dtype, str):
        return file_dtype if dtype is None else dtype
    default, layers = file_dtype
    if dtype is not None:
        policy = keras.dtype_policies.get(dtype)
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            return policy
        default = policy.name
        if default in _TOO_NARROW and INT8 in layers.values():
            raise ValueError(f"dtype ({dtype!r}) cannot hold the sums of int8 products; expected another.")
        layers = {path: name for path, name in layers.items() if name == INT8}
    names = {path: _INT8_FROM + default if name == INT8 else name for path, name in layers.items()}
    policies = {path: keras.dtype_policies.get(name) for path, name in names.items()}
    return keras.dtype_policies.DTypePolicyMap(default, policies)
