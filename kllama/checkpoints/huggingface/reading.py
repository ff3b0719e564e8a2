"""A Hugging Face directory: `config.json` and weights, one file or shards, with the tokenizer files beside them.

Opening checks all that can be known without reading weights: the schema of the configuration, the exact set of tensors,
their shapes and dtypes, and that the tokenizer fits. Weights are safetensors, or where there are none the archives of
`torch.save`, of which nothing is run. It builds no model and needs neither transformers nor PyTorch; `models/` opens a
checkpoint through it and assigns what `tensors()` yields.
"""

import fnmatch
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kllama.checkpoints.checkpoint import STRICT, Checkpoint, Strictness
from kllama.checkpoints.files import manifest
from kllama.checkpoints.files.reader import (
    FLOAT_DTYPES,
    SafetensorsFile,
    StoredTensor,
    check_file_name,
    check_finite,
    listed,
    read_json,
    shown,
    size_text,
)
from kllama.checkpoints.huggingface.config import backbone_config, generation_settings, token_ids
from kllama.checkpoints.huggingface.tokenizer import SETTINGS, preprocessor_config, tokenizer_config
from kllama.checkpoints.name_map import expected_tensors, num_parameters, refuse_missing
from kllama.checkpoints.torch_files.archive import TorchArchive
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError

# The files of a set of weights, the index of its shards, and what opens one; the first set that is there counts.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WEIGHTS = (
    (SINGLE, INDEX, SafetensorsFile),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", TorchArchive),
)
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

IGNORED_SUFFIX = (
    ".rotary_emb.inv_freq"  # frequencies that old versions saved, some in float16; they follow from the config
)


def is_huggingface(path: str | Path) -> bool:
    """Whether `path` is a directory whose `config.json` names a `model_type`.

    Raises:
        CheckpointError: there is a `config.json`, but it is not sound.
    """
    config = Path(path) / "config.json"
    return config.is_file() and "model_type" in read_json(config)


