"""From the arguments of `LlamaBackbone` to a `config.json` that transformers 4 and 5 read to the same model.

The way back is `config.py`. Which class of transformers a model is follows from its flags; one that no class has is
refused. Writes no files; `writing.py` calls it.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from kllama.core.masks import LAYER_TYPES
from kllama.errors import UnsupportedError

DEFAULT_MAX_POSITIONS = 2048
"""What stands for a `max_sequence_length` of None: transformers needs a number, and this is LlamaConfig's own."""

# Without it, versions 4.57 of transformers warn of a wrong pattern in every large vocabulary.
_FORM = {"transformers_version": "5.0.0"}

_ORIGINAL = "original_max_position_embeddings"

_KEYS = {
    "vocab_size": "vocabulary_size",
    "hidden_size": "hidden_dim",
    "intermediate_size": "intermediate_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_act": "activation",
    "rms_norm_eps": "layer_norm_epsilon",
    "initializer_range": "initializer_range",
    "attention_dropout": "attention_dropout",
    "tie_word_embeddings": "tie_word_embeddings",
}

_FLOATS = ("rms_norm_eps", "initializer_range", "attention_dropout")

# The biases of the attention projections: of none, of query, key and value, of all four, of the output alone.
_NO_BIAS, _QKV_BIAS, _FOUR_BIASES, _OUTPUT_BIAS = "none", "query, key and value", "all four", "output"
_NO_LAYER, _SOME_LAYERS, _ALL_LAYERS = "no layer", "some layers", "all layers"
_ANY_WINDOW = (_NO_LAYER, _SOME_LAYERS, _ALL_LAYERS)


class _Family(NamedTuple):
    """A model type of transformers, and the values of each trait that it can have.

    Attributes:
        model_type: as a `config.json` has it.
        name: how the names of its classes begin.
        attention_bias: which projections have biases.
        mlp_bias: of the feed-forward network.
        qk_norm: whether queries and keys are normalized.
        sliding_window: in which layers.
        odd_heads: whether `hidden_dim` need not be a multiple of `num_query_heads`.
        own_keys: those of these keys that its configuration has.
    """

    model_type: str
    name: str
    attention_bias: tuple[str, ...]
    mlp_bias: tuple[bool, ...]
    qk_norm: tuple[bool, ...]
    sliding_window: tuple[str, ...]
    odd_heads: tuple[bool, ...]
    own_keys: tuple[str, ...]


_QWEN_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_TRAITS = ("attention_bias", "mlp_bias", "qk_norm", "sliding_window", "odd_heads")
_USUAL = (_NO_BIAS, _NO_LAYER, False)
_NO, _YES, _EITHER = (False,), (True,), (False, True)
# The first that fits is taken. Mistral without a window is Llama, but for what its configuration may hold.
# fmt: off
_FAMILIES = (
    _Family("llama",   "Llama",   (_NO_BIAS, _FOUR_BIASES), _EITHER, _NO,  (_NO_LAYER,),             _NO,
            ("attention_bias", "mlp_bias")),
    _Family("mistral", "Mistral", (_NO_BIAS,),              _NO,     _NO,  (_NO_LAYER, _ALL_LAYERS), _EITHER,
            ("sliding_window",)),
    _Family("qwen2",   "Qwen2",   (_QKV_BIAS,),             _NO,     _NO,  _ANY_WINDOW,              _EITHER,
            _QWEN_WINDOW),
    _Family("qwen3",   "Qwen3",   (_NO_BIAS, _FOUR_BIASES), _NO,     _YES, _ANY_WINDOW,              _EITHER,
            ("attention_bias", *_QWEN_WINDOW)),
)
# fmt: on


def huggingface_config(
    backbone_config: Mapping, dtype: str, token_ids: Mapping[str, int | None], *, has_head: bool
) -> dict:
    """Write the arguments of a backbone as a `config.json`.

    Both versions' keys are there, `rope_theta` and `rope_scaling` with `torch_dtype` for version 4, `rope_parameters`
    and `dtype` for version 5. A `max_sequence_length` of None becomes what `rope_scaling` was made for, else
    `DEFAULT_MAX_POSITIONS`. `dropout`, KerasHub's, has no key.

    Args:
        backbone_config: every argument of `LlamaBackbone` that is part of its config; those that name and type the
            layers do not count.
        dtype: of the stored weights.
        token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`; written as null where None, as transformers would
            take 1 and 2 for what is not there.
        has_head: whether the weights are those of a language model, rather than of a base model.

    Raises:
        UnsupportedError: no class of transformers has this combination of settings.
    """
    family = _find_family(backbone_config)
    config = {key: backbone_config[argument] for key, argument in _KEYS.items()}
    config |= {key: float(config[key]) for key in _FLOATS}
    if config["initializer_range"] > 1:  # which version 5 refuses, and only random weights depend on
        del config["initializer_range"]
    own = {**_own_settings(backbone_config), **_windows(backbone_config)}
    positions = _max_positions(backbone_config)
    return {
        "architectures": [family.name + ("ForCausalLM" if has_head else "Model")],
        "model_type": family.model_type,
        **config,
        **{key: own[key] for key in family.own_keys},
        "max_position_embeddings": positions,
        **_rope(backbone_config, positions),
        **token_ids,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **_FORM,
    }


