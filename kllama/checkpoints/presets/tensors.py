"""The tensors of a preset: what kllama stores, with the scales of quantised layers, at Keras' places in the file.

Keras files a layer's variables by their order, not their names: a projection has its kernel, its bias and its scale;
the embedding its table, the scale of that, the head, and the scale of that. Which group of the file is which layer's is
for the formats, `reading.py` and `keras_hub.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from kllama.checkpoints.checkpoint import STRICT, Strictness
from kllama.checkpoints.files.reader import LISTED, listed
from kllama.checkpoints.name_map import expected_tensors
from kllama.checkpoints.presets.h5_weights import FLOATS, H5Weights, StoredTensor
from kllama.errors import CheckpointError

_INT8 = ("int8",)


class PresetTensor(NamedTuple):
    """A tensor that a preset must have.

    Attributes:
        path: of the variable.
        shape: of the variable.
        place: the name of the dataset.
        stored_shape: of the dataset; the same values in the same order.
        dtypes: those that it may be stored in.
    """

    path: str
    shape: tuple[int, ...]
    place: str
    stored_shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def preset_tensors(
    config: dict, quantizes: Callable[[str], bool], group: Callable[[str], str]
) -> Iterator[PresetTensor]:
    """Yield exactly the tensors of a model, lazily, as `name_map.expected_tensors` does.

    Args:
        config: arguments of `LlamaBackbone`, `head_dim` and both biases among them.
        quantizes: tells by its path whether a layer that has a kernel is quantised to int8.
        group: the group of the file that a layer's variables are in, by the path of the layer.
    """
    for path, shape in ((tensor.path, tensor.shape) for tensor in expected_tensors(config)):
        layer, variable = path.rsplit("/", 1)
        has_bias = config[_bias_setting(layer)]
        is_int8 = variable not in ("bias", "scale") and quantizes(layer)
        index = {"bias": 1, "reverse_embeddings": 2 if is_int8 else 1}.get(variable, 0)
        place = f"{group(layer)}/vars"
        yield PresetTensor(path, shape, f"{place}/{index}", shape, _INT8 if is_int8 else FLOATS)
        if is_int8:
            index += 2 if variable == "kernel" and has_bias else 1
            shape = _scale_shape(layer, variable, shape)
            yield PresetTensor(f"{path}_scale", shape, f"{place}/{index}", shape, FLOATS)


def _bias_setting(layer: str) -> str:
    if layer.endswith("/attention_output"):
        return "attention_output_bias"
    return "attention_bias" if "/self_attention/" in layer else "mlp_bias"


def _scale_shape(layer: str, variable: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the shape of a scale: one number a token, or one an output of a projection after axes for B and T."""
    if variable == "embeddings":
        return shape[:1]
    if variable == "reverse_embeddings":
        return shape[1:]
    num_inputs = 2 if layer.endswith("/attention_output") else 1
    return (1, 1, *shape[num_inputs:])


def read_tensors(
    weights: H5Weights, tensors: Iterable[PresetTensor], strictness: Strictness = STRICT
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (variable path, array) for each tensor, one at a time, in the dtype that it is stored in.

    Raises:
        CheckpointError: values that are not finite and must be, scales that int8 cannot be divided by, or a file that
            changed.
    """
    tensors = list(tensors)
    arrays = weights.read([tensor.place for tensor in tensors], strictness.check_finite)
    for tensor, array in zip(tensors, arrays, strict=True):
        if tensor.path.endswith("_scale"):
            _check_scale(array, f"{weights.tensors[tensor.place].file}: {tensor.place}")
        yield tensor.path, array.reshape(tensor.shape)


def _check_scale(array: np.ndarray, field: str) -> None:
    """Refuse a scale that makes infinity of an int8 value, which is divided by it: also what is all but zero."""
    smallest = 128 / float(ml_dtypes.finfo(array.dtype).max)
    count = np.count_nonzero(array.astype("float64") < smallest)
    if count:
        raise CheckpointError(
            f"{field} = {count} of {array.size} scales are zero, negative or below {smallest:.1e}; expected positive "
            "numbers. Quantise and save it again."
        )


def check_tensors(
    expected: Callable[[], Iterable[PresetTensor]],
    stored: dict[str, StoredTensor],
    path: Path,
    strictness: Strictness = STRICT,
) -> None:
    """Compare what the configuration asks for with what the files hold: the exact set of names, shapes and dtypes.

    Args:
        expected: makes an iterator over the tensors that must be there.
        stored: what is there, by place.
        path: the preset, for messages.
        strictness: whether tensors that are there besides are refused.

    Raises:
        CheckpointError: naming up to ten tensors.
    """
    # Lazily: at most ten missing names are looked for, however many layers the configuration claims.
    lacking = (f"{tensor.place} {tensor.stored_shape}" for tensor in expected() if tensor.place not in stored)
    missing = list(islice(lacking, LISTED))
    if missing:
        raise CheckpointError(f"{path}: missing tensors: {listed(missing)}.")
    tensors = {tensor.place: tensor for tensor in expected()}
    unused = sorted(set(stored) - set(tensors))
    if unused:
        strictness.refuse_unused(
            f"{path}: unused: {listed(unused)}; expected only the tensors that config.json asks for."
        )
    wrong = [name for name, tensor in tensors.items() if stored[name].shape != tensor.stored_shape]
    if wrong:
        received = (f"{name} has shape {stored[name].shape}; expected {tensors[name].stored_shape}" for name in wrong)
        raise CheckpointError(f"{path}: {listed(received, '. ')}.")
    for name, tensor in tensors.items():
        if stored[name].dtype not in tensor.dtypes:
            allowed = "one of " * (len(tensor.dtypes) > 1) + ", ".join(tensor.dtypes)
            raise CheckpointError(f"{stored[name].file}: {name} is {stored[name].dtype}; expected {allowed}.")
