"""The one table of tensor names: how other formats call, shape and order what kllama stores at a variable path.

Both directions follow from a row: `ExpectedTensor.to_kllama` imports, `ExpectedTensor.to_huggingface` exports. Another
format is another column of names. Called by the readers and writers of this folder; NumPy only, and no files.

RoPE is half-split, the order of Hugging Face: dimension `i` of a head turns with `i + H/2`. So query and key are taken
as they are; formats that store them interleaved (Meta, llama2.c, most GGUF files) have to permute them first.

Letters: V vocabulary, D hidden dim, F intermediate dim, N query heads, K key/value heads, H head dim.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
    """Two functions of (array, shape wanted) that undo each other."""

    to_kllama: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    to_huggingface: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _keep(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(N*H,) to (N, H) and back; everything else keeps its shape."""
    return array.reshape(shape)


def _kernel(matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An (out, in) matrix to a kernel, input first: (N*H, D) to (D, N, H), (D, N*H) to (N, H, D), (F, D) to (D, F)."""
    return matrix.T.reshape(shape)


def _matrix(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A kernel to its (out, in) matrix: the inverse of `_kernel`."""
    return kernel.reshape(shape[::-1]).T


KEEP = Transform(_keep, _keep)
KERNEL = Transform(_kernel, _matrix)


class Row(NamedTuple):
    """A line of the table. In a row that every layer has, `*` is `model.layers.{i}` or `transformer_layer_{i}`."""

    huggingface: str
    huggingface_shape: str
    path: str
    shape: str
    transform: Transform
    when: str


# When a tensor is there: always, or with the setting of that name.
ALWAYS, QKVO_BIAS, MLP_BIAS, UNTIED = "always", "attention_bias", "mlp_bias", "untied"

# In the order of the computation. A Hugging Face axis is a word ("NH" is one of N times H), a kllama axis a letter.
# fmt: off
TABLE = tuple(Row(*row) for row in (
    # Hugging Face                        shape   kllama                                      shape  change  when
    ("model.embed_tokens.weight",         "V D",  "token_embedding/embeddings",               "VD",  KEEP,   ALWAYS),
    ("*.input_layernorm.weight",          "D",    "*/self_attention_layernorm/scale",         "D",   KEEP,   ALWAYS),
    ("*.self_attn.q_proj.weight",         "NH D", "*/self_attention/query/kernel",            "DNH", KERNEL, ALWAYS),
    ("*.self_attn.q_proj.bias",           "NH",   "*/self_attention/query/bias",              "NH",  KEEP,   QKVO_BIAS),
    ("*.self_attn.k_proj.weight",         "KH D", "*/self_attention/key/kernel",              "DKH", KERNEL, ALWAYS),
    ("*.self_attn.k_proj.bias",           "KH",   "*/self_attention/key/bias",                "KH",  KEEP,   QKVO_BIAS),
    ("*.self_attn.v_proj.weight",         "KH D", "*/self_attention/value/kernel",            "DKH", KERNEL, ALWAYS),
    ("*.self_attn.v_proj.bias",           "KH",   "*/self_attention/value/bias",              "KH",  KEEP,   QKVO_BIAS),
    ("*.self_attn.o_proj.weight",         "D NH", "*/self_attention/attention_output/kernel", "NHD", KERNEL, ALWAYS),
    ("*.self_attn.o_proj.bias",           "D",    "*/self_attention/attention_output/bias",   "D",   KEEP,   QKVO_BIAS),
    ("*.post_attention_layernorm.weight", "D",    "*/feedforward_layernorm/scale",            "D",   KEEP,   ALWAYS),
    ("*.mlp.gate_proj.weight",            "F D",  "*/feedforward_gate_dense/kernel",          "DF",  KERNEL, ALWAYS),
    ("*.mlp.gate_proj.bias",              "F",    "*/feedforward_gate_dense/bias",            "F",   KEEP,   MLP_BIAS),
    ("*.mlp.up_proj.weight",              "F D",  "*/feedforward_intermediate_dense/kernel",  "DF",  KERNEL, ALWAYS),
    ("*.mlp.up_proj.bias",                "F",    "*/feedforward_intermediate_dense/bias",    "F",   KEEP,   MLP_BIAS),
    ("*.mlp.down_proj.weight",            "D F",  "*/feedforward_output_dense/kernel",        "FD",  KERNEL, ALWAYS),
    ("*.mlp.down_proj.bias",              "D",    "*/feedforward_output_dense/bias",          "D",   KEEP,   MLP_BIAS),
    ("model.norm.weight",                 "D",    "sequence_output_layernorm/scale",          "D",   KEEP,   ALWAYS),
    ("lm_head.weight",                    "V D",  "token_embedding/reverse_embeddings",       "DV",  KERNEL, UNTIED),
))
# fmt: on


class ExpectedTensor(NamedTuple):
    """A row of the table for one layer of one model, with its sizes filled in."""

    huggingface: str
    huggingface_shape: tuple[int, ...]
    path: str
    shape: tuple[int, ...]
    transform: Transform

    def to_kllama(self, array: np.ndarray) -> np.ndarray:
        """Import: an array of `huggingface_shape` to one of `shape`, in its own dtype."""
        return self.transform.to_kllama(array, self.shape)

    def to_huggingface(self, array: np.ndarray) -> np.ndarray:
        """Export: an array of `shape` to one of `huggingface_shape`, in its own dtype."""
        return self.transform.to_huggingface(array, self.huggingface_shape)


def expected_tensors(backbone_config: dict) -> Iterator[ExpectedTensor]:
    """Yield exactly the tensors of a model, in the order of the computation.

    Lazily: a caller that stops at the first missing ones is safe from a configuration with a billion layers.

    Args:
        backbone_config: arguments of `LlamaBackbone`, `head_dim` and both biases among them.
    """
    sizes = _sizes(backbone_config)
    for per_layer, rows in groupby(_present_rows(backbone_config), key=_is_per_layer):
        rows = list(rows)
        for layer in range(backbone_config["num_layers"] if per_layer else 1):
            for row in rows:
                yield ExpectedTensor(
                    row.huggingface.replace("*", f"model.layers.{layer}"),
                    _shape(row.huggingface_shape.split(), sizes),
                    row.path.replace("*", f"transformer_layer_{layer}"),
                    _shape(row.shape, sizes),
                    row.transform,
                )


def num_parameters(backbone_config: dict) -> int:
    """Return the number of parameters, from the configuration alone."""
    sizes = _sizes(backbone_config)
    return sum(
        math.prod(_shape(row.shape, sizes)) * (backbone_config["num_layers"] if _is_per_layer(row) else 1)
        for row in _present_rows(backbone_config)
    )


def _present_rows(config: dict) -> list[Row]:
    present = {
        ALWAYS: True,
        QKVO_BIAS: config["attention_bias"],
        MLP_BIAS: config["mlp_bias"],
        UNTIED: not config["tie_word_embeddings"],
    }
    return [row for row in TABLE if present[row.when]]


def _is_per_layer(row: Row) -> bool:
    return row.path.startswith("*")


def _sizes(config: dict) -> dict[str, int]:
    return {
        "V": config["vocabulary_size"],
        "D": config["hidden_dim"],
        "F": config["intermediate_dim"],
        "N": config["num_query_heads"],
        "K": config["num_key_value_heads"],
        "H": config["head_dim"],
    }


def _shape(axes: Iterable[str], sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in axes)
