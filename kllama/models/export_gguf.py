"""Export a language model to a GGUF file: its configuration, its weights and its tokenizer, for llama.cpp.

It joins what `checkpoints/gguf/writing.py` says of a model with what `text/gguf_tokens.py` says of a tokenizer.
`LlamaCausalLM.export_gguf` and `convert.py` call it.
"""

import os
import warnings

import keras
import numpy as np

from kllama.arguments import check_flag
from kllama.checkpoints.files.writer import resolve
from kllama.checkpoints.gguf.writing import GGUF_DTYPES, gguf_architecture, gguf_metadata, write_gguf
from kllama.core.rope import RotaryFrequencies
from kllama.errors import UnsupportedError
from kllama.models.exported import Exported
from kllama.text.gguf_tokens import gguf_tokens

DEFAULT_CONTEXT_LENGTH = 2048


def export_gguf(
    exported: Exported, path: str | os.PathLike, *, dtype: str | None = None, overwrite: bool = False
) -> None:
    """Write a language model to a GGUF file; see `LlamaCausalLM.export_gguf`.

    Args:
        exported: the model.
        path: the file.
        dtype: one of `GGUF_DTYPES`, or None for the dtype of the weights.
        overwrite: whether a file that is there is replaced.
    """
    if dtype is not None and dtype not in GGUF_DTYPES:
        raise ValueError(f"dtype ({dtype!r}) must be one of {', '.join(GGUF_DTYPES)}, or None.")
    check_flag("overwrite", overwrite)
    if not exported.has_head:
        raise UnsupportedError("the model has no head, and llama.cpp runs none without; expected a language model.")
    config, dtype = exported.config, dtype or exported.dtype
    gguf_architecture(config)  # refuses what llama.cpp cannot run, before anything else is done
    frequencies = RotaryFrequencies(
        config["head_dim"], config["rope_max_wavelength"], config["rope_scaling"], config["max_sequence_length"]
    )
    name = resolve(path).stem.encode("utf-8", "replace").decode()
    metadata = gguf_metadata(config, dtype, name, _context_length(exported), frequencies.attention_factor)
    metadata |= _tokenizer_keys(exported)
    write_gguf(path, config, dtype, metadata, exported.tensors, _rope_factors(config, frequencies), overwrite)


def _context_length(exported: Exported) -> int:
    """Give the longest sequence. llama.cpp needs one, also of a model that does not say."""
    if exported.config["max_sequence_length"] is not None:
        return exported.config["max_sequence_length"]
    return DEFAULT_CONTEXT_LENGTH if exported.preprocessor is None else exported.preprocessor.sequence_length


def _rope_factors(config: dict, frequencies: RotaryFrequencies) -> dict[str, np.ndarray]:
    """Give what llama.cpp divides each frequency by, for the types of scaling that it has no formula for."""
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    if scaling["rope_type"] == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(scaling[f"{name}_factor"], "float32") for name in ("long", "short")
        }
    if scaling["rope_type"] != "llama3":
        return {}
    plain = RotaryFrequencies(config["head_dim"], config["rope_max_wavelength"])
    like = keras.ops.zeros(())
    before, after = (keras.ops.convert_to_numpy(each.at(0, like)).astype("float64") for each in (plain, frequencies))
    return {"rope_freqs.weight": (before / after).astype("float32")}


def _tokenizer_keys(exported: Exported) -> dict[str, object]:
    tokenizer = exported.tokenizer
    if tokenizer is None:
        warnings.warn(
            "preprocessor = None: the file gets no tokenizer, and llama.cpp takes token ids alone from it.",
            stacklevel=4,
        )
        return {"tokenizer.ggml.model": "none"}
    return gguf_tokens(
        tokenizer,
        exported.config["vocabulary_size"],
        exported.preprocessor.add_start_token,
        exported.generation_config.get("stop_token_ids", ()),
    )
