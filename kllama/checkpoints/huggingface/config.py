"""The closed schema of a Hugging Face `config.json` of a Llama, and what counts in `generation_config.json`.

Llama-shaped models of other names (Mistral, Qwen2, Qwen3) are flags on the same block: `_FAMILIES` says which. Every
key is mapped to an argument of `LlamaBackbone`, ignored for a reason that stands in `IGNORED`, or refused by name: one
that nobody knows could change the maths. Reads no files and builds no model; `reading.py` calls it.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kllama.checkpoints.files.reader import listed, shown
from kllama.core.activations import ACTIVATIONS
from kllama.core.masks import LAYER_TYPES
from kllama.core.rope_scaling import ROPE_TYPES, check_rope_scaling
from kllama.errors import CheckpointError, UnsupportedError

_LOGGER = logging.getLogger(__name__)
_REQUIRED = object()


class _Rule(NamedTuple):
    expected: str
    accepts: Callable[[object], bool]


def _integer(low: int, high: int) -> _Rule:
    return _Rule(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _number(expected: str, accepts: Callable[[float], bool]) -> _Rule:
    return _Rule(f"a number {expected}".rstrip(), lambda value: type(value) in (int, float) and accepts(value))


_BOOLEAN = _Rule("true or false", lambda value: type(value) is bool)
_STRING = _Rule("a string", lambda value: type(value) is str)
_LAYER_TYPES = _Rule(
    f"a list of {' and '.join(LAYER_TYPES)}",
    lambda value: type(value) is list and all(item in LAYER_TYPES for item in value),
)
_NUMBER = _number("", lambda value: abs(value) < 1e30)
_OBJECT = _Rule("an object or null", lambda value: type(value) is dict)
_LAYERS = _integer(1, 2**16)
_SIZE = _integer(1, 2**24)
_POSITIONS = _integer(1, 2**31 - 1)


class _Field(NamedTuple):
    argument: str
    rule: _Rule
    default: object  # where the key is absent; None also lets it be null


# Defaults are those of transformers' LlamaConfig, which files of the Llama 1 and 2 era rely on.
# fmt: off
_FIELDS = {
    "vocab_size":              _Field("vocabulary_size",     _SIZE,      _REQUIRED),
    "num_hidden_layers":       _Field("num_layers",          _LAYERS,    _REQUIRED),
    "num_attention_heads":     _Field("num_query_heads",     _SIZE,      _REQUIRED),
    "hidden_size":             _Field("hidden_dim",          _SIZE,      _REQUIRED),
    "intermediate_size":       _Field("intermediate_dim",    _SIZE,      _REQUIRED),
    "num_key_value_heads":     _Field("num_key_value_heads", _SIZE,      None),
    "head_dim":                _Field("head_dim",            _SIZE,      None),
    "rms_norm_eps":            _Field("layer_norm_epsilon",  _number("above 0, at most 1", lambda x: 0 < x <= 1), 1e-6),
    "tie_word_embeddings":     _Field("tie_word_embeddings", _BOOLEAN,   False),
    "max_position_embeddings": _Field("max_sequence_length", _POSITIONS, 2048),
    "attention_bias":          _Field("attention_bias",      _BOOLEAN,   False),
    "mlp_bias":                _Field("mlp_bias",            _BOOLEAN,   False),
    "hidden_act":              _Field("activation",          _STRING,    "silu"),
    "attention_dropout":       _Field("attention_dropout",   _number("from 0, below 1", lambda x: 0 <= x < 1), 0.0),
    "initializer_range":       _Field("initializer_range",   _number("from 0 to 1", lambda x: 0 <= x <= 1), 0.02),
}
# fmt: on

_IGNORED_FOR = {
    "read elsewhere": "model_type architectures dtype torch_dtype bos_token_id eos_token_id pad_token_id",
    "says who made the file": "_name_or_path _commit_hash transformers_version unsloth_version unsloth_fixed "
    "is_llama_config transformers.js_config",
    "code is never run from a checkpoint": "auto_map trust_remote_code",
    "a choice of kernel, not of maths": "attn_implementation _attn_implementation _attn_implementation_autoset "
    "_attn_implementation_internal _flash_attn_2_enabled experts_implementation _experts_implementation",
    "how the same product was split in training": "pretraining_tp chunk_size_feed_forward",
    "how vLLM computes texts that are longer than a chunk; transformers does not": "dual_chunk_attention_config",
    "what a call returns or caches": "use_cache return_dict output_attentions output_hidden_states torchscript "
    "keys_to_ignore_at_inference",
    "another framework's storage": "use_bfloat16 tf_legacy_loss",
    "a decoder-only model is one anyway": "is_decoder decoder_start_token_id sep_token_id",
    "settings of a classifier, which `architectures` would name": "id2label label2id num_labels problem_type "
    "finetuning_task task_specific_params",
    "the tokenizer's own files say it": "tokenizer_class prefix",
    "max_position_embeddings says it": "max_sequence_length",
    # Version 4 of transformers fell back to these, version 5 drops them; no logit depends on them.
    "a default of generate()": "max_length min_length do_sample early_stopping num_beams num_beam_groups temperature "
    "top_k top_p min_p typical_p epsilon_cutoff eta_cutoff diversity_penalty repetition_penalty length_penalty "
    "encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens",
}
IGNORED = {key: reason for reason, keys in _IGNORED_FOR.items() for key in keys.split()}

# Read by other models, or by forks of Llama: the values at which Llama stays Llama.
_NEUTRAL = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "max_window_layers": (None,),
    "layer_types": (None,),
    "per_layer_config": (None,),
    "use_mrope": (None, False),
    "rope_interleaved": (None, False),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "pruned_heads": (None, {}),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (None, False),
    "quantization_config": (None,),
}


class _Family(NamedTuple):
    """What sets a model type apart from Llama.

    Attributes:
        architectures: the classes of transformers that are read.
        defaults: of keys that are absent, where transformers has others than for Llama.
        keys: those that this type has beside the common ones.
        arguments: of `LlamaBackbone`, where no key says them.
    """

    architectures: tuple[str, ...]
    defaults: dict[str, object]
    keys: tuple[str, ...]
    arguments: dict[str, bool]


_WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_FAMILIES = {
    "llama": _Family(
        ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"), {}, ("attention_bias", "mlp_bias"), {"qk_norm": False}
    ),
    "mistral": _Family(
        ("MistralForCausalLM", "MistralModel"),
        {"num_key_value_heads": 8, "max_position_embeddings": 131072},
        ("sliding_window",),
        {"qk_norm": False},
    ),
    "qwen2": _Family(
        ("Qwen2ForCausalLM", "Qwen2Model"),
        _QWEN_DEFAULTS,
        _WINDOW_KEYS,
        {"attention_bias": True, "attention_output_bias": False, "qk_norm": False},
    ),
    "qwen3": _Family(
        ("Qwen3ForCausalLM", "Qwen3Model"),
        {**_QWEN_DEFAULTS, "head_dim": 128},
        ("attention_bias", *_WINDOW_KEYS),
        {"qk_norm": True},
    ),
}
_OWN_FIELDS = ("attention_bias", "mlp_bias")  # of `_FIELDS`: those that not every type has
_DEFAULT_WINDOW, _DEFAULT_FIRST_LAYER = 4096, 28

_ORIGINAL = "original_max_position_embeddings"
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", _ORIGINAL)
_THETA = _number("above 0, at most 1e12", lambda value: 0 < value <= 1e12)

_TOKEN_ID = _integer(0, 2**31 - 1)
_TOKEN_IDS = _Rule(
    "a token id, a list of token ids, or null",
    lambda value: all(map(_TOKEN_ID.accepts, value if type(value) is list else [value])),
)
_GENERATION_RULES = {
    "do_sample": _BOOLEAN,
    "temperature": _number("from 0", lambda value: 0 <= value < 1e30),
    "top_k": _integer(0, 2**31 - 1),
    "top_p": _number("above 0, at most 1", lambda value: 0 < value <= 1),
    "min_p": _number("from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": _number("above 0", lambda value: 0 < value < 1e30),
}


GENERATION_KEYS = ("stop_token_ids", *_GENERATION_RULES)
"""What a `generation_config` of kllama may hold."""


def backbone_config(config: dict, source: Path) -> dict:
    """Translate a `config.json` into the arguments of `LlamaBackbone`.

    Args:
        config: the content of the file.
        source: its path, for messages.

    Returns:
        Keyword arguments, with `num_key_value_heads` and `head_dim` filled in. `rope_scaling` is None for the default
        RoPE, else one mapping with Hugging Face keys, `rope_type` first, and `original_max_position_embeddings` filled
        in where the type uses it.

    Raises:
        UnsupportedError: not Llama, quantised, a classification head, or a setting kllama does not implement.
        CheckpointError: keys that are unknown or missing, values of the wrong type or out of range.
    """
    family = _check_kind(config, source)
    fields = {key: _FIELDS[key] for key in _FIELDS if key in family.keys or key not in _OWN_FIELDS}
    fields |= {key: fields[key]._replace(default=default) for key, default in family.defaults.items()}
    _check_keys(config, {*fields, *family.keys}, source)
    given = {
        key: config[key] for key in fields if key in config and (config[key], _FIELDS[key].default) != (None, None)
    }
    _check_values(given, {key: field.rule for key, field in fields.items()}, source)
    arguments = {"attention_bias": False, "mlp_bias": False}
    arguments |= {
        field.argument: given.get(key, None if key in config else field.default) for key, field in fields.items()
    }
    arguments |= {"attention_output_bias": arguments["attention_bias"], **family.arguments}
    if arguments["activation"] not in ACTIVATIONS:
        activation, allowed = shown(arguments["activation"]), ", ".join(ACTIVATIONS)
        raise UnsupportedError(f"{source}: hidden_act = {activation}; expected one of {allowed}.")
    _fill_heads(arguments, source)
    theta, scaling = _rope(config, arguments["head_dim"], arguments["max_sequence_length"], source)
    windows = _windows(config, family, arguments["num_layers"], source)
    return {**arguments, **windows, "rope_max_wavelength": theta, "rope_scaling": scaling}


def token_ids(config: dict, key: str, source: Path) -> list[int]:
    """Return the token ids under a key that may hold one, a list, null, or nothing."""
    value = config.get(key)
    if value is None:
        return []
    _check_values({key: value}, {key: _TOKEN_IDS}, source)
    return value if isinstance(value, list) else [value]


def generation_settings(config: dict, source: Path) -> dict:
    """Return the sampling settings of a `generation_config.json`, checked.

    The other keys of that file say how transformers' own generate() runs; none of them changes a logit.

    Raises:
        CheckpointError: a setting of the wrong type or out of range.
    """
    given = {key: config[key] for key in _GENERATION_RULES if config.get(key) is not None}
    _check_values(given, _GENERATION_RULES, source)
    return given


def _check_kind(config: dict, source: Path) -> _Family:
    """Refuse, before any detail, what is not a float Llama for causal language modelling; give the family."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise UnsupportedError(
            f"{source}: not Llama: model_type = {shown(model_type)}; expected one of {', '.join(_FAMILIES)}."
        )
    family = _FAMILIES[model_type]
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedError(
            f"{source}: quantization_config.quant_method = {shown(method)}; expected weights that are not quantised. "
            "Use the original checkpoint."
        )
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(name in family.architectures for name in architectures):
        expected = " or ".join(family.architectures)
        raise UnsupportedError(f"{source}: architectures = {shown(architectures)}; expected {expected}.")
    return family


