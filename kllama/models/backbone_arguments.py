"""Checks and translations of the arguments of `LlamaBackbone`: everything is refused here, before a layer exists."""

import difflib
import math
from collections.abc import Mapping

from kllama.arguments import check_flag, check_integer, check_number
from kllama.core.activations import get_activation
from kllama.core.rope_scaling import check_rope_scaling

_COUNTS = (
    "vocabulary_size",
    "num_layers",
    "num_query_heads",
    "hidden_dim",
    "intermediate_dim",
    "num_key_value_heads",
    "head_dim",
    "max_sequence_length",
)
_POSITIVE = ("rope_max_wavelength", "layer_norm_epsilon", "initializer_range")
_RATES = ("dropout", "attention_dropout")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_OPTIONAL = ("max_sequence_length",)
_LAYER_KEYWORDS = ("name", "trainable")

CONFIG_NAMES = (*_COUNTS, *_POSITIVE, *_RATES, *_FLAGS, "activation", "rope_scaling")
"""The arguments that make up a backbone's config, besides `name`, `trainable` and `dtype`."""

KERAS_HUB_ROPE_KEYWORDS = (
    "rope_position_scaling_factor",
    "rope_frequency_adjustment_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_pretraining_sequence_length",
)


def check_arguments(arguments: Mapping) -> None:
    """Check the arguments of a backbone, apart from `dtype` and rope scaling.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range, and for heads that do not fit together.
    """
    for name in _COUNTS:
        if not (arguments[name] is None and name in _OPTIONAL):
            check_integer(name, arguments[name], minimum=1)
    for name in _POSITIVE:
        check_number(name, arguments[name], lambda x: 0 < x < math.inf, "a positive finite number")
    for name in _RATES:
        check_number(name, arguments[name], lambda x: 0 <= x < 1, "at least 0 and less than 1")
    for name in _FLAGS:
        check_flag(name, arguments[name])
    get_activation(arguments["activation"])
    _check_heads(arguments)


def resolve_head_dim(head_dim, hidden_dim, num_query_heads) -> int:
    """Give `head_dim`, or hidden_dim / num_query_heads where it is None.

    Raises:
        ValueError: if the division leaves a remainder.
    """
    if head_dim is not None:
        return head_dim
    check_integer("hidden_dim", hidden_dim, minimum=1)
    check_integer("num_query_heads", num_query_heads, minimum=1)
    if hidden_dim % num_query_heads:
        raise ValueError(
            f"hidden_dim ({hidden_dim}) must be a multiple of num_query_heads ({num_query_heads}), or head_dim given."
        )
    return hidden_dim // num_query_heads


def resolve_rope_scaling(
    rope_scaling, rope_scaling_factor, keras_hub_keywords: Mapping, head_dim: int, max_sequence_length
) -> dict | None:
    """Give the one `rope_scaling` mapping that the three ways of asking for it mean.

    Args:
        rope_scaling: the mapping itself, or None.
        rope_scaling_factor: shorthand for `{"rope_type": "linear", "factor": rope_scaling_factor}`; 1 asks for nothing.
        keras_hub_keywords: those of KerasHub 0.32's five `rope_*` keywords that were given.
        head_dim: H.
        max_sequence_length: the model's longest sequence, or None.

    Raises:
        ValueError: if more than one way is used, or a value is wrong.
    """
    check_number("rope_scaling_factor", rope_scaling_factor, lambda x: 1 <= x < math.inf, "a number of at least 1")
    asked = {
        "rope_scaling": rope_scaling,
        "rope_scaling_factor": _linear(rope_scaling_factor),
        "KerasHub's rope keywords": _from_keras_hub(**keras_hub_keywords),
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(asked) > 1:
        raise ValueError(f"Position scaling is given more than once, by {' and '.join(asked)}: {asked}; expected one.")
    for mapping in asked.values():
        return check_rope_scaling(mapping, head_dim, max_sequence_length)
    return None


def refuse_unknown_keywords(keywords: Mapping) -> None:
    """Raise a TypeError that names each keyword that no backbone takes, and the nearest one that it does."""
    unknown = [name for name in keywords if name not in _LAYER_KEYWORDS]
    if unknown:
        known = (*CONFIG_NAMES, "rope_scaling_factor", "dtype", *_LAYER_KEYWORDS, *KERAS_HUB_ROPE_KEYWORDS)
        nearest = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise TypeError(f"LlamaBackbone got unknown keyword arguments {unknown}.{hint}")


def _linear(factor):
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}


def _from_keras_hub(
    rope_position_scaling_factor=1.0,
    rope_frequency_adjustment_factor=None,
    rope_low_freq_factor=None,
    rope_high_freq_factor=None,
    rope_pretraining_sequence_length=None,
):
    llama3 = {
        "factor": rope_frequency_adjustment_factor,
        "low_freq_factor": rope_low_freq_factor,
        "high_freq_factor": rope_high_freq_factor,
        "original_max_position_embeddings": rope_pretraining_sequence_length,
    }
    given = [value is not None for value in llama3.values()]
    if not any(given):
        return _linear(rope_position_scaling_factor)
    if not all(given) or rope_position_scaling_factor != 1:
        raise ValueError(
            "rope_frequency_adjustment_factor, rope_low_freq_factor, rope_high_freq_factor and "
            f"rope_pretraining_sequence_length ({llama3}) must be all given or all None, and then "
            f"rope_position_scaling_factor ({rope_position_scaling_factor}) must be 1."
        )
    return {"rope_type": "llama3", **llama3}


def _check_heads(arguments):
    num_query_heads, num_key_value_heads = arguments["num_query_heads"], arguments["num_key_value_heads"]
    if num_query_heads % num_key_value_heads:
        raise ValueError(
            f"num_query_heads ({num_query_heads}) must be a multiple of num_key_value_heads ({num_key_value_heads})."
        )
    if arguments["head_dim"] % 2:
        raise ValueError(f"head_dim ({arguments['head_dim']}) must be even: rotary positions turn pairs.")
