"""kllama's own preset directories, as `save_to_preset` writes them: KerasHub's layout with kllama's classes.

    config.json                       the backbone: {"registered_name": "kllama>LlamaBackbone", "config": {...}}
    model.weights.h5                  its weights, or model.weights.json and several model_*.weights.h5
    task.json, preprocessor.json, tokenizer.json, assets/tokenizer/tokenizer.json     where there is a tokenizer

Fields are read one by one; nothing is handed to Keras' deserializer, so a preset cannot name a class to import. Builds
no model: `models/` does. Presets of KerasHub's own Llama are another format.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kllama.checkpoints.config import GENERATION_KEYS, generation_settings, token_ids
from kllama.checkpoints.h5_weights import H5Weights, StoredTensor
from kllama.checkpoints.name_map import expected_tensors
from kllama.checkpoints.reader import LISTED, check_file, listed, read_json, shown
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError

_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"
_BACKBONE = "kllama>LlamaBackbone"
_DTYPES = ("float32", "bfloat16", "float16")
_MIXED = tuple(f"mixed_{dtype}" for dtype in _DTYPES[1:])
_TOKENIZER_ASSET = Path("assets", "tokenizer", "tokenizer.json")


_REQUIRED = object()


class _Kind(NamedTuple):
    expected: str
    accepts: Callable[[object], bool]
    default: object = _REQUIRED  # what a key means that presets of the version before it lack

    def since(self, default: object) -> "_Kind":
        """Return this kind for a key that came later; presets without it mean the default."""
        return self._replace(default=default)


_COUNT = _Kind("an integer of at least 1", lambda value: type(value) is int and value >= 1)
_NUMBER = _Kind("a number", lambda value: type(value) in (int, float))
_FLAG = _Kind("true or false", lambda value: type(value) is bool)
_STRING = _Kind("a string", lambda value: type(value) is str)
_STRING_OR_NULL = _Kind("a string or null", lambda value: value is None or type(value) is str)
_COUNT_OR_NULL = _Kind("an integer of at least 1, or null", lambda value: value is None or _COUNT.accepts(value))
_FLAG_OR_NULL = _Kind("true, false or null", lambda value: value is None or type(value) is bool)
_TEMPLATE = _Kind(
    "a string, an object of strings, or null",
    lambda value: (
        all(type(text) is str for text in value.values()) if type(value) is dict else _STRING_OR_NULL.accepts(value)
    ),
)
_OBJECT_OR_NULL = _Kind("an object or null", lambda value: value is None or type(value) is dict)

# What `get_config` of each class writes. Ranges and how values fit together are for the constructors to check.
_BACKBONE_FIELDS = {
    "name": _STRING,
    "trainable": _FLAG,
    "vocabulary_size": _COUNT,
    "num_layers": _COUNT,
    "num_query_heads": _COUNT,
    "hidden_dim": _COUNT,
    "intermediate_dim": _COUNT,
    "num_key_value_heads": _COUNT,
    "head_dim": _COUNT,
    "max_sequence_length": _COUNT_OR_NULL,
    "rope_max_wavelength": _NUMBER,
    "rope_scaling": _OBJECT_OR_NULL,
    "layer_norm_epsilon": _NUMBER,
    "initializer_range": _NUMBER,
    "dropout": _NUMBER,
    "attention_dropout": _NUMBER,
    "tie_word_embeddings": _FLAG,
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "activation": _STRING,
}
_TOKENIZER_FIELDS = {
    "start_token": _STRING_OR_NULL,
    "end_token": _STRING_OR_NULL,
    "pad_token": _STRING_OR_NULL,
    "parse_special": _FLAG,
    "legacy": _FLAG_OR_NULL.since(None),
    "add_prefix_space": _FLAG_OR_NULL.since(None),
    "chat_template": _TEMPLATE.since(None),
}
_PREPROCESSOR_FIELDS = {
    "sequence_length": _COUNT,
    "add_start_token": _FLAG,
    "add_end_token": _FLAG,
    "loss_on": _STRING.since("auto"),
    "truncate": _STRING_OR_NULL.since(None),
}
_LAYER_KEYS = ("name", "trainable", "dtype", "config_file", "tokenizer")


def is_preset(path: Path) -> bool:
    """Tell whether a path is a directory whose `config.json` is that of a serialized Keras object."""
    config = path / _CONFIG
    return config.is_file() and "registered_name" in read_json(config)


def has_preset_tokenizer(path: Path) -> bool:
    """Tell whether a path is a directory with the vocabulary where a preset has it."""
    return (path / _TOKENIZER_ASSET).is_file()


class PresetCheckpoint:
    """An opened preset directory.

    Args:
        path: the directory.

    Attributes: those that `kllama.checkpoints.formats.open_checkpoint` describes.

    Raises:
        MissingFileError: if `config.json`, the weights or the tokenizer's vocabulary are missing.
        UnsupportedError: if it holds another class, or a dtype policy that kllama does not read.
        CheckpointError: if a file is damaged, or the weights are not exactly those that `config.json` asks for.
    """

    has_head = True

    def __init__(self, path: Path):
        self.path = path
        config_file = path / _CONFIG
        config = _read_object(config_file, _BACKBONE)
        self.dtype = _read_dtype(config_file, config.pop("dtype", None), _DTYPES + _MIXED)
        self.backbone_config = _read_fields(config_file, config, _BACKBONE_FIELDS)
        self.tokenizer_config = _read_tokenizer_config(path)
        self.preprocessor_config = _read_preprocessor_config(path)
        self.generation_config = self._read_generation_config()
        self._weights = H5Weights(path)
        _check_tensors(self.backbone_config, self._weights.tensors, path)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (variable path, array) for each weight, one at a time, in the dtype that it is stored in.

        Raises:
            CheckpointError: values that are not finite, or a file that changed since it was opened.
        """
        paths = [tensor.path for tensor in expected_tensors(self.backbone_config)]
        yield from zip(paths, self._weights.read([_dataset_name(path) for path in paths]), strict=True)

    def _read_generation_config(self) -> dict:
        file = self.path / "task.json"
        if not file.is_file():
            return {}
        config = _read_object(file, "kllama>LlamaCausalLM").get("generation_config", {})
        if not isinstance(config, dict):
            raise CheckpointError(f"{file}: generation_config = {shown(config)}; expected an object.")
        unknown = sorted(set(config) - set(GENERATION_KEYS))
        if unknown:
            raise CheckpointError(f"{file}: generation_config has unknown keys: {listed(map(shown, unknown))}.")
        stops = {"stop_token_ids": token_ids(config, "stop_token_ids", file)} if "stop_token_ids" in config else {}
        return {**stops, **generation_settings(config, file)}