def _check_keys(config: dict, own: set[str], source: Path) -> None:
    neutral = {key: values for key, values in _NEUTRAL.items() if key not in own}
    refused = [key for key, values in neutral.items() if key in config and config[key] not in values]
    if refused:
        received = listed(
            f"{key} = {shown(config[key])}; expected {' or '.join(map(shown, neutral[key]))}" for key in refused
        )
        raise UnsupportedError(
            f"{source}: {received}. kllama does not implement this for model_type {shown(config['model_type'])}."
        )
    known = {*own, *_ROPE_KEYS, *neutral, *IGNORED}
    unknown = sorted(set(config) - known)
    if unknown:
        raise CheckpointError(
            f"{source}: unknown keys: {listed(map(shown, unknown))}. Remove them if they do not change the model."
        )
    missing = [key for key, field in _FIELDS.items() if field.default is _REQUIRED and key not in config]
    if missing:
        raise CheckpointError(f"{source}: missing keys: {listed(missing)}.")
    if config.get("auto_map"):
        _LOGGER.info("%s: auto_map is ignored: no code of a checkpoint is ever run.", source)


def _check_values(values: dict, rules: dict[str, _Rule], source: Path | str) -> None:
    """List every value that its rule does not accept."""
    wrong = [key for key, value in values.items() if not rules[key].accepts(value)]
    if wrong:
        received = listed((f"{key} = {shown(values[key])}; expected {rules[key].expected}" for key in wrong), ". ")
        raise CheckpointError(f"{source}: {received}.")


