"""kllama's own preset directories, as `save_to_preset` writes them: KerasHub's layout with kllama's classes.

    config.json                       the backbone: {"registered_name": "kllama>LlamaBackbone", "config": {...}}
    model.weights.h5                  its weights, or model.weights.json and several model_*.weights.h5
    task.json, preprocessor.json, tokenizer.json, assets/tokenizer/tokenizer.json     where there is a tokenizer

Fields are read one by one; nothing is handed to Keras' deserializer, so a preset cannot name a class to import. Builds
no model: `models/` does. Presets of KerasHub's own Llama are another format.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import h5py
import ml_dtypes
import numpy as np

from kllama.checkpoints.config import generation_settings, token_ids
from kllama.checkpoints.name_map import expected_tensors
from kllama.checkpoints.reader import LISTED, check_file, check_file_name, check_finite, listed, read_json, shown
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError

_BACKBONE = "kllama>LlamaBackbone"
_DTYPES = ("float32", "bfloat16", "float16")
_MIXED = tuple(f"mixed_{dtype}" for dtype in _DTYPES[1:])
_SINGLE, _INDEX = "model.weights.h5", "model.weights.json"
_TOKENIZER_ASSET = Path("assets", "tokenizer", "tokenizer.json")
_DEEPEST_GROUP = 8


class _Kind(NamedTuple):
    expected: str
    accepts: Callable[[object], bool]


_COUNT = _Kind("an integer of at least 1", lambda value: type(value) is int and value >= 1)
_NUMBER = _Kind("a number", lambda value: type(value) in (int, float))
_FLAG = _Kind("true or false", lambda value: type(value) is bool)
_STRING = _Kind("a string", lambda value: type(value) is str)
_STRING_OR_NULL = _Kind("a string or null", lambda value: value is None or type(value) is str)
_COUNT_OR_NULL = _Kind("an integer of at least 1, or null", lambda value: value is None or _COUNT.accepts(value))
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
}
_PREPROCESSOR_FIELDS = {"sequence_length": _COUNT, "add_start_token": _FLAG, "add_end_token": _FLAG}
_LAYER_KEYS = ("name", "trainable", "dtype", "config_file", "tokenizer")
_GENERATION_KEYS = (
    "stop_token_ids",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
)


def is_preset(path: Path) -> bool:
    """Tell whether a path is a directory whose `config.json` is that of a serialized Keras object."""
    config = path / "config.json"
    return config.is_file() and "registered_name" in read_json(config)


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
        config_file = path / "config.json"
        config = _read_object(config_file, _BACKBONE)
        self.dtype = _read_dtype(config_file, config.pop("dtype", None), _DTYPES + _MIXED)
        self.backbone_config = _read_fields(config_file, config, _BACKBONE_FIELDS)
        self.tokenizer_config = self._read_tokenizer_config()
        self.preprocessor_config = self._read_preprocessor_config()
        self.generation_config = self._read_generation_config()
        self._stored = _find_tensors(_weight_files(path))
        _check_tensors(self.backbone_config, self._stored, path)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (variable path, array) for each weight, one at a time, in the dtype that it is stored in.

        Raises:
            CheckpointError: values that are not finite, or a file that changed since it was opened.
        """
        expected = list(expected_tensors(self.backbone_config))
        with ExitStack() as stack:
            files = {stored.file for stored in self._stored.values()}
            opened = {file: stack.enter_context(_open_h5(file)) for file in files}
            for tensor in expected:
                name = _dataset_name(tensor.path)
                stored = self._stored[name]
                array = _read_array(opened[stored.file], name, stored)
                check_finite(array, f"{stored.file}: {name}")
                yield tensor.path, array

    def _read_tokenizer_config(self) -> dict | None:
        file = self.path / "tokenizer.json"
        if not file.is_file():
            return None
        config = _read_object(file, "kllama>LlamaTokenizer")
        if "tokenizer" in config:
            raise CheckpointError(f"{file}: tokenizer = {shown(config['tokenizer'])}; expected no path in a preset.")
        dtype = _read_dtype(file, config.get("dtype"), ("int32", "int64"))
        asset = self.path / _TOKENIZER_ASSET
        check_file(asset)
        fields = _read_fields(file, config, _TOKENIZER_FIELDS, _LAYER_KEYS)
        return {"tokenizer": str(asset), **fields, "dtype": dtype}

    def _read_preprocessor_config(self) -> dict:
        file = self.path / "preprocessor.json"
        if not file.is_file():
            return {}
        config = _read_object(file, "kllama>LlamaCausalLMPreprocessor")
        return _read_fields(file, config, _PREPROCESSOR_FIELDS, _LAYER_KEYS)

    def _read_generation_config(self) -> dict:
        file = self.path / "task.json"
        if not file.is_file():
            return {}
        config = _read_object(file, "kllama>LlamaCausalLM").get("generation_config", {})
        if not isinstance(config, dict):
            raise CheckpointError(f"{file}: generation_config = {shown(config)}; expected an object.")
        unknown = sorted(set(config) - set(_GENERATION_KEYS))
        if unknown:
            raise CheckpointError(f"{file}: generation_config has unknown keys: {listed(map(shown, unknown))}.")
        stops = {"stop_token_ids": token_ids(config, "stop_token_ids", file)} if "stop_token_ids" in config else {}
        return {**stops, **generation_settings(config, file)}


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
    """Take the fields out of a config that must have them all, and no others but the ignored ones."""
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


