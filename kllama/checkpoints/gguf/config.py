"""The closed schema of a GGUF file's `{architecture}.*` keys: each is mapped, ignored for a reason, or refused by name.

Keys before other words (`general.`, `tokenizer.`, `split.`, `quantize.`) do not say how a model computes; llama.cpp
reads none of them for it. Reads no files and builds no model; `reading.py` calls it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kllama.checkpoints.files.reader import listed, shown
from kllama.checkpoints.gguf.rope import ORIGINAL, SCALING_KEYS, TYPE
from kllama.checkpoints.name_map import GGUF_LLAMA, GGUF_QWEN, Naming
from kllama.errors import CheckpointError, UnsupportedError

_REQUIRED = object()
_SHOWN = 100  # values of an array: more than a message has room for
_BLOCKS = 2  # the layout of quantised blocks that all files of this format have had so far


class Architecture(NamedTuple):
    """What sets an architecture apart.

    Attributes:
        naming: of the tensors, and whether the rows of q and k are interleaved.
        qk_norm: whether the heads of q and k are normalized.
    """

    naming: Naming
    qk_norm: bool


ARCHITECTURES = {
    "llama": Architecture(GGUF_LLAMA, qk_norm=False),
    "qwen2": Architecture(GGUF_QWEN, qk_norm=False),
    "qwen3": Architecture(GGUF_QWEN, qk_norm=True),
}


class _Field(NamedTuple):
    expected: str
    accepts: Callable[[object], bool]
    default: object = _REQUIRED
    per_layer: bool = False  # whether there may be a number for each layer


def _integer(low: int, high: int, default: object = _REQUIRED, per_layer: bool = False) -> _Field:
    def accepts(value):
        return type(value) is int and low <= value <= high

    return _Field(f"an integer from {low} to {high}", accepts, default, per_layer)


def _number(expected: str, accepts: Callable[[float], bool], default: object = _REQUIRED) -> _Field:
    return _Field(f"a number {expected}", lambda value: type(value) in (int, float) and accepts(value), default)


_SIZE, _POSITIONS = 2**24, 2**31 - 1
# fmt: off
_FIELDS = {
    "context_length":                   _integer(1, _POSITIONS),
    "embedding_length":                 _integer(1, _SIZE),
    "block_count":                      _integer(1, 2**16),
    "feed_forward_length":              _integer(1, _SIZE, per_layer=True),
    "attention.head_count":             _integer(1, _SIZE, per_layer=True),
    "attention.head_count_kv":          _integer(1, _SIZE, None, per_layer=True),
    "attention.layer_norm_rms_epsilon": _number("above 0, at most 1", lambda x: 0 < x <= 1),
    "attention.key_length":             _integer(1, _SIZE, None),
    "attention.value_length":           _integer(1, _SIZE, None),
    "attention.sliding_window":         _integer(0, _POSITIONS, 0),
    "rope.dimension_count":             _integer(1, _SIZE, None),
    "rope.freq_base":                   _number("above 1, at most 1e12", lambda x: 1 < x <= 1e12, 10000.0),
    "vocab_size":                       _integer(1, _SIZE, None),
    TYPE:                               _Field("a text", lambda value: type(value) is str, None),
    **{key: _number("from 0, below 1e30", lambda x: 0 <= x < 1e30, None) for key in SCALING_KEYS},
    ORIGINAL:                           _integer(1, _POSITIONS, None),
}
# fmt: on

IGNORED = {
    "rope.scaling.finetuned": "says how the model was trained",
    "pooling_type": "says how an embedding of a text is made of the hidden states",
    "tensor_data_layout": "says where the weights came from; the order of rows follows from the architecture",
}
"""Keys that change no logit."""

# The values at which these models stay what they are, whatever else a key may ask for.
_NEUTRAL = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_attn_factor": (1,),
}


def read_architecture(metadata: Mapping, source: Path) -> str:
    """Return the architecture, one of `ARCHITECTURES`.

    Raises:
        UnsupportedError: another one, a file that holds no model, or blocks of another layout.
    """
    kind = metadata.get("general.type", "model")
    if _plain(kind) != "model":
        raise UnsupportedError(f'{source}: general.type = {_text(kind)}; expected "model". Pass the model itself.')
    version = metadata.get("general.quantization_version", _BLOCKS)
    if _plain(version) != _BLOCKS:
        raise UnsupportedError(f"{source}: general.quantization_version = {_text(version)}; expected {_BLOCKS}.")
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{source}: general.architecture = {_text(architecture)}; expected one of {', '.join(ARCHITECTURES)}."
        )
    return architecture


def read_fields(metadata: Mapping, architecture: str, source: Path) -> dict:
    """Return the value of each key of the architecture, without its name, as plain numbers and texts.

    Keys of the table that a file lacks are None, or what llama.cpp takes then.

    Raises:
        UnsupportedError: a key asks for what kllama does not do, or its value differs between layers.
        CheckpointError: keys that are unknown or missing, or values of the wrong type or out of range.
    """
    prefix = f"{architecture}."
    given = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    _check_keys(given, prefix, source)
    fields = {key: field.default for key, field in _FIELDS.items() if field.default is not _REQUIRED}
    for key, field in _FIELDS.items():
        if key in given:
            value = _one_for_all_layers(prefix + key, given[key], source) if field.per_layer else given[key]
            fields[key] = _shortest(value)
    wrong = [key for key in given if key in _FIELDS and not _FIELDS[key].accepts(fields[key])]
    if wrong:
        received = (f"{prefix}{key} = {_text(given[key])}; expected {_FIELDS[key].expected}" for key in wrong)
        raise CheckpointError(f"{source}: {listed(received, '. ')}.")
    return fields


def backbone_arguments(fields: Mapping, architecture: str, source: Path) -> dict:
    """Return the arguments of `LlamaBackbone` that follow from the keys: all but the vocabulary, biases and scaling.

    Args:
        fields: of `read_fields`.
        architecture: one of `ARCHITECTURES`.
        source: the file, for messages.

    Raises:
        UnsupportedError: keys and values of different lengths, or heads of which a part only turns.
        CheckpointError: numbers that do not fit each other.
    """
    heads, key_value_heads = fields["attention.head_count"], fields["attention.head_count_kv"]
    key_value_heads = heads if key_value_heads is None else key_value_heads
    if heads % key_value_heads:
        raise CheckpointError(
            f"{source}: {architecture}.attention.head_count = {heads}; expected a multiple of "
            f"{architecture}.attention.head_count_kv ({key_value_heads})."
        )
    return {
        "num_layers": fields["block_count"],
        "num_query_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": _head_dim(fields, architecture, source),
        "hidden_dim": fields["embedding_length"],
        "intermediate_dim": fields["feed_forward_length"],
        "layer_norm_epsilon": fields["attention.layer_norm_rms_epsilon"],
        "max_sequence_length": fields["context_length"],
        "rope_max_wavelength": fields["rope.freq_base"],
        "sliding_window": fields["attention.sliding_window"] or None,
        "layer_types": None,
        "qk_norm": ARCHITECTURES[architecture].qk_norm,
        "activation": "silu",
    }


def _head_dim(fields: Mapping, architecture: str, source: Path) -> int:
    """Return H: keys and values must have the same, and all of a head must turn."""
    heads, hidden_dim = fields["attention.head_count"], fields["embedding_length"]
    said = {name: fields[name] for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")}
    if said["attention.key_length"] is None and hidden_dim % heads:
        raise CheckpointError(
            f"{source}: {architecture}.embedding_length = {hidden_dim}; expected a multiple of "
            f"{architecture}.attention.head_count ({heads})."
        )
    default = hidden_dim // heads
    dim = said["attention.key_length"] or default
    # As llama.cpp has it: values do not follow the keys in their length, the part that turns does.
    defaults = {"attention.key_length": dim, "attention.value_length": default, "rope.dimension_count": dim}
    for key, value in said.items():
        value = defaults[key] if value is None else value
        if value != dim:
            raise UnsupportedError(f"{source}: {architecture}.{key} = {value}; expected {dim}, the length of a key.")
    if dim % 2:
        raise CheckpointError(f"{source}: length of a head = {dim}; expected an even number.")
    return dim


def _check_keys(given: Mapping, prefix: str, source: Path) -> None:
    refused = [key for key, neutral in _NEUTRAL.items() if key in given and _plain(given[key]) not in neutral]
    if refused:
        received = (f"{prefix}{key} = {_text(given[key])}; expected {shown(_NEUTRAL[key][0])}" for key in refused)
        raise UnsupportedError(f"{source}: {listed(received)}. kllama does not implement this.")
    unknown = [prefix + key for key in given if key not in {*_FIELDS, *_NEUTRAL, *IGNORED}]
    if unknown:
        raise UnsupportedError(f"{source}: keys that kllama does not know: {listed(map(shown, unknown))}.")
    missing = [prefix + key for key, field in _FIELDS.items() if field.default is _REQUIRED and key not in given]
    if missing:
        raise CheckpointError(f"{source}: missing keys: {listed(missing)}. Download the file again.")


def _one_for_all_layers(key: str, value: object, source: Path) -> object:
    """Return the number that all layers have, where the file has a list of them."""
    if not isinstance(value, np.ndarray):
        return value
    if not value.size or np.any(value != value[0]):
        raise UnsupportedError(f"{source}: {key} = {_text(value)}; expected the same for all layers.")
    return value[0].item()


def _shortest(value: object) -> object:
    """Return the shortest decimal that is the same float32: 9.999999747e-06, as a file has it, was 1e-05."""
    if type(value) is not float or not abs(value) < 1e38:
        return value
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def _plain(value: object) -> object:
    """Return a value as Python has it; of an array, which is wrong wherever this is asked, no more than is shown."""
    return value[:_SHOWN].tolist() if isinstance(value, np.ndarray) else value


def _text(value: object) -> str:
    return shown(_plain(value))
