"""Which dtype a loaded model gets."""

import keras

from kllama.checkpoints.preset_dtype import INT8, LayerDtypes

_INT8_FROM = f"{INT8}_from_"


def resolve_dtype(dtype, file_dtype: str | LayerDtypes):
    """Choose the dtype of a loaded model: the caller's, else a global policy that was changed, else the file's own.

    Layers that the file holds as int8 stay int8; the choice is then that of their scales, and of the other layers.

    Args:
        dtype: what the caller asked for: a dtype, a `keras.DTypePolicy`, or None.
        file_dtype: the dtype or policy name that the file states, or those of its layers.
    """
    if dtype is None and keras.config.dtype_policy().name != "float32":
        dtype = keras.config.dtype_policy()
    if isinstance(file_dtype, str):
        return file_dtype if dtype is None else dtype
    default, layers = file_dtype
    if dtype is not None:
        policy = keras.dtype_policies.get(dtype)
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            return policy
        default = policy.name.removeprefix(_INT8_FROM)
        layers = {path: name for path, name in layers.items() if name == INT8}
    names = {path: _INT8_FROM + default if name == INT8 else name for path, name in layers.items()}
    policies = {path: keras.dtype_policies.get(name) for path, name in names.items()}
    return keras.dtype_policies.DTypePolicyMap(default, policies)
