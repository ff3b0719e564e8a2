"""The one table of tensor names: how every format calls, shapes and orders what kllama stores at a variable path.

A row says which axes the stored array has and which axes the variable has, and that is the transform: the way there and
the way back are computed from it. Another format is another column of names. Called by the readers and writers of this
folder; NumPy only, and no files.

RoPE is half-split, the order of Hugging Face: dimension `i` of a head turns with `i + H/2`. Meta, llama2.c and the GGUF
files of llama and Mistral interleave the pairs, `2 i` with `2 i + 1`: in the arrays whose heads are turned, they store
the head dim as (h, p) where Hugging Face and kllama have (p, h).

Letters: V vocabulary, D hidden dim, F intermediate dim, N query heads, K key/value heads, H head dim; h = H/2 the pairs
of a head, p = 2 the members of a pair.
"""

import math
from collections.abc import Container, Iterable, Iterator
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np

from kllama.checkpoints.files.reader import LISTED, listed
from kllama.errors import CheckpointError


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        name: Hugging Face's. In a row that every layer has, `*` is `model.layers.{i}` or `transformer_layer_{i}`.
        stored_axes: of the array in a file, a word for each axis: "NH D" has an axis of N times H, and one of D.
        path: of the variable.
        axes: of the variable, likewise.
        when: the setting with which the tensor is there.
    """

    name: str
    stored_axes: str
    path: str
    axes: str
    when: str


# When a tensor is there: always, or with the setting of that name.
ALWAYS, UNTIED = "always", "untied"
QKV_BIAS, OUT_BIAS, MLP_BIAS, QK_NORM = "attention_bias", "attention_output_bias", "mlp_bias", "qk_norm"

# In the order of the computation.
# fmt: off
TABLE = tuple(Row(*row) for row in (
    # Hugging Face                        its axes  kllama                                      axes     when
    ("model.embed_tokens.weight",         "V D",    "token_embedding/embeddings",               "V D",   ALWAYS),
    ("*.input_layernorm.weight",          "D",      "*/self_attention_layernorm/scale",         "D",     ALWAYS),
    ("*.self_attn.q_proj.weight",         "NH D",   "*/self_attention/query/kernel",            "D N H", ALWAYS),
    ("*.self_attn.q_proj.bias",           "NH",     "*/self_attention/query/bias",              "N H",   QKV_BIAS),
    ("*.self_attn.k_proj.weight",         "KH D",   "*/self_attention/key/kernel",              "D K H", ALWAYS),
    ("*.self_attn.k_proj.bias",           "KH",     "*/self_attention/key/bias",                "K H",   QKV_BIAS),
    ("*.self_attn.v_proj.weight",         "KH D",   "*/self_attention/value/kernel",            "D K H", ALWAYS),
    ("*.self_attn.v_proj.bias",           "KH",     "*/self_attention/value/bias",              "K H",   QKV_BIAS),
    ("*.self_attn.q_norm.weight",         "H",      "*/self_attention/query_norm/scale",        "H",     QK_NORM),
    ("*.self_attn.k_norm.weight",         "H",      "*/self_attention/key_norm/scale",          "H",     QK_NORM),
    ("*.self_attn.o_proj.weight",         "D NH",   "*/self_attention/attention_output/kernel", "N H D", ALWAYS),
    ("*.self_attn.o_proj.bias",           "D",      "*/self_attention/attention_output/bias",   "D",     OUT_BIAS),
    ("*.post_attention_layernorm.weight", "D",      "*/feedforward_layernorm/scale",            "D",     ALWAYS),
    ("*.mlp.gate_proj.weight",            "F D",    "*/feedforward_gate_dense/kernel",          "D F",   ALWAYS),
    ("*.mlp.gate_proj.bias",              "F",      "*/feedforward_gate_dense/bias",            "F",     MLP_BIAS),
    ("*.mlp.up_proj.weight",              "F D",    "*/feedforward_intermediate_dense/kernel",  "D F",   ALWAYS),
    ("*.mlp.up_proj.bias",                "F",      "*/feedforward_intermediate_dense/bias",    "F",     MLP_BIAS),
    ("*.mlp.down_proj.weight",            "D F",    "*/feedforward_output_dense/kernel",        "F D",   ALWAYS),
    ("*.mlp.down_proj.bias",              "D",      "*/feedforward_output_dense/bias",          "D",     MLP_BIAS),
    ("model.norm.weight",                 "D",      "sequence_output_layernorm/scale",          "D",     ALWAYS),
    ("lm_head.weight",                    "V D",    "token_embedding/reverse_embeddings",       "D V",   UNTIED),
))

# What other formats call the modules of Hugging Face; `*` is a layer, and the naming says how a layer is spelt.
_MODULES = {
    # Hugging Face               Meta                  llama2.c          GGUF
    "model.embed_tokens":         ("tok_embeddings",    "tok_emb",        "token_embd"),
    "*.input_layernorm":          ("*.attention_norm",  "*att_norm",      "*.attn_norm"),
    "*.self_attn.q_proj":         ("*.attention.wq",    "*wq",            "*.attn_q"),
    "*.self_attn.k_proj":         ("*.attention.wk",    "*wk",            "*.attn_k"),
    "*.self_attn.v_proj":         ("*.attention.wv",    "*wv",            "*.attn_v"),
    "*.self_attn.q_norm":         ("*.attention.q_norm", "*q_norm",       "*.attn_q_norm"),
    "*.self_attn.k_norm":         ("*.attention.k_norm", "*k_norm",       "*.attn_k_norm"),
    "*.self_attn.o_proj":         ("*.attention.wo",    "*wo",            "*.attn_output"),
    "*.post_attention_layernorm": ("*.ffn_norm",        "*ffn_norm",      "*.ffn_norm"),
    "*.mlp.gate_proj":            ("*.feed_forward.w1", "*w1",            "*.ffn_gate"),
    "*.mlp.up_proj":              ("*.feed_forward.w3", "*w3",            "*.ffn_up"),
    "*.mlp.down_proj":            ("*.feed_forward.w2", "*w2",            "*.ffn_down"),
    "model.norm":                 ("norm",              "norm",           "output_norm"),
    "lm_head":                    ("output",            "output",         "output"),
}
# fmt: on

# The modules whose heads are turned by their positions.
_TURNED = ("*.self_attn.q_proj", "*.self_attn.k_proj", "*.self_attn.q_norm", "*.self_attn.k_norm")


class Naming(NamedTuple):
    """How a format calls and orders tensors.

    Attributes:
        column: of the table of module names, None for Hugging Face's own names.
        layer: what stands for a layer's `*`, with `{}` for its number.
        interleaved: whether the pairs that RoPE turns lie beside each other.
        has_suffix: whether a name ends in `.weight` or `.bias`.
    """

    column: int | None
    layer: str
    interleaved: bool
    has_suffix: bool = True

    def name(self, row: Row, layer: int) -> str:
        """Give the name of a row's tensor in a layer."""
        module, suffix = row.name.rsplit(".", 1)
        if self.column is not None:
            module = _MODULES[module][self.column]
        name = f"{module}.{suffix}" if self.has_suffix else module
        return name.replace("*", self.layer.format(layer))


