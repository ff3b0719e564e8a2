"""Preset directories of KerasHub's own Llama and Llama 3, and of keras-nlp's before it.

    config.json                       the backbone: {"registered_name": "keras_hub>Llama3Backbone", "config": {...}}
    model.weights.h5                  its weights, or model.weights.json and several model_*.weights.h5
    task.json                         may be there, and the files of `keras_hub_tokenizer.py`

It reads what `save_to_preset` of KerasHub 0.32 and older ones write, field by field, and gives kllama's arguments and
tensors. KerasHub does not write whether the head is tied, and its presets of Llama 3.2 hold a copy of the table for a
head: both are told from the weights. Builds no model: `models/` does.
"""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kllama.checkpoints.checkpoint import STRICT, Checkpoint, Strictness
from kllama.checkpoints.files.reader import listed, shown
from kllama.checkpoints.presets.dtype import LayerDtypes, read_layer_dtypes
from kllama.checkpoints.presets.fields import COUNT, FLAG, NUMBER, STRING, read_fields
from kllama.checkpoints.presets.h5_weights import H5Weights, find_group
from kllama.checkpoints.presets.keras_hub_tokenizer import (
    generation_config,
    names_keras_hub,
    preprocessor_config,
    read_class,
    tokenizer_config,
)
from kllama.checkpoints.presets.tensors import PresetTensor, check_tensors, preset_tensors, read_tensors
from kllama.errors import CheckpointError

_LOGGER = logging.getLogger(__name__)
_CONFIG = "config.json"
_TASK = "task.json"
_BLOCK = 2**22  # values of a table and of a head that are compared at a time

# What `get_config` of each class writes. Ranges and how values fit together are for kllama's constructors to check.
_ROPE_FIELDS = {
    "rope_scaling_factor": NUMBER.since(1),  # before the five others
    "rope_position_scaling_factor": NUMBER.since(1),
    "rope_frequency_adjustment_factor": NUMBER.or_null().since(None),
    "rope_low_freq_factor": NUMBER.or_null().since(None),
    "rope_high_freq_factor": NUMBER.or_null().since(None),
    "rope_pretraining_sequence_length": COUNT.or_null().since(None),
}
_BACKBONE_FIELDS = {
    "name": STRING,
    "trainable": FLAG,
    "vocabulary_size": COUNT,
    "num_layers": COUNT,
    "num_query_heads": COUNT,
    "hidden_dim": COUNT,
    "intermediate_dim": COUNT,
    "num_key_value_heads": COUNT,
    "rope_max_wavelength": NUMBER,
    **_ROPE_FIELDS,
    "layer_norm_epsilon": NUMBER,
    "dropout": NUMBER,
    "tie_word_embeddings": FLAG.or_null().since(None),  # not written by KerasHub 0.32
}
_LLAMA3_SCALING = {
    "rope_frequency_adjustment_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_pretraining_sequence_length": "original_max_position_embeddings",
}
# What layers are called in the file, and parts of layers where it is not their name with an underscore.
_LAYERS = {"token_embedding": "reversible_embedding", "sequence_output_layernorm": "llama_layer_norm"}
_PARTS = {
    "self_attention": "_self_attention_layer",
    "query": "_query_dense",
    "key": "_key_dense",
    "value": "_value_dense",
    "attention_output": "_output_dense",
}
_FIRST_LAYER = "llama_transformer_decoder"
# Where a weight file has its layers: that of a backbone, or of a language model around one.
_LAYER_GROUPS = ("layers", "layers/llama_backbone/layers", "layers/llama3_backbone/layers")
_NORM = "layers/llama_layer_norm/vars/0"
_EMBEDDING = "layers/reversible_embedding/vars"


def is_keras_hub(path: Path) -> bool:
    """Tell whether a path is a directory whose `config.json` is that of a class of KerasHub."""
    return names_keras_hub(path / _CONFIG)