class HuggingFaceCheckpoint(Checkpoint):
    """An opened Hugging Face directory: Llama, Mistral, Qwen2 or Qwen3.

    Args:
        path: the directory.

    Attributes: those of `Checkpoint`. A base model (`LlamaModel`) has no head: its `backbone_config` then says
        `tie_word_embeddings`. `dtype` is that of the configuration, else that of the stored embedding.

    Raises:
        MissingFileError: the directory, `config.json`, the weights or a shard are not there.
        UnsupportedError: a sound checkpoint of something kllama does not read.
        CheckpointError: anything that is wrong, damaged or ambiguous.

    Example:

    ```python
    checkpoint = HuggingFaceCheckpoint("models/stories260K")
    shapes = {path: array.shape for path, array in checkpoint.tensors()}
    shapes["transformer_layer_0/self_attention/query/kernel"]  # (64, 8, 8)
    ```
    """

    format = "Hugging Face"

    def __init__(self, path: str | Path, strictness: Strictness = STRICT):
        self.path = Path(path)
        names = _list_directory(self.path)
        self._verification = manifest.check(self.path) if strictness.verify else None
        config_file = self.path / "config.json"
        config = read_json(config_file)
        self.backbone_config = backbone_config(config, config_file)
        self._strictness = strictness
        self._stored = _find_tensors(self.path, names)
        self.has_head = self.backbone_config["tie_word_embeddings"] or HEAD in self._stored
        if not self.has_head:
            self.backbone_config["tie_word_embeddings"] = True
        _check_tensors(self.backbone_config, self._stored, self.path, strictness)
        self.dtype = _read_dtype(config, self._stored[EMBEDDINGS].entry.dtype)
        self.stored_bytes = _count_bytes(self._stored)

        vocabulary_size = self.backbone_config["vocabulary_size"]
        settings = _read_if(names, self.path / SETTINGS)
        self.tokenizer_config = tokenizer_config(self.path, names, settings, config)
        self.preprocessor_config = preprocessor_config(settings)
        self.generation_config = _generation_config(self.path, names, vocabulary_size, config)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each variable's path and its array, in kllama's shape and the stored dtype, one at a time.

        Raises:
            CheckpointError: values that are not finite, a tied head that differs from the embedding, or a file that
                changed since it was opened.
        """
        yield from self._verification.during(self._read_tensors()) if self._verification else self._read_tensors()

    def _read_tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        if self.backbone_config["tie_word_embeddings"] and HEAD in self._stored and self._strictness.unused:
            _check_equal(self._stored[EMBEDDINGS], self._stored[HEAD], self._strictness.check_finite)
        for tensor in expected_tensors(self.backbone_config):
            stored = self._stored[tensor.name]
            array = stored.read(self._strictness.check_finite)
            if len(array) > tensor.stored_shape[0]:
                array = array[: tensor.stored_shape[0]]  # the padding of a vocabulary, which was let pass
            yield tensor.path, tensor.to_kllama(array)


class _Stored(NamedTuple):
    """A tensor and the file that holds it, under the name it has there."""

    file: SafetensorsFile | TorchArchive
    name: str

    @property
    def entry(self) -> StoredTensor:
        return self.file.tensors[self.name]

    def read(self, must_be_finite: bool = True) -> np.ndarray:
        array = self.file.read(self.name)
        if must_be_finite:
            check_finite(array, f"{self.file.path}: {self.name}")
        return array


def _list_directory(path: Path) -> list[str]:
    try:
        names = sorted(os.listdir(path))
    except FileNotFoundError as error:
        message = f"{path}: does not exist; expected a directory with config.json and weights."
        raise MissingFileError(message, str(path)) from error
    except OSError as error:
        message = f"{path}: cannot be listed ({error.strerror}, errno {error.errno}); expected a directory."
        raise CheckpointError(message) from error
    incomplete = fnmatch.filter(names, "*.incomplete")
    if incomplete:
        raise CheckpointError(f"{path}: an interrupted download: {listed(map(shown, incomplete))}. Download it again.")
    return names


def _find_tensors(directory: Path, names: list[str]) -> dict[str, _Stored]:
    """Open the weights and return what they hold, by full Hugging Face name."""
    for single, index, open_file in _WEIGHTS:
        if single in names and index in names:
            raise CheckpointError(
                f"{directory}: two weight sets, {single} and {index}; expected one. Remove the other."
            )
        if index in names:
            stored = _open_shards(directory / index, open_file)
            break
        if single in names:
            file = open_file(directory / single)
            stored = {name: _Stored(file, name) for name in file.tensors}
            break
    else:
        raise _no_weights(directory, names)
    stored = {name: place for name, place in stored.items() if not name.endswith(IGNORED_SUFFIX)}
    if EMBEDDINGS.removeprefix("model.") in stored and EMBEDDINGS not in stored:
        # LlamaModel, the base model, saves its tensors without `model.`; the head, if any, has no prefix either way.
        return {name if name == HEAD else f"model.{name}": place for name, place in stored.items()}
    return stored


def _no_weights(directory: Path, names: list[str]) -> CheckpointError:
    if fnmatch.filter(names, "consolidated.*"):
        return UnsupportedError(
            f"{directory}: only consolidated.*, Meta's own layout; expected {SINGLE} or {INDEX}. "
            "Open the folder that holds params.json, or download the files that transformers reads."
        )
    expected = ", ".join(name for single, index, _ in _WEIGHTS for name in (single, index))
    return MissingFileError(f"{directory}: no weights; expected one of {expected}.", str(directory / SINGLE))


def _open_shards(index: Path, open_file: type) -> dict[str, _Stored]:
    """Open the files of an index. What it says and what they hold must agree, name by name."""
    content = read_json(index)
    unknown = sorted(set(content) - {"metadata", "weight_map"})
    weight_map = content.get("weight_map")
    if unknown or not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: keys = {listed(map(shown, content))}; expected metadata and a weight_map.")
    for name, shard in weight_map.items():
        check_file_name(shard, f"{index}: weight_map[{shown(name)}]")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (index.parent / shard).exists()]
    if missing:
        raise MissingFileError(f"{index}: missing shards: {listed(missing)}.", str(index.parent / missing[0]))

    stored: dict[str, _Stored] = {}
    for shard in shards:
        file = open_file(index.parent / shard)
        for name in file.tensors:
            if name in stored:
                raise CheckpointError(
                    f"{index}: {shown(name)} is in two shards, {stored[name].file.path.name} and {shard}."
                )
            stored[name] = _Stored(file, name)
    _check_index(index, weight_map, stored)
    return stored


def _check_index(index: Path, weight_map: dict[str, str], stored: dict[str, _Stored]) -> None:
    actual = {name: place.file.path.name for name, place in stored.items()}
    wrong = sorted(name for name in {*weight_map, *actual} if weight_map.get(name) != actual.get(name))
    if wrong:
        received = listed(f"{shown(name)} = {weight_map.get(name)}; found in {actual.get(name)}" for name in wrong)
        raise CheckpointError(f"{index}: weight_map disagrees with the shards: {received}.")


def _count_bytes(stored: dict[str, _Stored]) -> Counter:
    """Count the bytes of each type; what is not stored as one of `FLOAT_DTYPES` is no weight of the model."""
    counts = Counter()
    for place in stored.values():
        if place.entry.dtype in FLOAT_DTYPES:
            counts[FLOAT_DTYPES[place.entry.dtype].name] += place.entry.num_bytes
    return counts


def _check_tensors(config: dict, stored: dict[str, _Stored], directory: Path, strictness: Strictness) -> None:
    """Compare what the configuration needs with what the files hold: dtypes, the exact set of names, shapes."""
    if strictness.unused:  # else only those that are used count, which are known further down
        _check_dtypes(stored, directory)
    _check_bytes(config, stored, directory)
    refuse_missing(config, stored, directory)

    expected = {tensor.name: tensor.stored_shape for tensor in expected_tensors(config)}
    expected.setdefault(HEAD, expected[EMBEDDINGS])  # a tied file may carry a copy
    unexpected = sorted(set(stored) - set(expected))
    if unexpected:
        names = listed(shown(stored[name].name) for name in unexpected)
        strictness.refuse_unused(f"{directory}: tensors that the configuration does not use: {names}.")
    _check_dtypes({name: place for name, place in stored.items() if name in expected}, directory)
    _check_shapes(expected, stored, directory, strictness)


def _check_dtypes(stored: dict[str, _Stored], directory: Path) -> None:
    wrong = {place.name: place.entry.dtype for place in stored.values() if place.entry.dtype not in FLOAT_DTYPES}
    if wrong:
        kinds = sorted(set(wrong.values()))
        verdict = "float64 is not read" if kinds == ["F64"] else f"looks quantised: found {listed(kinds)}"
        names = listed(f"{shown(name)} is {dtype}" for name, dtype in wrong.items())
        raise UnsupportedError(f"{directory}: {verdict} ({names}); expected {', '.join(FLOAT_DTYPES)}.")


def _check_bytes(config: dict, stored: dict[str, _Stored], directory: Path) -> None:
    """Refuse sizes that the files cannot hold. A file that lacks less than half is told which tensors are missing."""
    needed = num_parameters(config) * min(dtype.itemsize for dtype in FLOAT_DTYPES.values())
    held = sum(place.entry.num_bytes for place in stored.values())
    if needed > 2 * held:
        raise CheckpointError(
            f"{directory}: config.json needs at least {size_text(needed)}, the files hold {size_text(held)}. "
            "They belong to different models, or files are missing."
        )


def _check_shapes(
    expected: dict[str, tuple[int, ...]], stored: dict[str, _Stored], directory: Path, strictness: Strictness
) -> None:
    wrong = [name for name in expected if name in stored and stored[name].entry.shape != expected[name]]
    padded = [name for name in wrong if _is_padded(stored[name].entry.shape, expected[name], name)]
    if padded:
        name, vocabulary_size = padded[0], expected[EMBEDDINGS][0]
        strictness.refuse_unused(
            f"{directory}: {name} has {stored[name].entry.shape[0]} rows, vocab_size = {vocabulary_size}; expected the "
            "same number. What is beyond belongs to no token."
        )
    wrong = [name for name in wrong if name not in padded]
    if not wrong:
        return
    received = listed((f"{name} = {stored[name].entry.shape}; expected {expected[name]}" for name in wrong), ". ")
    raise CheckpointError(f"{directory}: {received}.")


def _is_padded(shape: tuple[int, ...], expected: tuple[int, ...], name: str) -> bool:
    """Tell whether a table of tokens has more rows than the vocabulary, and is else as expected."""
    return name in (EMBEDDINGS, HEAD) and shape[1:] == expected[1:] and len(shape) == 2 and shape[0] > expected[0]


def _check_equal(embeddings: _Stored, head: _Stored, must_be_finite: bool) -> None:
    first, second = embeddings.read(must_be_finite), head.read(must_be_finite)
    if not np.array_equal(first, second, equal_nan=not must_be_finite):
        difference = np.max(np.abs(first.astype(np.float32) - second.astype(np.float32)))
        raise CheckpointError(
            f"{head.file.path}: tie_word_embeddings is true, but {HEAD} and {EMBEDDINGS} are both present and differ "
            f"by up to {difference:.3g}; expected equal values. Set tie_word_embeddings to false to use both."
        )


def _read_dtype(config: dict, stored_dtype: str) -> str:
    names = {name: dtype.name for name, dtype in FLOAT_DTYPES.items()}
    claimed = config.get("dtype") or config.get("torch_dtype")
    return claimed if claimed in names.values() else names[stored_dtype]


def _read_if(names: list[str], path: Path) -> dict:
    """Read a JSON file that a directory need not have."""
    return read_json(path) if path.name in names else {}


def _generation_config(directory: Path, names: list[str], vocabulary_size: int, config: dict) -> dict:
    source = directory / "generation_config.json"
    content = _read_if(names, source)
    settings = generation_settings(content, source)
    if not token_ids(content, "eos_token_id", source):
        content, source = config, directory / "config.json"
    stop_token_ids = token_ids(content, "eos_token_id", source)
    outside = [str(token_id) for token_id in stop_token_ids if token_id >= vocabulary_size]
    if outside:
        raise CheckpointError(f"{source}: eos_token_id = {listed(outside)}; expected ids below {vocabulary_size}.")
    return {"stop_token_ids": stop_token_ids, **settings} if stop_token_ids else settings