def _fill_heads(arguments: dict, source: Path) -> None:
    """Fill in `num_key_value_heads` and `head_dim`, and check that the heads fit each other."""
    heads, hidden_dim = arguments["num_query_heads"], arguments["hidden_dim"]
    if arguments["num_key_value_heads"] is None:
        arguments["num_key_value_heads"] = heads
    if arguments["head_dim"] is None:
        _check_multiple("hidden_size", hidden_dim, "num_attention_heads", heads, source)
        arguments["head_dim"] = hidden_dim // heads
    _check_multiple("num_attention_heads", heads, "num_key_value_heads", arguments["num_key_value_heads"], source)
    if arguments["head_dim"] % 2:
        raise CheckpointError(f"{source}: head_dim = {arguments['head_dim']}; expected an even number.")


def _check_multiple(name: str, value: int, divisor_name: str, divisor: int, source: Path) -> None:
    if value % divisor:
        raise CheckpointError(f"{source}: {name} = {value}; expected a multiple of {divisor_name} ({divisor}).")


def _windows(config: dict, family: _Family, num_layers: int, source: Path) -> dict:
    """Return the sliding window and which layers have it: Mistral's all, Qwen's some of them if it is switched on."""
    absent = {"sliding_window": None, "layer_types": None}
    if "sliding_window" not in family.keys:
        return absent
    given = _without_null({key: config.get(key) for key in _WINDOW_KEYS})
    rules = {"sliding_window": _POSITIONS, "use_sliding_window": _BOOLEAN, "max_window_layers": _integer(0, 2**16)}
    _check_values(given, {**rules, "layer_types": _LAYER_TYPES}, source)
    window = config.get("sliding_window", _DEFAULT_WINDOW)
    if "use_sliding_window" not in family.keys:
        return {**absent, "sliding_window": window}
    if not given.get("use_sliding_window", False):
        window = None
    first = given.get("max_window_layers", _DEFAULT_FIRST_LAYER)
    types = given.get("layer_types", [LAYER_TYPES[window is not None and i >= first] for i in range(num_layers)])
    if len(types) != num_layers or (window is None and LAYER_TYPES[1] in types):
        raise CheckpointError(
            f"{source}: layer_types = {shown(types)}, sliding_window = {shown(window)}; expected one type for each of "
            f"the {num_layers} layers, and a window that is used where a type is {shown(LAYER_TYPES[1])}."
        )
    return {"sliding_window": window, "layer_types": types} if LAYER_TYPES[1] in types else absent