class KerasHubCheckpoint(Checkpoint):
    """An opened preset directory of KerasHub's Llama or Llama 3.

    Args:
        path: the directory.

    Attributes: those that `kllama.checkpoints.formats.open_checkpoint` describes.

    Raises:
        MissingFileError: if `config.json`, the weights or the tokenizer's vocabulary are missing.
        UnsupportedError: if it holds another class, or asks for what kllama does not do.
        CheckpointError: if a file is damaged, or the weights are not exactly those that `config.json` asks for.
    """

    format = "KerasHub preset"

    def __init__(self, path: Path, strictness: Strictness = STRICT):
        self.path = path
        config_file = path / _CONFIG
        config = read_class(config_file, "Backbone")
        stated = [config.pop("dtype")] if "dtype" in config else []  # keras-nlp did not write it
        self.backbone_config = _read_backbone_config(config_file, config)
        self._dtypes = LayerDtypes(None, {})
        for dtype in stated:
            self._dtypes = read_layer_dtypes(config_file, dtype, self.backbone_config["num_layers"])
        self.tokenizer_config = tokenizer_config(path)
        self.preprocessor_config = preprocessor_config(path)
        self.generation_config = generation_config(path)
        if (path / _TASK).is_file():
            read_class(path / _TASK, "CausalLM")  # whose fields are those of the other files
        self._strictness = strictness
        self._weights = H5Weights(path)
        self.stored_bytes = self._weights.stored_bytes
        self._settle_head()
        self.dtype = self._dtypes.or_default(self._weights.tensors[_NORM].dtype, path)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (variable path, array) for each weight, one at a time, in the dtype that it is stored in.

        Raises:
            CheckpointError: values that are not finite, scales that cannot be divided by, or a file that changed since
                it was opened.
        """
        yield from read_tensors(self._weights, self._expected_tensors(), self._strictness)

    def _expected_tensors(self) -> Iterator[PresetTensor]:
        return _expected_tensors(self.backbone_config, self._dtypes.quantizes)

    def _settle_head(self) -> None:
        """Find out whether the head is the embedding table, and check that the tensors are the expected ones."""
        config = self.backbone_config
        is_int8 = self._dtypes.quantizes("token_embedding")
        pairs = ((0, 2), (1, 3)) if is_int8 else ((0, 1),)  # places of table and head, then those of their scales
        if config["tie_word_embeddings"] is None:
            config["tie_word_embeddings"] = f"{_EMBEDDING}/{pairs[0][1]}" not in self._weights.tensors
        check_tensors(self._expected_tensors, self._weights.tensors, self.path, self._strictness)
        if not config["tie_word_embeddings"] and all(self._is_copy(*pair) for pair in pairs):
            config["tie_word_embeddings"] = True
            _LOGGER.info("%s: the head is a copy of the embedding table; the two are tied again.", self.path)

    def _is_copy(self, table: int, head: int) -> bool:
        """Compare two variables of the embedding, one transposed; block by block, up to the first difference."""
        table, head = f"{_EMBEDDING}/{table}", f"{_EMBEDDING}/{head}"
        shape = self._weights.tensors[table].shape
        num_rows = max(1, _BLOCK // math.prod(shape[1:]))
        for start in range(0, shape[0], num_rows):
            rows = slice(start, start + num_rows)
            part = self._weights.read_part(head, (..., rows))
            if not np.array_equal(self._weights.read_part(table, (rows,)), part.T):
                return False
        return True


def read_weight_file(
    path: Path, config: dict, quantizes: Callable[[str], bool]
) -> Iterator[tuple[str, np.ndarray]] | None:
    """Read a `.weights.h5` file that `save_weights` of KerasHub's backbone or language model wrote.

    Args:
        path: the file.
        config: arguments of the `LlamaBackbone` that it is for.
        quantizes: tells by its path whether a layer of that backbone is quantised to int8.

    Returns:
        Pairs (variable path, array) for each weight, one at a time; None if the file is not KerasHub's.

    Raises:
        CheckpointError: a damaged file, or other weights than the backbone has.
    """
    outer = find_group(path, tuple(f"{group}/{_FIRST_LAYER}" for group in _LAYER_GROUPS))
    if outer is None:
        return None
    group = outer.removesuffix(f"/{_FIRST_LAYER}")
    weights, prefix = H5Weights(path, group), group.removesuffix("layers")
    tensors = [tensor._replace(place=prefix + tensor.place) for tensor in _expected_tensors(config, quantizes)]
    check_tensors(lambda: iter(tensors), weights.tensors, path)
    return read_tensors(weights, tensors)


def _expected_tensors(config: dict, quantizes: Callable[[str], bool]) -> Iterator[PresetTensor]:
    for tensor in preset_tensors(config, quantizes, _group):
        # Its feed-forward layers are of a class that keeps scales without the axes for batch and position.
        is_dense_scale = tensor.path.endswith("_dense/kernel_scale")
        yield tensor._replace(stored_shape=tensor.shape[2:]) if is_dense_scale else tensor


def _read_backbone_config(file: Path, config: dict) -> dict:
    fields = read_fields(file, config, _BACKBONE_FIELDS)
    hidden_dim, num_heads = fields["hidden_dim"], fields["num_query_heads"]
    if hidden_dim % num_heads:
        raise CheckpointError(
            f"{file}: hidden_dim = {hidden_dim}; expected a multiple of num_query_heads ({num_heads})."
        )
    rope = {name: fields.pop(name) for name in _ROPE_FIELDS}
    return {
        **fields,
        "head_dim": hidden_dim // num_heads,
        "rope_scaling": _rope_scaling(file, rope),
        "attention_bias": False,
        "attention_output_bias": False,
        "qk_norm": False,
        "mlp_bias": False,
    }


def _rope_scaling(file: Path, rope: dict) -> dict | None:
    """Translate KerasHub's six keywords into the one mapping that kllama has."""
    llama3 = {ours: rope[theirs] for theirs, ours in _LLAMA3_SCALING.items()}
    factors = [rope[name] for name in ("rope_scaling_factor", "rope_position_scaling_factor") if rope[name] != 1]
    if len(factors) + any(value is not None for value in llama3.values()) > 1:
        raise CheckpointError(f"{file}: position scaling is given more than once: {shown(rope)}; expected one kind.")
    if factors:
        return {"rope_type": "linear", "factor": factors[0]}
    given = [name for name in _LLAMA3_SCALING if rope[name] is not None]
    missing = [name for name in _LLAMA3_SCALING if rope[name] is None]
    if given and missing:
        raise CheckpointError(f"{file}: {listed(missing)} = null; expected a number, as {', '.join(given)} is given.")
    return None if missing else {"rope_type": "llama3", **llama3}


def _group(layer: str) -> str:
    """Give the group of a layer's variables, which Keras names after classes and attributes.

    That of `transformer_layer_3/self_attention/query` is
    `layers/llama_transformer_decoder_3/_self_attention_layer/_query_dense`.
    """
    outer, *inner = layer.split("/")
    outer = outer.replace("transformer_layer", "llama_transformer_decoder").removesuffix("_0")
    return "/".join(["layers", _LAYERS.get(outer, outer), *(_PARTS.get(name, f"_{name}") for name in inner)])
