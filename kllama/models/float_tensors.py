"""The weights of a model as plain float arrays: what goes out to formats that know neither LoRA nor Keras' int8.

The exports of this folder read a model through this file. It writes nothing and changes nothing in the model.
"""

from collections.abc import Iterator

import keras
import numpy as np

from kllama.checkpoints.name_map import expected_tensors
from kllama.errors import UnsupportedError
from kllama.models.backbone_arguments import CONFIG_NAMES

_PIECE_BYTES = 2**25
_FLOATS = ("float32", "bfloat16", "float16")


def architecture(backbone: keras.Model) -> dict:
    """Give the arguments of a backbone without `dtype`, which `get_config` cannot state of every quantised one."""
    return {name: getattr(backbone, name) for name in CONFIG_NAMES}


def stored_dtype(backbone: keras.Model) -> str:
    """Give the dtype in which the weights lose nothing: that of the variables, float32 where they differ.

    That of an int8 layer is the one of its scales. The matrices of LoRA do not count.
    """
    dtypes = {weight.dtype for weight in backbone.weights if "/lora_" not in weight.path and weight.dtype in _FLOATS}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def float_tensors(backbone: keras.Model) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (variable path, array) for each weight, in kllama's shape, one at a time, in the order of the computation.

    int8 codes are divided by their scales, and the matrices of LoRA are merged, `W + (alpha / R) A B`: both in float32.
    Every other weight comes in the dtype of its variable. float8 layers keep float kernels, which are what comes.

    Args:
        backbone: a `LlamaBackbone`.

    Raises:
        UnsupportedError: for layers that are quantised to other than int8 or float8, before anything is read.
    """
    layers = {layer.path: layer for layer in backbone._flatten_layers(include_self=False)}
    packed = [path for path, layer in layers.items() if layer.quantization_mode not in (None, "int8", "float8")]
    if packed:
        raise UnsupportedError(
            f"{packed[0]}: quantization_mode = {layers[packed[0]].quantization_mode!r}; expected int8 or none in an "
            "export. Load the model as it was before it was quantised."
        )
    weights = {weight.path: weight for weight in backbone.weights}
    return ((tensor.path, _read(tensor.path, weights, layers)) for tensor in expected_tensors(architecture(backbone)))


def _read(path: str, weights: dict[str, keras.Variable], layers: dict[str, keras.layers.Layer]) -> np.ndarray:
    array = _to_numpy(weights[path])
    if array.dtype == np.int8:  # float8 has a scale, too, which says nothing about the float kernel
        array = _dequantized(path, array, _to_numpy(weights[f"{path}_scale"]))
    layer, name = path.rsplit("/", 1)
    if f"{layer}/lora_{name}_a" in weights:
        first, second = (_to_numpy(weights[f"{layer}/lora_{name}_{matrix}"]) for matrix in "ab")
        factor = layers[layer].lora_alpha / layers[layer].lora_rank
        array = array.astype("float32") + np.float32(factor) * (first.astype("float32") @ second.astype("float32"))
    return array


def _dequantized(path: str, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Divide codes by their scales: one a token, or one an output, which follows axes of 1 for the inputs."""
    if path.endswith("/embeddings"):
        scale = scale[:, None]
    elif path.endswith("/kernel"):
        scale = scale[0, 0]
    return codes.astype("float32") / scale.astype("float32")


def _to_numpy(weight: keras.Variable) -> np.ndarray:
    """Copy a weight, a large one in pieces: Keras goes from PyTorch's bfloat16 to NumPy's by way of float32, twice."""
    array = np.empty(weight.shape, weight.dtype)
    num_rows = max(1, _PIECE_BYTES * len(array) // array.nbytes)
    for start in range(0, len(array), num_rows):
        piece = weight.value if num_rows >= len(array) else weight.value[start : start + num_rows]
        array[start : start + num_rows] = keras.ops.convert_to_numpy(piece)
    return array
