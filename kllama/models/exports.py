"""Write a model as a Hugging Face directory, with its tokenizer: what `export_to_transformers` of the classes does.

It reads the model and joins what `checkpoints/` writes of it with what `text/` writes. The classes call it.
"""

import os
import warnings

import keras

from kllama import backend
from kllama.checkpoints.huggingface_config import model_type
from kllama.checkpoints.huggingface_export import (
    TOKEN_IDS,
    check_dtype,
    check_shard_size,
    num_bytes,
    write_generation_config,
    write_model,
)
from kllama.checkpoints.writer import staged_directory
from kllama.models.float_tensors import architecture, float_tensors, stored_dtype
from kllama.text.huggingface_export import write_tokenizer
from kllama.text.tokenizer import LlamaTokenizer

MAX_SHARD_SIZE = 5
"""GB of weights in a file, as in transformers 4."""

_NO_IDS = dict.fromkeys(TOKEN_IDS)


def export_backbone(
    backbone: keras.Model, path: str | os.PathLike, *, dtype: str | None, max_shard_size: float, overwrite: bool
) -> None:
    """Write a backbone as a base model; see `LlamaBackbone.export_to_transformers`."""
    dtype = _settle(backbone, dtype, max_shard_size)
    config = architecture(backbone)
    with staged_directory(path, overwrite=overwrite, needed_bytes=num_bytes(config, dtype)) as staging:
        write_model(
            staging,
            config,
            float_tensors(backbone),
            dtype=dtype,
            has_head=False,
            max_shard_size=max_shard_size,
            token_ids=_NO_IDS,
        )


def export_causal_lm(
    model: keras.Model, path: str | os.PathLike, *, dtype: str | None, max_shard_size: float, overwrite: bool
) -> None:
    """Write a language model with its tokenizer; see `LlamaCausalLM.export_to_transformers`."""
    backbone, preprocessor = model.backbone, model.preprocessor
    dtype = _settle(backbone, dtype, max_shard_size)
    tokenizer = None if preprocessor is None else preprocessor.tokenizer
    if not isinstance(tokenizer, LlamaTokenizer | None):
        raise TypeError(
            f"preprocessor.tokenizer ({tokenizer!r}) must be a LlamaTokenizer. Set preprocessor = None to export the "
            "model alone."
        )
    backend.synchronize(model)  # exporting is allowed in the middle of `fit`
    config, stop_ids = architecture(backbone), _stop_ids(model.generation_config, tokenizer)
    token_ids = _token_ids(tokenizer, stop_ids)
    with staged_directory(path, overwrite=overwrite, needed_bytes=num_bytes(config, dtype)) as staging:
        write_model(
            staging,
            config,
            float_tensors(backbone),
            dtype=dtype,
            has_head=True,
            max_shard_size=max_shard_size,
            token_ids=token_ids,
        )
        write_generation_config(staging, model.generation_config, token_ids, stop_ids)
        if tokenizer is not None:
            write_tokenizer(
                staging,
                tokenizer,
                add_start_token=preprocessor.add_start_token,
                max_length=backbone.max_sequence_length,
                model_type=model_type(config),
            )


def _settle(backbone: keras.Model, dtype: str | None, max_shard_size: float) -> str:
    """Check the arguments and the model, and give the dtype to write."""
    dtype = stored_dtype(backbone) if dtype is None else dtype
    check_dtype(dtype)
    check_shard_size(max_shard_size)
    if backbone.dropout:
        warnings.warn(
            f"dropout = {backbone.dropout} is left out: transformers has none on the attention output. What the model "
            "computes after training does not change.",
            stacklevel=4,
        )
    return dtype


def _stop_ids(generation_config: dict, tokenizer: LlamaTokenizer | None) -> list[int]:
    """List the ids at which `generate` ends texts, and conversations where there is a template for them."""
    ids = list(generation_config.get("stop_token_ids", ()))
    if tokenizer is not None:
        ids += [tokenizer.end_token_id, getattr(tokenizer, "end_token2_id", None)]
        ids += [tokenizer.turn_end_token_id] if tokenizer.chat_template is not None else []
    return [token_id for token_id in dict.fromkeys(ids) if token_id is not None]


def _token_ids(tokenizer: LlamaTokenizer | None, stop_ids: list[int]) -> dict[str, int | None]:
    if tokenizer is None:
        return {**_NO_IDS, "eos_token_id": stop_ids[0] if stop_ids else None}
    pad_id = None if tokenizer.pad_token is None else tokenizer.pad_token_id
    return dict(zip(TOKEN_IDS, (tokenizer.start_token_id, tokenizer.end_token_id, pad_id), strict=True))
