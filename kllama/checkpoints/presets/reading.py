"""kllama's own preset directories, as `save_to_preset` writes them: KerasHub's layout with kllama's classes.

    config.json                       the backbone: {"registered_name": "kllama>LlamaBackbone", "config": {...}}
    model.weights.h5                  its weights, or model.weights.json and several model_*.weights.h5
    task.json, preprocessor.json, tokenizer.json, assets/tokenizer/tokenizer.json     where there is a tokenizer
    kllama_manifest.json              the size and the SHA-256 of each, from kllama 0.2 on

Fields are read one by one; nothing is handed to Keras' deserializer, so a preset cannot name a class to import. Builds
no model: `models/` does. Presets of KerasHub's own Llama are another format.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kllama.checkpoints.checkpoint import STRICT, Checkpoint, Strictness
from kllama.checkpoints.files import manifest
from kllama.checkpoints.files.reader import check_file, listed, read_json, shown
from kllama.checkpoints.huggingface.config import GENERATION_KEYS, generation_settings, token_ids
from kllama.checkpoints.presets.dtype import read_layer_dtypes, read_policy
from kllama.checkpoints.presets.fields import (
    COUNT,
    FLAG,
    LAYER_KEYS,
    NUMBER,
    OBJECT,
    PREPROCESSOR_FIELDS,
    STRING,
    Kind,
    read_fields,
    read_object,
)
from kllama.checkpoints.presets.h5_weights import H5Weights
from kllama.checkpoints.presets.sampler import read_sampler
from kllama.checkpoints.presets.tensors import PresetTensor, check_tensors, preset_tensors, read_tensors
from kllama.errors import CheckpointError, MissingFileError

_CONFIG = "config.json"
_TASK = "task.json"
_TOKENIZER = "tokenizer.json"
_BACKBONE = "kllama>LlamaBackbone"
_TOKENIZER_ASSET = Path("assets", "tokenizer", "tokenizer.json")
_NORM = "layers/rms_norm/vars/0"

_TEMPLATE = Kind(
    "a string, an object of strings, or null",
    lambda value: (
        all(type(text) is str for text in value.values()) if type(value) is dict else STRING.or_null().accepts(value)
    ),
)
_NAMES = Kind("a list of strings", lambda value: type(value) is list and all(type(item) is str for item in value))

# What `get_config` of each class writes. Ranges and how values fit together are for the constructors to check.
_BACKBONE_FIELDS = {
    "name": STRING,
    "trainable": FLAG,
    "vocabulary_size": COUNT,
    "num_layers": COUNT,
    "num_query_heads": COUNT,
    "hidden_dim": COUNT,
    "intermediate_dim": COUNT,
    "num_key_value_heads": COUNT,
    "head_dim": COUNT,
    "max_sequence_length": COUNT.or_null(),
    "rope_max_wavelength": NUMBER,
    "rope_scaling": OBJECT.or_null(),
    "layer_norm_epsilon": NUMBER,
    "initializer_range": NUMBER,
    "dropout": NUMBER,
    "attention_dropout": NUMBER,
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "attention_output_bias": FLAG.or_null().since(None),
    "qk_norm": FLAG.since(False),
    "sliding_window": COUNT.or_null().since(None),
    "layer_types": _NAMES.or_null().since(None),
    "mlp_bias": FLAG,
    "activation": STRING,
}
_TOKENIZER_FIELDS = {
    "start_token": STRING.or_null(),
    "end_token": STRING.or_null(),
    "pad_token": STRING.or_null(),
    "parse_special": FLAG,
    "legacy": FLAG.or_null().since(None),
    "add_prefix_space": FLAG.or_null().since(None),
    "chat_template": _TEMPLATE.since(None),
}
_PREPROCESSOR_FIELDS = {
    **PREPROCESSOR_FIELDS,
    "loss_on": STRING.since("auto"),
    "truncate": STRING.or_null().since(None),
}


def is_preset(path: Path) -> bool:
    """Tell whether a path is a directory whose `config.json` is that of a serialized Keras object."""
    config = path / _CONFIG
    return config.is_file() and "registered_name" in read_json(config)


def has_preset_tokenizer(path: Path) -> bool:
    """Tell whether a path is a directory with the vocabulary where a preset has it."""
    return (path / _TOKENIZER_ASSET).is_file()


class PresetCheckpoint(Checkpoint):
    """An opened preset directory.

    Args:
        path: the directory.

    Attributes: those that `kllama.checkpoints.formats.open_checkpoint` describes.

    Raises:
        MissingFileError: if `config.json`, the weights or the tokenizer's vocabulary are missing.
        UnsupportedError: if it holds another class, or a dtype policy that kllama does not read.
        CheckpointError: if a file is damaged or not what the manifest says, or the weights are not exactly those that
            `config.json` asks for.
    """

    format = "kllama preset"

    def __init__(self, path: Path, strictness: Strictness = STRICT):
        self.path = path
        self._verification = manifest.check(path) if strictness.verify else None
        config_file = path / _CONFIG
        config = read_object(config_file, _BACKBONE)
        dtype = config.pop("dtype", None)
        self.backbone_config = read_fields(config_file, config, _BACKBONE_FIELDS)
        if self.backbone_config["attention_output_bias"] is None:
            self.backbone_config["attention_output_bias"] = self.backbone_config["attention_bias"]
        self._dtypes = read_layer_dtypes(config_file, dtype, self.backbone_config["num_layers"])
        self.tokenizer_config = _read_tokenizer_config(path)
        self.preprocessor_config = _read_preprocessor_config(path)
        task = read_object(path / _TASK, "kllama>LlamaCausalLM") if (path / _TASK).is_file() else {}
        self.generation_config = _read_generation_config(path / _TASK, task)
        self._sampler = task.get("sampler", "auto")
        self._weights = H5Weights(path, among=self._verification.names if self._verification else None)
        check_tensors(self._expected_tensors, self._weights.tensors, path, strictness)
        self.stored_bytes = self._weights.stored_bytes
        self._strictness = strictness
        self.dtype = self._dtypes.or_default(self._weights.tensors[_NORM].dtype, path)

    @property
    def sampler(self) -> str | dict:
        """What `generate` draws with: a name, `"auto"`, or what `keras_hub.samplers.get` makes a sampler of.

        Raises:
            UnsupportedError: a sampler that is not KerasHub's own. Only here, so that one can load with another.
            CheckpointError: fields that the sampler does not have.
        """
        return read_sampler(self.path / _TASK, self._sampler)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (variable path, array) for each weight, one at a time, in the dtype that it is stored in.

        Raises:
            CheckpointError: values that are not finite, scales that cannot be divided by, a file that changed since it
                was opened, or, after the last, one that is not what was saved.
        """
        tensors = read_tensors(self._weights, self._expected_tensors(), self._strictness)
        yield from self._verification.during(tensors) if self._verification else tensors

    def _expected_tensors(self) -> Iterator[PresetTensor]:
        return preset_tensors(self.backbone_config, self._dtypes.quantizes, _group)


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
        manifest.check(path, with_weights=False)
        self.tokenizer_config = _read_tokenizer_config(path)
        if self.tokenizer_config is None:
            raise MissingFileError(f"{path}: no tokenizer; expected {_TOKENIZER}.", str(path / _TOKENIZER))
        self.preprocessor_config = _read_preprocessor_config(path)
        self.backbone_config = {}
        if (path / _CONFIG).is_file():
            config = read_object(path / _CONFIG, _BACKBONE)
            self.backbone_config["vocabulary_size"] = config.get("vocabulary_size")


