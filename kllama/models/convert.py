"""Turning a checkpoint of any format into one of another, without a model in between where that is possible.

The command line calls it. What reading and writing a format mean is said there: `checkpoints/` and the exports.
"""

import inspect
import os
import warnings
from pathlib import Path

import keras

from kllama.checkpoints.checkpoint import Checkpoint
from kllama.checkpoints.files.writer import resolve
from kllama.checkpoints.formats import open_checkpoint
from kllama.checkpoints.presets.directory import staged_preset
from kllama.checkpoints.presets.dtype import LayerDtypes
from kllama.models.backbone_arguments import CONFIG_NAMES, settle_arguments
from kllama.models.export_gguf import export_gguf
from kllama.models.export_huggingface import MAX_SHARD_SIZE, export_huggingface
from kllama.models.exported import Exported, exported_backbone, exported_model
from kllama.models.llama_backbone import LlamaBackbone
from kllama.models.llama_causal_lm import LlamaCausalLM
from kllama.models.weights import count_bytes
from kllama.text.preprocessor import LlamaCausalLMPreprocessor

FORMATS = ("preset", "huggingface", "gguf")


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    to: str,
    *,
    dtype: str | None = None,
    max_shard_size: float = MAX_SHARD_SIZE,
    overwrite: bool = False,
    **answers,
) -> None:
    """Write a checkpoint in another format.

    Args:
        source: what `from_preset` takes.
        destination: a directory, or with `to="gguf"` a file.
        to: one of `FORMATS`.
        dtype: of the written weights; with `to="gguf"` also `"q8_0"` and `"q4_0"`. None keeps the source's own; weights
            that were quantised become floats, except int8 from a preset to a preset.
        max_shard_size: how much of the weights a file holds at most, in GB; a GGUF file holds all of them.
        overwrite: whether what is at the destination is replaced.
        **answers: arguments of `LlamaBackbone` that the files of the source cannot tell, such as `rope_scaling`.

    Raises:
        ValueError: another format, a destination that is the source or lies in it, one that holds something, or an
            answer where the files have another.
        CheckpointError: the source is damaged, or lacks something.
        UnsupportedError: the source, or what the destination's format would need, is not implemented.
        ResourceError: the disk is full or fails.
    """
    if to not in FORMATS:
        raise ValueError(f"to ({to!r}) must be one of {', '.join(FORMATS)}.")
    destination = resolve(destination)
    checkpoint = open_checkpoint(source)
    _check_apart(checkpoint.path, destination)
    _check_answers(checkpoint, answers)
    if to == "preset":
        _save_preset(checkpoint, destination, dtype, max_shard_size, overwrite, answers)
    elif to == "huggingface":
        exported = _export(checkpoint, answers)
        export_huggingface(exported, destination, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    else:
        export_gguf(_export(checkpoint, answers), destination, dtype=dtype, overwrite=overwrite)


def _save_preset(
    checkpoint: Checkpoint,
    destination: Path,
    dtype: str | None,
    max_shard_size: float,
    overwrite: bool,
    answers: dict,
) -> None:
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:  # a save alone would replace a preset
        raise ValueError(f"{destination}: holds something. Pass overwrite=True to replace the whole directory.")
    model = _build(checkpoint, dtype, answers)
    with staged_preset(destination, None, overwrite, count_bytes(model), max_shard_size) as staging:
        model.save_to_preset(staging, max_shard_size=max_shard_size)
        if not checkpoint.has_head:
            _save_beside_base_model(checkpoint, staging)


def _save_beside_base_model(checkpoint: Checkpoint, staging: Path) -> None:
    warnings.warn(
        f"{checkpoint.path} has no head, which a preset cannot say. Load it as a LlamaBackbone: a LlamaCausalLM would "
        "take the embedding table for the head.",
        stacklevel=4,
    )
    if checkpoint.tokenizer_config is not None:
        LlamaCausalLMPreprocessor.from_checkpoint(checkpoint).save_to_preset(staging)


def _export(checkpoint: Checkpoint, answers: dict) -> Exported:
    """Describe a checkpoint; its weights are read while they are written, one at a time."""
    if isinstance(checkpoint.dtype, LayerDtypes):
        model = _build(checkpoint, None, answers)  # which knows how int8 becomes float again
        return exported_model(model) if checkpoint.has_head else exported_backbone(model)
    parameters = inspect.signature(LlamaBackbone.__init__).parameters
    config = {name: parameters[name].default for name in CONFIG_NAMES} | checkpoint.backbone_config | answers
    if not checkpoint.has_head:
        config["tie_word_embeddings"] = False  # or whoever reads it would take the embedding table for a head
    has_tokenizer = checkpoint.tokenizer_config is not None
    return Exported(
        settle_arguments({name: config[name] for name in CONFIG_NAMES}, 1, {}),
        keras.dtype_policies.get(checkpoint.dtype).variable_dtype,  # of a preset it may be a mixed policy
        checkpoint.tensors(),
        dict(checkpoint.generation_config),
        LlamaCausalLMPreprocessor.from_checkpoint(checkpoint) if has_tokenizer else None,
        checkpoint.has_head,
    )


def _build(checkpoint: Checkpoint, dtype: str | None, answers: dict) -> LlamaCausalLM | LlamaBackbone:
    backbone = LlamaBackbone.from_checkpoint(checkpoint, dtype=dtype, **answers)
    return LlamaCausalLM.from_checkpoint(checkpoint, backbone=backbone) if checkpoint.has_head else backbone


def _check_apart(source: Path, destination: Path) -> None:
    """Refuse to write over what is read, or into it."""
    source = resolve(source)
    if destination == source or source in destination.parents or destination in source.parents:
        raise ValueError(f"destination ({destination}) must be apart from the source ({source}).")


def _check_answers(checkpoint: Checkpoint, answers: dict) -> None:
    """Raise the questions that are open, and refuse answers to others: they would change the model."""
    checkpoint.refuse_open_questions(answers)
    for argument, answer in answers.items():
        if argument not in checkpoint.open_questions and answer != checkpoint.backbone_config.get(argument):
            raise ValueError(f"{argument} ({answer}) must be left out: {checkpoint.path} leaves no such question open.")
