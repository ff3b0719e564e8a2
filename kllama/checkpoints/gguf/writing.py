"""Write a model as a GGUF file: what llama.cpp wants to know of it, and its tensors, in floats or in blocks.

llama.cpp runs what its own graph of an architecture does, and leaves out without a word what a file asks for beyond
that. So what it cannot run is refused here, and what it runs otherwise is said in a warning. It builds no model and
knows no text: `models/export_gguf.py` brings the weights and the keys of the tokenizer.

References: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the keys; what the architectures do is in
`src/models/` of llama.cpp.
"""

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType

from kllama.checkpoints import progress
from kllama.checkpoints.files.writer import staged_file
from kllama.checkpoints.name_map import GGUF_LLAMA, GGUF_QWEN, expected_tensors
from kllama.errors import NonFiniteError, UnsupportedError

_F32, _F16, _BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
_Q8_0, _Q4_0 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0


class _Encoding(NamedTuple):
    """How `dtype` stores a model: the type of its matrices, that of the head, and what the file calls it."""

    matrices: GGMLQuantizationType
    head: GGMLQuantizationType
    file_type: LlamaFileType


# The head decides between tokens, and llama.cpp gives it more bits than the rest, too.
_ENCODINGS = {
    "float32": _Encoding(_F32, _F32, LlamaFileType.ALL_F32),
    "float16": _Encoding(_F16, _F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": _Encoding(_BF16, _BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": _Encoding(_Q8_0, _Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": _Encoding(_Q4_0, _Q8_0, LlamaFileType.MOSTLY_Q4_0),
}
GGUF_DTYPES = tuple(_ENCODINGS)
"""The dtypes that a model can be exported in."""

# The largest value of each type. Blocks have a float16 scale, and codes of at most 127, or of -8.
_LARGEST = {
    _F32: float(np.finfo("float32").max),
    _F16: float(np.finfo("float16").max),
    _BF16: float(ml_dtypes.finfo("bfloat16").max),
    _Q8_0: 127 * float(np.finfo("float16").max),
    _Q4_0: 8 * float(np.finfo("float16").max),
}
_HEADS = {False: "token_embedding/reverse_embeddings", True: "token_embedding/embeddings"}


def gguf_architecture(config: Mapping) -> str:
    """Name the architecture of llama.cpp that computes what a backbone computes.

    Args:
        config: that of a `LlamaBackbone`.

    Returns:
        "llama" for Llama and Mistral, "qwen2" or "qwen3".

    Raises:
        UnsupportedError: llama.cpp has none; the message names the argument.
    """
    rope_type = _rope_type(config)
    _require(config, "activation", ("silu", "swish"))
    _require(config, "layer_types", (None,), when=len(set(config["layer_types"] or ())) > 1)
    _require(config, "rope_scaling", ("linear", "yarn", "longrope", "llama3"), when=rope_type == "dynamic")
    if rope_type == "yarn" and config["rope_scaling"].get("truncate") is False:
        raise _unsupported("rope_scaling['truncate']", False, "True")
    has_factors = rope_type in ("longrope", "llama3")  # a tensor that the graphs of Qwen do not read
    if config["qk_norm"]:
        for name in ("attention_bias", "attention_output_bias", "mlp_bias"):
            _require(config, name, (False,))
        _require(config, "rope_scaling", ("linear", "yarn"), when=has_factors)
        return "qwen3"
    # Its graph takes the heads of the queries for as wide as the hidden states.
    is_wide = config["num_query_heads"] * config["head_dim"] != config["hidden_dim"]
    others = config["attention_output_bias"] or config["mlp_bias"] or has_factors or is_wide
    return "qwen2" if config["attention_bias"] and not others else "llama"


def gguf_metadata(config: Mapping, dtype: str, name: str, context_length: int, attention_factor: float) -> dict:
    """Give the keys and values that describe a model, without its tokenizer.

    Args:
        config: that of a `LlamaBackbone`.
        dtype: one of `GGUF_DTYPES`.
        name: of the model, for people.
        context_length: the longest sequence, which llama.cpp has to be told.
        attention_factor: what the cosines and sines are multiplied by.

    Returns:
        Values by key: str, int and float. The architecture's own key is written with the file.
    """
    values = {
        "vocab_size": config["vocabulary_size"],
        "context_length": context_length,
        "embedding_length": config["hidden_dim"],
        "block_count": config["num_layers"],
        "feed_forward_length": config["intermediate_dim"],
        "attention.head_count": config["num_query_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["layer_norm_epsilon"]),
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": float(config["rope_max_wavelength"]),
        **_rope_scaling(config, attention_factor),
        **_sliding_window(config),
    }
    architecture = gguf_architecture(config)
    return {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(_ENCODINGS[dtype].file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{architecture}.{key}": value for key, value in values.items()},
    }


def write_gguf(
    path: str | os.PathLike,
    config: Mapping,
    dtype: str,
    metadata: Mapping[str, object],
    weights: Iterable[tuple[str, np.ndarray]],
    rope_factors: Mapping[str, np.ndarray],
    overwrite: bool = False,
) -> None:
    """Write a GGUF file, whole or not at all, with one tensor in memory at a time.

    Norms and biases are float32. So that rows which do not fill blocks of 32 can be written at all, they are float16
    where a matrix of them is to be quantised.

    Args:
        path: the file.
        config: that of a `LlamaBackbone`.
        dtype: one of `GGUF_DTYPES`.
        metadata: values by key: str, bool, int, float, or a list of one of these. An int is written as unsigned.
        weights: (variable path, array) in the order of the computation.
        rope_factors: further tensors by name: what llama.cpp divides frequencies by.
        overwrite: whether a file that is there is replaced.

    Raises:
        ValueError: `path` is a directory, or is there and `overwrite` is false.
        ResourceError: the disk is full, failing or read-only.
        NonFiniteError: a weight that is no number, or that the dtype cannot hold.
    """
    architecture = gguf_architecture(config)
    expected = list(expected_tensors(config, GGUF_LLAMA if architecture == "llama" else GGUF_QWEN))
    types = [_tensor_type(tensor, dtype, config["tie_word_embeddings"]) for tensor in expected]
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    for key, value in metadata.items():
        writer.add_key_value(key, value, _value_type(value))
    infos = [(name, factors.shape, _F32) for name, factors in rope_factors.items()]
    infos += [(tensor.name, tensor.stored_shape, kind) for tensor, kind in zip(expected, types, strict=True)]
    for name, shape, kind in infos:
        writer.add_tensor_info(name, shape, np.dtype("float32"), _num_bytes(shape, kind), raw_dtype=kind)
    with staged_file(path, overwrite, sum(_num_bytes(shape, kind) for _, shape, kind in infos)) as staged:
        try:
            writer.write_header_to_file(staged)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _write_padded(writer, b"")
            for factors in rope_factors.values():
                _write_padded(writer, factors.astype("float32"))
            tensors = zip(expected, types, weights, strict=True)
            for tensor, kind, (_, array) in progress.track(tensors, "writing weights", total=len(expected)):
                _write_padded(writer, _encoded(tensor.path, tensor.to_stored(array), kind))
        finally:
            writer.close()


def _write_padded(writer: gguf.GGUFWriter, values: np.ndarray | bytes) -> None:
    """Append values, and zeros up to where the next ones may begin.

    The writer's own way is NumPy's `tofile`, which does not say why it failed: a full disk would look like a bug.
    """
    (file,) = writer.fout
    file.write(values)
    writer.write_padding(file, file.tell())


def _unsupported(name: str, received: object, expected: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} = {received!r}; expected {expected}: llama.cpp cannot run another. Export the model to another format."
    )


def _require(config: Mapping, name: str, allowed: tuple, when: bool | None = None) -> None:
    if config[name] not in allowed if when is None else when:
        raise _unsupported(name, config[name], " or ".join(map(repr, allowed)))


def _rope_type(config: Mapping) -> str | None:
    return None if config["rope_scaling"] is None else config["rope_scaling"]["rope_type"]


def _rope_scaling(config: Mapping, attention_factor: float) -> dict[str, object]:
    """Say how positions are scaled. A factor may stand there for linear and yarn alone: llama.cpp reads it for all."""
    rope_type, scaling = _rope_type(config), config["rope_scaling"] or {}
    values = {} if rope_type in (None, "llama3") else {"type": rope_type}
    original = scaling.get("original_max_position_embeddings") or config["max_sequence_length"]
    if rope_type in ("yarn", "longrope", "llama3"):
        values["original_context_length"] = original
    if rope_type in ("linear", "yarn"):
        factor = scaling.get("factor") or config["max_sequence_length"] / original
        values["factor"] = float(factor)
    if rope_type == "yarn":
        # llama.cpp multiplies by 1 + 0.1 ln(factor) of its own accord.
        if (extra := attention_factor / (1 + 0.1 * math.log(factor))) != 1:
            values["attn_factor"] = extra
        values |= _yarn_betas(scaling)
    if rope_type == "longrope":
        values["attn_factor"] = attention_factor
        warnings.warn(
            f"rope_scaling: llama.cpp takes the long factors where its context (n_ctx) is longer than {original}, and "
            "kllama where the text is.",
            stacklevel=2,
        )
    return {f"rope.scaling.{name}": value for name, value in values.items()}


def _yarn_betas(scaling: Mapping) -> dict[str, float]:
    betas = {name: scaling.get(name) or default for name, default in (("beta_fast", 32), ("beta_slow", 1))}
    if list(betas.values()) == [32, 1]:
        return {}
    warnings.warn(
        "rope_scaling: llama.cpp does not read beta_fast and beta_slow from a file. Run it with --yarn-beta-fast "
        f"{betas['beta_fast']} --yarn-beta-slow {betas['beta_slow']}.",
        stacklevel=2,
    )
    return {f"yarn_{name}": float(beta) for name, beta in betas.items()}


def _sliding_window(config: Mapping) -> dict[str, int]:
    window = config["sliding_window"]
    if window is None or "sliding_attention" not in (config["layer_types"] or ["sliding_attention"]):
        return {}
    if config["max_sequence_length"] is None or window < config["max_sequence_length"]:
        warnings.warn(
            "sliding_window: llama.cpp lets a token of this architecture see all tokens before it. Texts of more than "
            f"{window} tokens get other logits there.",
            stacklevel=2,
        )
    return {"attention.sliding_window": window}


def _tensor_type(tensor, dtype: str, is_tied: bool) -> GGMLQuantizationType:
    encoding = _ENCODINGS[dtype]
    if len(tensor.stored_shape) == 1:
        return _F32
    kind = encoding.head if tensor.path == _HEADS[is_tied] else encoding.matrices
    return _F16 if tensor.stored_shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _num_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * num_bytes


def _encoded(path: str, array: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    array = np.ascontiguousarray(array, dtype="float32")
    largest = float(np.maximum(array.max(), -array.min()))
    if not largest <= _LARGEST[kind]:
        raise NonFiniteError(
            f"{path}: largest absolute value = {largest}; expected at most {_LARGEST[kind]:g}, which {kind.name} can "
            "hold. Export the model in float32, if its weights are numbers."
        )
    if kind is _BF16:
        return array.astype(ml_dtypes.bfloat16).view("uint16")
    return gguf.quants.quantize(array, kind)


def _value_type(value: object) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    kinds = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
    return kinds.get(type(value), GGUFValueType.ARRAY)