def model_type(backbone_config: Mapping) -> str:
    """Say which model type a backbone is for transformers: "llama", "mistral", "qwen2" or "qwen3"."""
    return _find_family(backbone_config).model_type


def _find_family(config: Mapping) -> _Family:
    traits = _traits(config)
    for family in _FAMILIES:
        if all(traits[name] in getattr(family, name) for name in _TRAITS):
            return family
    received = ", ".join(f"{name} = {value!r}" for name, value in traits.items() if value not in _USUAL)
    classes = ", ".join(f"{family.name} ({_allowed(family)})" for family in _FAMILIES)
    raise UnsupportedError(
        f"backbone: {received}; expected a combination that a class of transformers has: {classes}. Save it as a "
        "preset instead."
    )


def _traits(config: Mapping) -> dict[str, object]:
    biases = config["attention_bias"], config["attention_output_bias"]
    names = {(False, False): _NO_BIAS, (True, False): _QKV_BIAS, (True, True): _FOUR_BIASES}
    window = _NO_LAYER if config["sliding_window"] is None else _SOME_LAYERS if config["layer_types"] else _ALL_LAYERS
    return {
        "attention_bias": names.get(biases, _OUTPUT_BIAS),
        "mlp_bias": config["mlp_bias"],
        "qk_norm": config["qk_norm"],
        "sliding_window": window,
        "odd_heads": config["hidden_dim"] % config["num_query_heads"] != 0,
    }


def _allowed(family: _Family) -> str:
    return ", ".join(f"{name} {' or '.join(map(str, getattr(family, name)))}" for name in _TRAITS[:-1])


def _own_settings(config: Mapping) -> dict:
    return {"attention_bias": config["attention_bias"], "mlp_bias": config["mlp_bias"]}


def _windows(config: Mapping) -> dict:
    window, num_layers = config["sliding_window"], config["num_layers"]
    types = config["layer_types"] or [LAYER_TYPES[window is not None]] * num_layers
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        # From which layer on there are windows: read by versions before `layer_types`, which beats it.
        "max_window_layers": types.index(LAYER_TYPES[1]) if LAYER_TYPES[1] in types else num_layers,
        "layer_types": types,
    }


def _max_positions(config: Mapping) -> int:
    if config["max_sequence_length"] is not None:
        return config["max_sequence_length"]
    scaling = config["rope_scaling"] or {}
    made_for = (scaling.get(_ORIGINAL) or 0) * (scaling.get("factor") or 1)
    return math.ceil(made_for) or DEFAULT_MAX_POSITIONS


def _rope(config: Mapping, positions: int) -> dict:
    """Write the rotary settings for both versions.

    Version 5 takes `rope_scaling` where it is not empty, with the theta beside it, else `rope_parameters`.
    """
    theta = float(config["rope_max_wavelength"])
    if config["rope_scaling"] is None:
        return {
            "rope_theta": theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        }
    scaling = _explicit({key: value for key, value in config["rope_scaling"].items() if value is not None}, positions)
    rope = {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": {**scaling, "rope_theta": theta}}
    if scaling["rope_type"] == "longrope":  # where version 4 looks for it
        rope[_ORIGINAL] = scaling[_ORIGINAL]
    return rope


def _explicit(scaling: dict, positions: int) -> dict:
    """Spell out what the versions of transformers would fill in differently, or not at all; the maths stays the same.

    Version 4 computes no factor for YaRN, and for LongRoPE always the ratio of the lengths, whatever `factor` says.
    """
    if scaling["rope_type"] in ("yarn", "longrope"):
        scaling.setdefault(_ORIGINAL, positions)
        ratio = positions / scaling[_ORIGINAL]
        if scaling["rope_type"] == "yarn":
            scaling.setdefault("factor", ratio if ratio >= 1 else None)
        elif scaling.get("factor", ratio) != ratio and "attention_factor" not in scaling:
            scaling["attention_factor"] = math.sqrt(1 + math.log(scaling["factor"]) / math.log(scaling[_ORIGINAL]))
    return {key: float(value) if _is_number(key, value) else value for key, value in scaling.items()}


def _is_number(key: str, value: object) -> bool:
    """Whether a setting is a number that version 4 wants as a float."""
    return key != _ORIGINAL and isinstance(value, int) and not isinstance(value, bool)