def _weight_files(path: Path) -> list[Path]:
    single, index = path / _SINGLE, path / _INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{path}: two weight sets, {_SINGLE} and {_INDEX}; expected one. Remove the stale one.")
    if index.exists():
        names = _shard_names(index)
    elif single.exists():
        names = [_SINGLE]
    else:
        raise MissingFileError(f"{path}: no weights; expected {_SINGLE} or {_INDEX}.", filename=str(single))
    for name in names:
        check_file(path / name)
    return [path / name for name in names]


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map = {shown(weight_map)}; expected an object with file names.")
    names = set()
    for group, value in weight_map.items():
        for name in value if isinstance(value, list) else [value]:
            names.add(check_file_name(name, f"{index}: weight_map[{shown(group)}]"))
    return sorted(names)


class _Stored(NamedTuple):
    """Where and how a tensor is stored."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _find_tensors(files: list[Path]) -> dict[str, _Stored]:
    """List what the files hold, by dataset name, without reading it."""
    found = {}
    for file in files:
        with _open_h5(file) as opened:
            for name, stored in _list_tensors(opened, file):
                if name in found:
                    raise CheckpointError(
                        f"{file}: {name} is in {found[name].file.name} too; expected each tensor once."
                    )
                found[name] = stored
    return found


def _list_tensors(file: h5py.File, path: Path) -> list[tuple[str, _Stored]]:
    with _h5_errors(path):
        return [(item.name.lstrip("/"), _describe(item, path)) for item in _datasets(file, path, _DEEPEST_GROUP)]


def _datasets(group: h5py.Group, path: Path, depth: int) -> Iterator[h5py.Dataset]:
    """Walk through the datasets of a file; a link is refused, not followed."""
    if not depth:
        raise CheckpointError(f"{path}: {group.name} is nested deeper than {_DEEPEST_GROUP}; expected Keras' groups.")
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise CheckpointError(f"{path}: {group.name}/{name} is a link; expected a group or a dataset.")
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from _datasets(item, path, depth - 1)
        elif isinstance(item, h5py.Dataset):
            yield item
        else:
            raise CheckpointError(f"{path}: {item.name} is a data type; expected a group or a dataset.")


def _describe(dataset: h5py.Dataset, path: Path) -> _Stored:
    """Say how a dataset is stored, which must be as Keras stores it: floats, in one plain block of the file."""
    if dataset.external or dataset.is_virtual:
        raise CheckpointError(f"{path}: {dataset.name} lies in another file; expected its data here.")
    dtype = _dtype_name(dataset, path)
    # What is compressed, or never written, may be far larger in memory than on disk.
    size = dataset.id.get_storage_size()
    if dataset.chunks or size != dataset.nbytes:
        raise CheckpointError(
            f"{path}: {dataset.name} = {size} bytes for an array of {dataset.nbytes}; expected one plain block of its "
            "size."
        )
    return _Stored(path, dataset.shape, dtype)


def _dtype_name(dataset: h5py.Dataset, path: Path) -> str:
    # Keras writes bfloat16 as raw pairs of bytes, and says so in an attribute.
    if dataset.dtype.kind == "V" and dataset.dtype.itemsize == 2 and str(dataset.attrs.get("dtype")) == "bfloat16":
        return "bfloat16"
    for name in ("float32", "float16"):
        if dataset.dtype == np.dtype(name):
            return name
    raise CheckpointError(f"{path}: {dataset.name} is {dataset.dtype}; expected one of {', '.join(_DTYPES)}.")


def _check_tensors(config: dict, stored: dict[str, _Stored], path: Path) -> None:
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


def _open_h5(path: Path) -> h5py.File:
    with _h5_errors(path):
        return h5py.File(path, "r")


def _read_array(file: h5py.File, name: str, stored: _Stored) -> np.ndarray:
    with _h5_errors(stored.file):
        array = file[name][()]
    if stored.dtype == "bfloat16":
        array = array.view(ml_dtypes.bfloat16)
    if array.shape != stored.shape or array.dtype.name != stored.dtype:
        raise CheckpointError(f"{stored.file}: {name} has changed since the file was opened. Open it again.")
    return array


@contextmanager
def _h5_errors(path: Path) -> Iterator[None]:
    """Turn what h5py raises for a damaged file into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: no sound HDF5 file: {error}. Download or save it again.") from error


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
