"""Which format a checkpoint has, told by its content, and the reader of that format."""

import difflib
import os
from pathlib import Path

from kllama.checkpoints.catalogue import builtin_presets, kaggle_presets
from kllama.checkpoints.checkpoint import STRICT, Checkpoint, Strictness
from kllama.checkpoints.files.workspace import recover, refuse_interrupted
from kllama.checkpoints.gguf.reading import GgufCheckpoint, is_gguf, open_gguf
from kllama.checkpoints.gguf.tokenizer import GgufTokenizer
from kllama.checkpoints.huggingface.reading import HuggingFaceCheckpoint, is_huggingface
from kllama.checkpoints.huggingface.tokenizer import HuggingFaceTokenizer
from kllama.checkpoints.llama2c import Llama2cCheckpoint, is_llama2c
from kllama.checkpoints.meta.reading import MetaCheckpoint, is_meta
from kllama.checkpoints.presets import kaggle
from kllama.checkpoints.presets.keras_hub import KerasHubCheckpoint, is_keras_hub
from kllama.checkpoints.presets.keras_hub_tokenizer import KerasHubTokenizer, is_keras_hub_tokenizer
from kllama.checkpoints.presets.reading import PresetCheckpoint, PresetTokenizer, has_preset_tokenizer, is_preset
from kllama.errors import MissingFileError, UnsupportedError

_FORMATS = (
    (is_keras_hub, KerasHubCheckpoint),
    (is_preset, PresetCheckpoint),
    (is_huggingface, HuggingFaceCheckpoint),
    (is_meta, MetaCheckpoint),
    (is_gguf, GgufCheckpoint),
    (is_llama2c, Llama2cCheckpoint),
)
_EXPECTED = (
    "a directory with a kllama preset, a KerasHub preset, a Hugging Face Llama (config.json), Meta's files "
    "(params.json and consolidated.00.pth) or one GGUF model, or a GGUF or llama2.c file"
)


def open_checkpoint(handle: str | os.PathLike, strictness: Strictness = STRICT) -> Checkpoint:
    """Open a checkpoint: check it, without reading its weights yet.

    Args:
        handle: the name of a preset of the catalogue, a `kaggle://` handle, or the path of a preset directory, kllama's
            or KerasHub's, of a Hugging Face directory, of a directory of Meta's, of a GGUF file, or of a llama2.c file.
        strictness: what is let pass.

    Returns:
        The checkpoint, of the class of its format.

    Raises:
        MissingFileError: if there is nothing of that name, or a directory without a checkpoint.
        ResourceError: if a download fails.
        UnsupportedError: if the format is not one that kllama reads.
        CheckpointError: if a file is damaged, or does not fit the others.
    """
    path = _locate(handle)
    for is_format, checkpoint_class in _FORMATS:
        if is_format(path):
            return checkpoint_class(path, strictness)
    config = path / "config.json"
    if path.is_dir() and not config.is_file():
        raise MissingFileError(f"{path}: no file config.json; expected {_EXPECTED}.", filename=str(config))
    raise UnsupportedError(f"{path}: holds no checkpoint that kllama reads; expected {_EXPECTED}.")


def open_tokenizer(handle: str | os.PathLike):
    """Open what a checkpoint says about its tokenizer; beside it the weights of a model may be missing.

    Args:
        handle: as of `open_checkpoint`, or a directory that holds tokenizer files alone, or the file of a vocabulary.

    Returns:
        An object with the attributes `path`, `tokenizer_config`, `preprocessor_config` and `backbone_config`, the last
        one empty where the files do not say how large the model's vocabulary is.

    Raises:
        MissingFileError: if there is nothing of that name, or a preset without a tokenizer.
        ResourceError: if a download fails.
        UnsupportedError: if a preset holds another class.
        CheckpointError: if a file is damaged, or does not fit the others.
    """
    path = _locate(handle)
    if is_keras_hub(path) or is_keras_hub_tokenizer(path):
        return KerasHubTokenizer(path)
    if has_preset_tokenizer(path) or is_preset(path):
        return PresetTokenizer(path)
    if is_gguf(path):
        return GgufTokenizer(open_gguf(path))
    if is_meta(path) or is_llama2c(path):
        return open_checkpoint(path)
    return HuggingFaceTokenizer(path)


def _locate(handle) -> Path:
    if not isinstance(handle, str | os.PathLike):
        raise TypeError(f"preset ({handle!r}) must be a string or a path.")
    if handle == "":
        raise ValueError("preset ('') must be a name or a path.")
    builtin, on_kaggle = builtin_presets(), kaggle_presets()
    if handle in builtin:
        return builtin[handle]
    if handle in on_kaggle:
        return kaggle.download(on_kaggle[handle]["kaggle_handle"])
    if str(handle).startswith(kaggle.PREFIX):
        return kaggle.download(str(handle))
    if "://" in str(handle):
        raise UnsupportedError(
            f"{handle}: kllama does not download from this hub yet; expected a name, a kaggle:// handle or a path. "
            "Download the repository and pass its folder."
        )
    path = Path(os.path.expanduser(handle))
    if not os.path.exists(path) and not recover(path):  # false for what cannot be a path at all, too
        near = difflib.get_close_matches(str(handle), [*builtin, *on_kaggle], cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise MissingFileError(
            f"{handle}: no such preset; expected a built-in name {sorted(builtin)}, one of the {len(on_kaggle)} names "
            f"that LlamaBackbone.presets lists, a kaggle:// handle, or the path of {_EXPECTED}.{hint}",
            filename=str(handle),
        )
    refuse_interrupted(path)
    # The caller's own link to a file may lead anywhere; in a cache of the hub, the names are those of the links.
    if path.is_symlink() and path.is_file() and "snapshots" not in path.absolute().parts:
        path = Path(os.path.realpath(path))
    return path
