"""The closed schema of `rope_scaling`: one mapping with the keys of Hugging Face's `rope_scaling` / `rope_parameters`.

What each type does to the frequencies is in `core/rope.py`; this file needs no framework.
"""

from collections.abc import Mapping
from numbers import Integral, Real

_ORIGINAL = "original_max_position_embeddings"
_YARN = ("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")

ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": ((), _YARN),
    "longrope": (("short_factor", "long_factor"), ("factor", _ORIGINAL, "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
}
"""For each rope type, the keys that it needs and the keys that it may have, besides `rope_type`."""


def check_rope_scaling(rope_scaling: Mapping, head_dim: int, max_sequence_length: int | None) -> dict:
    """Check a `rope_scaling` mapping and return a plain copy of it.

    Args:
        rope_scaling: mapping with `rope_type` (or the older `type`) and the keys of that type.
        head_dim: H.
        max_sequence_length: the model's longest sequence, or None.

    Returns:
        A dict whose first key is `rope_type`.

    Raises:
        ValueError: for an unknown type, a missing or unknown key, or a value out of range.
        TypeError: if it is no mapping.
    """
    if not isinstance(rope_scaling, Mapping):
        raise TypeError(f"rope_scaling ({rope_scaling!r}) must be None or a mapping with the key 'rope_type'.")
    values = {key: value for key, value in rope_scaling.items() if key not in ("rope_type", "type")}
    rope_type = rope_scaling.get("rope_type", rope_scaling.get("type"))
    if rope_scaling.get("type", rope_type) != rope_type:
        raise ValueError(
            f"rope_scaling['type'] ({rope_scaling['type']!r}) must equal rope_scaling['rope_type'] ({rope_type!r})."
        )
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_scaling['rope_type'] ({rope_type!r}) must be one of {sorted(ROPE_TYPES)}.")
    _check_keys(rope_type, values)
    for key, value in values.items():
        _check_value(key, value, head_dim // 2, is_optional=key in ROPE_TYPES[rope_type][1])
    _check_lengths(rope_type, values, max_sequence_length)
    if rope_type == "dynamic" and head_dim < 4:
        raise ValueError(f"head_dim ({head_dim}) must be at least 4 for rope_scaling of type 'dynamic'.")
    return {"rope_type": rope_type, **values}


def _check_keys(rope_type: str, values: dict) -> None:
    required, optional = ROPE_TYPES[rope_type]
    missing = [key for key in required if key not in values]
    unknown = [key for key in values if key not in (*required, *optional)]
    if missing or unknown:
        raise ValueError(
            f"rope_scaling of type {rope_type!r} lacks {missing} and has unknown keys {unknown}; expected "
            f"{list(required)} and optionally {list(optional)}."
        )


def _check_value(key: str, value, num_pairs: int, is_optional: bool) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    is_absent = is_optional and value is None
    if key in ("short_factor", "long_factor"):
        numbers = value if isinstance(value, list | tuple) else []
        valid = len(numbers) == num_pairs and all(isinstance(x, Real) and 0 < x < 1e30 for x in numbers)
        allowed = f"a list of {num_pairs} positive numbers (head_dim / 2)"
    elif key == "truncate":
        valid, allowed = isinstance(value, bool), "True or False"
    elif key == _ORIGINAL:
        valid, allowed = is_number and isinstance(value, Integral) and value > 0, "a positive integer"
    elif key == "factor":
        valid, allowed = is_absent or (is_number and 1 <= value < 1e30), "a number of at least 1"
    else:
        valid, allowed = is_absent or (is_number and 0 <= value < 1e30), "a number of at least 0"
    if not valid:
        raise ValueError(f"rope_scaling[{key!r}] ({value!r}) must be {allowed}.")


def _check_lengths(rope_type: str, values: dict, max_sequence_length: int | None) -> None:
    factor, original = values.get("factor"), values.get(_ORIGINAL)
    needs_length = rope_type == "dynamic" or (
        rope_type in ("yarn", "longrope") and (factor is None or original is None)
    )
    if needs_length and max_sequence_length is None:
        raise ValueError(f"max_sequence_length (None) must be given for rope_scaling {values} of type {rope_type!r}.")
    if rope_type == "longrope" and (original or max_sequence_length) < 2:
        raise ValueError(f"max_sequence_length ({max_sequence_length}) must be at least 2 for type 'longrope'.")
    if rope_type == "llama3" and not values["low_freq_factor"] < values["high_freq_factor"]:
        raise ValueError(
            f"rope_scaling['low_freq_factor'] ({values['low_freq_factor']}) must be less than "
            f"rope_scaling['high_freq_factor'] ({values['high_freq_factor']})."
        )
