"""Write a model as a Hugging Face directory: `config.json`, `generation_config.json` and safetensors.

It takes arguments of `LlamaBackbone` and arrays, and knows no Keras; the tokenizer's files are written by
`text/huggingface_export.py`. `models/export_huggingface.py` joins the two, and stages the directory.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kllama.arguments import check_number
from kllama.checkpoints import progress
from kllama.checkpoints.files.reader import FLOAT_DTYPES, listed
from kllama.checkpoints.huggingface.safetensors_writer import SafetensorsWriter
from kllama.checkpoints.huggingface.written_config import huggingface_config
from kllama.checkpoints.name_map import ExpectedTensor, expected_tensors, num_parameters
from kllama.errors import CheckpointError

GENERATION_CONFIG = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GB = 1000**3
_HEAD = "lm_head.weight"
_PREFIX = "model."


def check_dtype(dtype: str) -> None:
    """Raise a ValueError for a dtype that weights are not written in."""
    allowed = [dtype.name for dtype in FLOAT_DTYPES.values()]
    if dtype not in allowed:
        raise ValueError(f"dtype ({dtype!r}) must be one of {', '.join(allowed)}, or None for the model's own.")


def check_shard_size(max_shard_size: float) -> None:
    """Raise a TypeError or a ValueError for a size of files, in GB, that is none."""
    check_number("max_shard_size", max_shard_size, lambda x: 0 < x < math.inf, "a positive number of GB")


def num_bytes(backbone_config: Mapping, dtype: str) -> int:
    """Return how many bytes the weights take in a dtype."""
    return num_parameters(backbone_config) * _numpy_dtype(dtype).itemsize


def write_model(
    directory: Path,
    backbone_config: Mapping,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    dtype: str,
    has_head: bool,
    max_shard_size: float,
    token_ids: Mapping[str, int | None],
) -> None:
    """Write the configuration and the weights of a model.

    Args:
        directory: an empty directory.
        backbone_config: as of `huggingface_config`.
        tensors: (variable path, array) for each weight, float and in kllama's shape, in any order; read one at a time.
        dtype: "float32", "bfloat16" or "float16", of all stored weights.
        has_head: whether this is a language model. Otherwise it is a base model, and a head of its own is left out.
        max_shard_size: how much of the weights a file holds at most, in GB.
        token_ids: an id or None for each of `TOKEN_IDS`.

    Raises:
        UnsupportedError: no class of transformers has this combination of settings.
        CheckpointError: a weight is not finite in `dtype`, or the tensors are not those of the model.
    """
    config = huggingface_config(backbone_config, dtype, token_ids, has_head=has_head)
    write_json(directory / "config.json", config)
    named = {_name(tensor, has_head): tensor for tensor in expected_tensors(backbone_config)}
    if not has_head:
        named.pop(_HEAD, None)
    shapes = {name: tensor.stored_shape for name, tensor in named.items()}
    writer = SafetensorsWriter(directory, shapes, dtype, max_shard_size * _GB)
    names = {tensor.path: name for name, tensor in named.items()}
    for path, array in progress.track(tensors, "writing weights", total=len(names)):
        if path in names:  # the head of a base model is not
            writer.write(names[path], named[names[path]].to_stored(array))
    if writer.missing:
        raise CheckpointError(f"{directory}: no values for the tensors {listed(writer.missing)}.")


def write_generation_config(
    directory: Path, settings: Mapping, token_ids: Mapping[str, int | None], stop_ids: Sequence[int]
) -> None:
    """Write what is known of how the model wants to generate; no file where nothing is.

    Args:
        directory: where `generation_config.json` is written.
        settings: a `generation_config` of `LlamaCausalLM`. A temperature of 0 becomes `do_sample` false, as
            transformers refuses it.
        token_ids: an id or None for each of `TOKEN_IDS`.
        stop_ids: the ids that end a text.
    """
    content = {name: token_ids[name] for name in TOKEN_IDS if token_ids[name] is not None}
    if stop_ids:
        content["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    content |= {name: value for name, value in settings.items() if name != "stop_token_ids"}
    if content.get("temperature") == 0:
        del content["temperature"]
        content["do_sample"] = False
    if content:
        write_json(directory / GENERATION_CONFIG, content)


def write_json(file: Path, content: Mapping) -> None:
    """Write an object as Hugging Face's libraries do."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _numpy_dtype(name: str) -> np.dtype:
    return next(dtype for dtype in FLOAT_DTYPES.values() if dtype.name == name)


def _name(tensor: ExpectedTensor, has_head: bool) -> str:
    """Give the name of a tensor; a base model's have no prefix."""
    return tensor.name if has_head else tensor.name.removeprefix(_PREFIX)