def _read_generation_config(file: Path, task: dict) -> dict:
    config = task.get("generation_config", {})
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: generation_config = {shown(config)}; expected an object.")
    unknown = sorted(set(config) - set(GENERATION_KEYS))
    if unknown:
        raise CheckpointError(f"{file}: generation_config has unknown keys: {listed(map(shown, unknown))}.")
    stops = {"stop_token_ids": token_ids(config, "stop_token_ids", file)} if "stop_token_ids" in config else {}
    return {**stops, **generation_settings(config, file)}


def _read_tokenizer_config(path: Path) -> dict | None:
    file = path / _TOKENIZER
    if not file.is_file():
        return None
    config = read_object(file, "kllama>LlamaTokenizer")
    if "tokenizer" in config:
        raise CheckpointError(f"{file}: tokenizer = {shown(config['tokenizer'])}; expected no path in a preset.")
    dtype = read_policy(file, "dtype", config.get("dtype"), ("int32", "int64"))
    asset = path / _TOKENIZER_ASSET
    check_file(asset, path)
    fields = read_fields(file, config, _TOKENIZER_FIELDS, LAYER_KEYS)
    return {"tokenizer": str(asset), **fields, "dtype": dtype}


def _read_preprocessor_config(path: Path) -> dict:
    file = path / "preprocessor.json"
    if not file.is_file():
        return {}
    config = read_object(file, "kllama>LlamaCausalLMPreprocessor")
    return read_fields(file, config, _PREPROCESSOR_FIELDS, LAYER_KEYS)


def _group(layer: str) -> str:
    """Give the group of a layer's variables, which Keras names after classes and attributes.

    That of `transformer_layer_3/self_attention/query` is `layers/llama_decoder_layer_3/self_attention/query`.
    """
    outer, *inner = layer.split("/")
    outer = outer.replace("transformer_layer", "llama_decoder_layer").removesuffix("_0")
    outer = outer.replace("sequence_output_layernorm", "rms_norm")
    return "/".join(["layers", outer, *inner])