HUGGINGFACE = Naming(None, "model.layers.{}", interleaved=False)
META = Naming(0, "layers.{}", interleaved=True)
LLAMA2C = Naming(1, "{}.", interleaved=True, has_suffix=False)
GGUF_LLAMA = Naming(2, "blk.{}", interleaved=True)
GGUF_QWEN = Naming(2, "blk.{}", interleaved=False)


class ExpectedTensor(NamedTuple):
    """A row of the table for one layer of one model, with its sizes filled in.

    Attributes:
        name: in the file.
        stored_shape: there.
        path: of the variable.
        shape: of the variable.
        stored_letters: the axes of the stored array, taken apart: "NHD" for "NH D".
        letters: those of the variable.
        sizes: of each letter.
    """

    name: str
    stored_shape: tuple[int, ...]
    path: str
    shape: tuple[int, ...]
    stored_letters: str
    letters: str
    sizes: dict[str, int]

    def to_kllama(self, array: np.ndarray) -> np.ndarray:
        """Import: an array of `stored_shape` to one of `shape`, in its own dtype; a view where that is possible."""
        return _rearrange(array, self.stored_letters, self.letters, self.sizes).reshape(self.shape)

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        """Export: an array of `shape` to one of `stored_shape`, in its own dtype; a view where that is possible."""
        return _rearrange(array, self.letters, self.stored_letters, self.sizes).reshape(self.stored_shape)