class PresetTokenizer:
    """The tokenizer and the preprocessor of a preset directory, which need not have a model.

    Args:
        path: the directory.

    Attributes: `path`, `tokenizer_config` and `preprocessor_config`, as an opened checkpoint has them; and
        `backbone_config`, of which only `vocabulary_size` is read, where there is a model.

    Raises:
        MissingFileError: if there is no tokenizer, or not its vocabulary.
        UnsupportedError: if it holds another class.
        CheckpointError: if a file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tokenizer_config = _read_tokenizer_config(path)
        if self.tokenizer_config is None:
            raise MissingFileError(f"{path}: no tokenizer; expected {_TOKENIZER}.", str(path / _TOKENIZER))
        self.preprocessor_config = _read_preprocessor_config(path)
        self.backbone_config = {}
        if (path / _CONFIG).is_file():
            config = _read_object(path / _CONFIG, _BACKBONE)
            self.backbone_config["vocabulary_size"] = config.get("vocabulary_size")


def _read_tokenizer_config(path: Path) -> dict | None:
    file = path / _TOKENIZER
    if not file.is_file():
        return None
    config = _read_object(file, "kllama>LlamaTokenizer")
    if "tokenizer" in config:
        raise CheckpointError(f"{file}: tokenizer = {shown(config['tokenizer'])}; expected no path in a preset.")
    dtype = _read_dtype(file, config.get("dtype"), ("int32", "int64"))
    asset = path / _TOKENIZER_ASSET
    check_file(asset, path)
    fields = _read_fields(file, config, _TOKENIZER_FIELDS, _LAYER_KEYS)
    return {"tokenizer": str(asset), **fields, "dtype": dtype}


def _read_preprocessor_config(path: Path) -> dict:
    file = path / "preprocessor.json"
    if not file.is_file():
        return {}
    config = _read_object(file, "kllama>LlamaCausalLMPreprocessor")
    return _read_fields(file, config, _PREPROCESSOR_FIELDS, _LAYER_KEYS)


def _read_object(path: Path, registered_name: str) -> dict:
    """Read the config of a serialized Keras object that must be of a given class."""
    content = read_json(path)
    if content.get("registered_name") != registered_name:
        raise UnsupportedError(
            f"{path}: registered_name = {shown(content.get('registered_name'))}; expected {shown(registered_name)}. "
            "This preset holds another model."
        )
    if not isinstance(content.get("config"), dict):
        raise CheckpointError(f"{path}: config = {shown(content.get('config'))}; expected an object.")
    return dict(content["config"])


def _read_dtype(path: Path, dtype: object, allowed: tuple[str, ...]) -> str:
    if isinstance(dtype, dict) and dtype.get("class_name") == "DTypePolicy" and isinstance(dtype.get("config"), dict):
        dtype = dtype["config"].get("name")
    if dtype not in allowed:
        raise UnsupportedError(f"{path}: dtype = {shown(dtype)}; expected one of {', '.join(allowed)}.")
    return dtype


def _read_fields(path: Path, config: dict, fields: dict[str, _Kind], ignored: tuple[str, ...] = ()) -> dict:
    """Take the fields out of a config that must have them all, but for later ones, and no others but the ignored."""
    config = {**{name: kind.default for name, kind in fields.items() if kind.default is not _REQUIRED}, **config}
    unknown, missing = sorted(config.keys() - fields.keys() - set(ignored)), sorted(fields.keys() - config.keys())
    if unknown:
        raise CheckpointError(f"{path}: unknown keys: {listed(map(shown, unknown))}; expected {', '.join(fields)}.")
    if missing:
        raise CheckpointError(f"{path}: missing keys: {listed(missing)}.")
    wrong = [name for name, kind in fields.items() if not kind.accepts(config[name])]
    if wrong:
        received = listed((f"{name} = {shown(config[name])}; expected {fields[name].expected}" for name in wrong), ". ")
        raise CheckpointError(f"{path}: {received}.")
    return {name: config[name] for name in fields}


def _check_tensors(config: dict, stored: dict[str, StoredTensor], path: Path) -> None:
    """Compare what the configuration asks for with what the files hold: the exact set of names, and the shapes."""
    # Lazily: at most ten missing names are looked for, however many layers the configuration claims.
    names = ((_dataset_name(tensor.path), tensor.shape) for tensor in expected_tensors(config))
    missing = list(islice((f"{name} {shape}" for name, shape in names if name not in stored), LISTED))
    if missing:
        raise CheckpointError(f"{path}: missing tensors: {listed(missing)}.")
    expected = {_dataset_name(tensor.path): tensor.shape for tensor in expected_tensors(config)}
    unused = sorted(set(stored) - set(expected))
    if unused:
        raise CheckpointError(f"{path}: unused: {listed(unused)}; expected only the tensors that config.json asks for.")
    wrong = [name for name, shape in expected.items() if stored[name].shape != shape]
    if wrong:
        received = listed((f"{name} has shape {stored[name].shape}; expected {expected[name]}" for name in wrong), ". ")
        raise CheckpointError(f"{path}: {received}.")


def _dataset_name(variable_path: str) -> str:
    """Give the place of a variable in the file.

    Keras names places after classes and attributes: `transformer_layer_3/self_attention/query/kernel` is at
    `layers/llama_decoder_layer_3/self_attention/query/vars/0`.
    """
    layer, *inner, variable = variable_path.split("/")
    layer = layer.replace("transformer_layer", "llama_decoder_layer").removesuffix("_0")
    layer = layer.replace("sequence_output_layernorm", "rms_norm")
    index = 1 if variable in ("bias", "reverse_embeddings") else 0
    return "/".join(["layers", layer, *inner, "vars", str(index)])
