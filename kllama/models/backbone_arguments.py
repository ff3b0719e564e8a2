"""Checks and translations of the arguments of `LlamaBackbone`: everything is refused here, before a layer exists."""

import difflib
import math
from collections.abc import Mapping, Sequence
from numbers import Integral

from kllama.arguments import check_flag, check_integer, check_number
from kllama.core.activations import get_activation
from kllama.core.masks import LAYER_TYPES
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
    "sliding_window",
)
_POSITIVE = ("rope_max_wavelength", "layer_norm_epsilon")
_RATES = ("dropout", "attention_dropout")
_FLAGS = ("tie_word_embeddings", "attention_bias", "attention_output_bias", "qk_norm", "mlp_bias")
_OPTIONAL = ("head_dim", "max_sequence_length", "sliding_window")
_LAYER_KEYWORDS = ("name", "trainable")

CONFIG_NAMES = (
    *_COUNTS,
    *_POSITIVE,
    *_RATES,
    *_FLAGS,
    "initializer_range",
    "activation",
    "rope_scaling",
    "layer_types",
)
"""The arguments that make up a backbone's config, besides `name`, `trainable` and `dtype`."""

KERAS_HUB_ROPE_KEYWORDS = (
    "rope_position_scaling_factor",
    "rope_frequency_adjustment_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_pretraining_sequence_length",
)


def settle_arguments(arguments: Mapping, rope_scaling_factor: float, keywords: Mapping) -> dict:
    """Check the arguments of a backbone and give the config that they amount to.

    Args:
        arguments: a value for each of `CONFIG_NAMES`.
        rope_scaling_factor: the constructor's argument of that name.
        keywords: further keywords: KerasHub 0.32's five `rope_*` ones.

    Returns:
        A value for each of `CONFIG_NAMES`: plain Python numbers, `head_dim` filled in, and in `rope_scaling` the one
        mapping that the three ways of asking for position scaling mean.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range, heads that do not fit together, and position scaling asked for twice.
    """
    config = dict(arguments)
    for name in _COUNTS:
        if not (config[name] is None and name in _OPTIONAL):
            check_integer(name, config[name], minimum=1)
            config[name] = int(config[name])
    for name in _POSITIVE:
        check_number(name, config[name], lambda x: 0 < x < math.inf, "a positive finite number")
        config[name] = _plain(config[name])
    check_number("initializer_range", config["initializer_range"], lambda x: 0 <= x < math.inf, "at least 0")
    config["initializer_range"] = _plain(config["initializer_range"])
    for name in _RATES:
        check_number(name, config[name], lambda x: 0 <= x < 1, "at least 0 and less than 1")
        config[name] = _plain(config[name])
    if config["attention_output_bias"] is None:
        config["attention_output_bias"] = config["attention_bias"]
    for name in _FLAGS:
        check_flag(name, config[name])
    get_activation(config["activation"])
    _settle_heads(config)
    _settle_layer_types(config)
    config["rope_scaling"] = _settle_rope_scaling(config, rope_scaling_factor, keywords)
    return config


def _settle_heads(config: dict) -> None:
    hidden_dim, num_query_heads = config["hidden_dim"], config["num_query_heads"]
    if config["head_dim"] is None:
        if hidden_dim % num_query_heads:
            raise ValueError(
                f"hidden_dim ({hidden_dim}) must be a multiple of num_query_heads ({num_query_heads}), or head_dim be "
                "given."
            )
        config["head_dim"] = hidden_dim // num_query_heads
    if config["head_dim"] % 2:
        raise ValueError(f"head_dim ({config['head_dim']}) must be even: rotary positions turn pairs.")
    if num_query_heads % config["num_key_value_heads"]:
        raise ValueError(
            f"num_query_heads ({num_query_heads}) must be a multiple of num_key_value_heads "
            f"({config['num_key_value_heads']})."
        )


def _settle_layer_types(config: dict) -> None:
    types, num_layers = config["layer_types"], config["num_layers"]
    if types is None:
        return
    if isinstance(types, str) or not isinstance(types, Sequence):
        raise TypeError(f"layer_types ({types!r}) must be a list of str, or None.")
    if len(types) != num_layers or not all(kind in LAYER_TYPES for kind in types):
        raise ValueError(f"layer_types ({types!r}) must name one of {LAYER_TYPES} for each of the {num_layers} layers.")
    if (LAYER_TYPES[1] in types) != (config["sliding_window"] is not None):
        raise ValueError(
            f"sliding_window ({config['sliding_window']}) must be given if, and only if, layer_types ({types!r}) names "
            f"{LAYER_TYPES[1]!r}."
        )
    config["layer_types"] = list(types) if len(set(types)) > 1 else None


def _settle_rope_scaling(config: dict, factor: float, keywords: Mapping) -> dict | None:
    asked = {
        "rope_scaling": config["rope_scaling"],
        "rope_scaling_factor": _linear("rope_scaling_factor", factor),
        "KerasHub's rope keywords": _from_keras_hub(**keywords),
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(asked) > 1:
        raise ValueError(f"Position scaling is given more than once, by {' and '.join(asked)}: {asked}; expected one.")
    for mapping in asked.values():
        mapping = check_rope_scaling(mapping, config["head_dim"], config["max_sequence_length"])
        if mapping["rope_type"] == "yarn" and config["rope_max_wavelength"] <= 1:
            raise ValueError(
                f"rope_max_wavelength ({config['rope_max_wavelength']}) must be greater than 1 with rope_scaling of "
                "type 'yarn'."
            )
        return mapping
    return None


def layer_windows(num_layers: int, sliding_window: int | None, layer_types: list[str] | None) -> tuple[int | None, ...]:
    """Give the sliding window of each layer, None for those whose queries see all keys before them."""
    types = layer_types or [LAYER_TYPES[sliding_window is not None]] * num_layers
    return tuple(sliding_window if kind == LAYER_TYPES[1] else None for kind in types)


def refuse_unknown_keywords(keywords: Mapping) -> None:
    """Raise a TypeError that names each keyword that no backbone takes, and the nearest one that it does."""
    unknown = [name for name in keywords if name not in _LAYER_KEYWORDS]
    if unknown:
        known = (*CONFIG_NAMES, "rope_scaling_factor", "dtype", *_LAYER_KEYWORDS, *KERAS_HUB_ROPE_KEYWORDS)
        nearest = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise TypeError(f"LlamaBackbone got unknown keyword arguments {unknown}.{hint}")


def _linear(name, factor):
    check_number(name, factor, lambda x: 1 <= x < math.inf, "a number of at least 1")
    return None if factor == 1 else {"rope_type": "linear", "factor": _plain(factor)}


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
        return _linear("rope_position_scaling_factor", rope_position_scaling_factor)
    if not all(given) or rope_position_scaling_factor != 1:
        raise ValueError(
            "rope_frequency_adjustment_factor, rope_low_freq_factor, rope_high_freq_factor and "
            f"rope_pretraining_sequence_length ({llama3}) must be all given or all None, and then "
            f"rope_position_scaling_factor ({rope_position_scaling_factor}) must be 1."
        )
    return {"rope_type": "llama3", **llama3}


def _plain(number):
    """Give a number, NumPy's too, as Python's own: configs are written as JSON."""
    return int(number) if isinstance(number, Integral) else float(number)