def expected_tensors(backbone_config: dict, naming: Naming = HUGGINGFACE) -> Iterator[ExpectedTensor]:
    """Yield exactly the tensors of a model, in the order of the computation.

    Lazily: a caller that stops at the first missing ones is safe from a configuration with a billion layers.

    Args:
        backbone_config: arguments of `LlamaBackbone`, `head_dim`, `qk_norm` and all biases among them.
        naming: the format whose names and shapes are wanted.
    """
    sizes = _sizes(backbone_config)
    for per_layer, rows in groupby(_present_rows(backbone_config), key=_is_per_layer):
        rows = [(row, *_letters(row, naming)) for row in rows]
        for layer in range(backbone_config["num_layers"] if per_layer else 1):
            for row, stored_letters, letters in rows:
                yield ExpectedTensor(
                    naming.name(row, layer),
                    _shape(row.stored_axes, sizes),
                    row.path.replace("*", f"transformer_layer_{layer}"),
                    _shape(row.axes, sizes),
                    stored_letters,
                    letters,
                    sizes,
                )


def refuse_missing(backbone_config: dict, stored: Container[str], source: object, naming: Naming = HUGGINGFACE) -> None:
    """Refuse files that lack tensors of a model.

    Args:
        backbone_config: as of `expected_tensors`.
        stored: the names of the tensors that are there.
        source: the files, for the message.
        naming: whose names they are.

    Raises:
        CheckpointError: naming up to ten.
    """
    # Lazily: at most ten missing names are looked for, however many layers the configuration claims.
    missing = (tensor.name for tensor in expected_tensors(backbone_config, naming) if tensor.name not in stored)
    missing = list(islice(missing, LISTED))
    if missing:
        raise CheckpointError(f"{source}: missing tensors: {listed(missing)}.")


def num_parameters(backbone_config: dict) -> int:
    """Return the number of parameters, from the configuration alone."""
    sizes = _sizes(backbone_config)
    return sum(
        math.prod(_shape(row.axes, sizes)) * (backbone_config["num_layers"] if _is_per_layer(row) else 1)
        for row in _present_rows(backbone_config)
    )


def _present_rows(config: dict) -> list[Row]:
    present = {name: config[name] for name in (QKV_BIAS, OUT_BIAS, MLP_BIAS, QK_NORM)}
    present |= {ALWAYS: True, UNTIED: not config["tie_word_embeddings"]}
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
        "h": config["head_dim"] // 2,
        "p": 2,
    }


def _letters(row: Row, naming: Naming) -> tuple[str, str]:
    """Take the axes of a row apart, those of the stored array and those of the variable."""
    stored, own = row.stored_axes.replace(" ", ""), row.axes.replace(" ", "")
    if naming.interleaved and row.name.rsplit(".", 1)[0] in _TURNED:
        return stored.replace("H", "hp"), own.replace("H", "ph")
    return stored, own


def _shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in axes.split())


def _rearrange(array: np.ndarray, letters: Iterable[str], wanted: Iterable[str], sizes: dict[str, int]) -> np.ndarray:
    """Take the axes of an array apart and put them into another order."""
    order = [letters.index(letter) for letter in wanted]
    return array.reshape([sizes[letter] for letter in letters]).transpose(order)
