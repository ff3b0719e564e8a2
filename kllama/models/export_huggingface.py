"""Write a model as a Hugging Face directory, with its tokenizer: what `export_to_transformers` of the classes does.

It joins what `checkpoints/huggingface/writing.py` writes of a model with what `text/huggingface_export.py` writes of a
tokenizer. The classes and `convert.py` call it.
"""

import os
import warnings

from kllama.checkpoints.files.writer import staged_directory
from kllama.checkpoints.huggingface.writing import (
    TOKEN_IDS,
    check_dtype,
    check_shard_size,
    num_bytes,
    write_generation_config,
    write_model,
)
from kllama.checkpoints.huggingface.written_config import model_type
from kllama.models.exported import Exported
from kllama.text.huggingface_export import write_tokenizer
from kllama.text.tokenizer import LlamaTokenizer

MAX_SHARD_SIZE = 5
"""GB of weights in a file, as in transformers 4."""

_NO_IDS = dict.fromkeys(TOKEN_IDS)


def export_huggingface(
    exported: Exported,
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    max_shard_size: float = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Write a language model with its tokenizer, or a base model; see `LlamaCausalLM.export_to_transformers`."""
    dtype = exported.dtype if dtype is None else dtype
    check_dtype(dtype)
    check_shard_size(max_shard_size)
    config, tokenizer = exported.config, exported.tokenizer
    if config["dropout"]:
        warnings.warn(
            f"dropout = {config['dropout']} is left out: transformers has none on the attention output. What the model "
            "computes after training does not change.",
            stacklevel=3,
        )
    stop_ids = _stop_ids(exported.generation_config, tokenizer)
    token_ids = _token_ids(tokenizer, stop_ids)
    with staged_directory(path, overwrite=overwrite, needed_bytes=num_bytes(config, dtype)) as staging:
        write_model(
            staging,
            config,
            exported.tensors,
            dtype=dtype,
            has_head=exported.has_head,
            max_shard_size=max_shard_size,
            token_ids=token_ids,
        )
        write_generation_config(staging, exported.generation_config, token_ids, stop_ids)
        if tokenizer is not None:
            write_tokenizer(
                staging,
                tokenizer,
                add_start_token=exported.preprocessor.add_start_token,
                max_length=config["max_sequence_length"],
                model_type=model_type(config),
            )


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