def _rope(config: dict, head_dim: int, max_positions: int, source: Path) -> tuple[float, dict | None]:
    """Return theta and the scaling, from the form of transformers 4 or 5.

    Version 4 writes `rope_theta` and `rope_scaling`, version 5 `rope_parameters`. A `rope_scaling` that is not empty
    replaces `rope_parameters` whole; theta is the one inside the mapping, else the one beside it, else 10000.
    """
    mappings = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None}
    _check_values(mappings, {key: _OBJECT for key in mappings}, source)
    field = "rope_scaling" if mappings.get("rope_scaling") else "rope_parameters"
    rope = mappings.get(field, {})
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise UnsupportedError(
            f"{source}: {field} is nested by layer type ({listed(map(shown, nested))}); expected one for all layers."
        )
    beside = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope = {**_without_null(beside), **_without_null(rope)}

    theta = rope.pop("rope_theta", 10000.0)
    _check_values({"rope_theta": theta}, {"rope_theta": _THETA}, source)
    rope.pop("finetuned", None)  # says how the model was trained
    rotated = rope.pop("partial_rotary_factor", 1)
    if rotated != 1:
        raise UnsupportedError(f"{source}: partial_rotary_factor = {shown(rotated)}; expected 1, the whole head.")
    rope_type = _pop_rope_type(rope, f"{source}: {field}.rope_type")
    if rope_type == "default":
        if rope:
            unknown = listed(map(shown, rope))
            raise CheckpointError(f"{source}: {field}: unknown keys: {unknown}; expected none besides rope_theta.")
        return theta, None
    required, optional = ROPE_TYPES[rope_type]
    if _ORIGINAL in required + optional:  # the one beside the mapping wins: Phi-3 writes it there
        rope[_ORIGINAL] = _without_null(config).get(_ORIGINAL, rope.get(_ORIGINAL, max_positions))
    try:
        return theta, check_rope_scaling({"rope_type": rope_type, **rope}, head_dim, max_positions)
    except ValueError as error:
        raise CheckpointError(f"{source}: {field}: {error}") from error


def _without_null(mapping: dict) -> dict:
    return {key: value for key, value in mapping.items() if value is not None}


def _pop_rope_type(rope: dict, field: str) -> str:
    """Take `rope_type` and its older spelling `type` out of the mapping."""
    names = {key: rope.pop(key) for key in ("rope_type", "type") if key in rope}
    names = {key: "longrope" if name == "su" else name for key, name in names.items()}
    rope_type = names.get("rope_type", names.get("type", "default"))
    if names.get("type", rope_type) != rope_type:
        raise CheckpointError(f'{field} = {shown(rope_type)}; expected the same as "type" ({shown(names["type"])}).')
    allowed = ("default", *ROPE_TYPES)
    if not isinstance(rope_type, str) or rope_type not in allowed:
        raise UnsupportedError(f"{field} = {shown(rope_type)}; expected one of {', '.join(allowed)}.")
    return rope_type
