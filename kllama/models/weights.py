"""Building a model without random weights, and filling it with a checkpoint's.

Knows Keras variables and NumPy arrays; knows no file format. Called by `models/`.
"""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras_hub.src.utils.tensor_utils import get_tensor_size_in_bits

from kllama.checkpoints import progress
from kllama.checkpoints.presets.keras_hub import read_weight_file
from kllama.errors import CheckpointError

_WAITING = "uninitialized_variables"


@contextmanager
def uninitialized_weights() -> Iterator[None]:
    """Build models inside with variables that have a shape and a dtype but no values yet."""
    # Keras keeps a list of variables to initialize at the end of the next scope. These get their values here instead.
    others = global_state.get_global_attribute(_WAITING, [])
    global_state.set_global_attribute(_WAITING, [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(_WAITING, others)


def assign_weights(model: keras.Model, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Give every weight of a model built under `uninitialized_weights` its value, one tensor at a time.

    Each tensor goes straight to its weight's dtype, so at most one is held besides the model. What is no weight (the
    state of random generators) gets the value its own initializer gives.

    Args:
        model: the model.
        tensors: (variable path, array) for each weight, in any order.

    Raises:
        CheckpointError: if a tensor has no weight or a weight no tensor, if one is given twice, or a shape differs.
    """
    waiting, filled = {weight.path: weight for weight in model.weights}, set()
    total = sum(math.prod(weight.shape) for weight in model.weights)
    for path, array in progress.track(tensors, "loading weights", total, size=lambda pair: pair[1].size):
        if path in filled:
            raise CheckpointError(f"{path}: the checkpoint gives a tensor twice; expected each once.")
        if path not in waiting:
            raise CheckpointError(f"{path}: the checkpoint gives a tensor for it; expected one of the model's weights.")
        filled.add(path)
        _initialize(waiting.pop(path), array)
    if waiting:
        raise CheckpointError(
            f"{sorted(waiting)[:10]}: the checkpoint gives no tensor for these {len(waiting)} weights."
        )
    for variable in model.variables:
        if variable._value is None:
            variable._deferred_initialize()


def count_bytes(model: keras.Model) -> int:
    """Count the bytes of a model's weights."""
    return sum(get_tensor_size_in_bits(weight.shape, weight.dtype) for weight in model.weights) // 8


def load_keras_hub_weights(backbone: keras.Model, file: str | os.PathLike) -> bool:
    """Load a `.weights.h5` file that KerasHub's Llama wrote; matrices of LoRA become zero, as in Keras.

    Args:
        backbone: a `LlamaBackbone`.
        file: what `load_weights` was given.

    Returns:
        Whether it was such a file. Another one is left to Keras.

    Raises:
        CheckpointError: a damaged file, or other weights than the backbone has.
    """
    path = Path(file)
    if not path.name.endswith(".weights.h5") or not path.is_file():
        return False
    modes = {layer.path: layer.quantization_mode for layer in backbone._flatten_layers(include_self=False)}
    tensors = read_weight_file(path, backbone.get_config(), lambda layer: modes[layer] == "int8")
    if tensors is None:
        return False
    weights = {weight.path: weight for weight in backbone.weights}
    for name, array in progress.track(tensors, "loading weights", total=len(weights)):
        weights[name].assign(keras.ops.convert_to_tensor(np.ascontiguousarray(array), dtype=weights[name].dtype))
    for name, weight in weights.items():
        if "/lora_" in name:
            weight.assign(keras.ops.zeros(weight.shape, dtype=weight.dtype))
    return True


def _initialize(variable: keras.Variable, array: np.ndarray) -> None:
    if tuple(array.shape) != tuple(variable.shape):
        raise CheckpointError(f"{variable.path}: shape = {tuple(array.shape)}; expected {tuple(variable.shape)}.")
    # Keras has no public way to give an uninitialized variable its first value.
    variable._initialize(keras.ops.convert_to_tensor(array, dtype=variable.dtype))
    variable._initializer = None
