"""The closed schema of Meta's `params.json`, and what it means for a `LlamaBackbone`.

Every key is read, ignored for a reason, or refused: one that nobody knows could change the maths. `reading.py`
calls it, and settles what only the tensors tell.
"""

from pathlib import Path

from kllama.checkpoints.files.reader import read_json, shown
from kllama.checkpoints.presets.fields import FLAG, Kind, read_fields
from kllama.errors import CheckpointError, UnsupportedError

_SIZE = Kind("an integer from 1 to 16777216", lambda value: type(value) is int and 1 <= value <= 2**24)
_LAYERS = Kind("an integer from 1 to 65536", lambda value: type(value) is int and 1 <= value <= 2**16)
_VOCABULARY = Kind(
    "-1 or an integer from 1 to 16777216", lambda value: type(value) is int and (value == -1 or 1 <= value <= 2**24)
)


def _number(expected: str, low: float, high: float) -> Kind:
    return Kind(expected, lambda value: type(value) in (int, float) and low < value <= high)


# Defaults are those of Meta's code.
_FIELDS = {
    "dim": _SIZE,
    "n_layers": _LAYERS,
    "n_heads": _SIZE,
    "n_kv_heads": _SIZE.or_null().since(None),
    "vocab_size": _VOCABULARY.since(-1),
    "multiple_of": _SIZE.since(256),
    "ffn_dim_multiplier": _number("a number above 0, at most 1000", 0, 1000).or_null().since(None),
    "norm_eps": _number("a number above 0, at most 1", 0, 1).since(1e-5),
    "rope_theta": _number("a number above 0, at most 1e12", 0, 1e12).or_null().since(None),
    "use_scaled_rope": FLAG.since(False),
    "rope_scaling_factor": _number("a number from 1 to 1e6", 1 - 1e-12, 1e6).or_null().since(None),
    "rope_high_freq_factor": _number("a number above 1, at most 1e6", 1, 1e6).or_null().since(None),
}
# How much room Meta's code makes for its cache: a setting of a run.
_IGNORED = ("max_seq_len", "max_batch_size")

# Keys of other models, with the values at which they change nothing.
_OTHERS = {
    "quantization_args": ("weights that are not quantised", (None,)),
    "lora_args": ("weights without adapters", (None,)),
    "vision_chunk_size": ("a model of text alone", (None, -1)),
    "vision_max_num_chunks": ("a model of text alone", (None, 4)),
    "vision_num_cross_attention_layers": ("a model of text alone", (None, -1)),
    "moe_args": ("a Llama without experts", (None,)),
    "moe": ("a Llama without experts", (None,)),
    **dict.fromkeys(("head_dim", "hidden_dim", "sliding_window"), ("Meta's parameters; these look like Mistral's", ())),
}

_ORIGINAL_LENGTH = 8192
# The factor of the scaled RoPE is in Meta's code, not in its files: that of Llama 3.2 is another than that of 3.1 and
# 3.3. The sizes that were released, dim and n_layers, tell them apart.
_FACTORS = {(2048, 16): 32.0, (3072, 28): 32.0, (4096, 32): 8.0, (8192, 80): 8.0, (16384, 126): 8.0}


def read_params(path: Path) -> tuple[dict, dict[str, str]]:
    """Return the arguments of `LlamaBackbone`, and the questions that the file leaves open.

    Args:
        path: `params.json`.

    Returns:
        Keyword arguments, with `vocabulary_size` and `rope_max_wavelength` None where the file leaves them to the
        tensors, `tie_word_embeddings` False and `max_sequence_length` None; and the questions as
        `Checkpoint.open_questions` has them.

    Raises:
        MissingFileError: nothing is there.
        UnsupportedError: parameters of another model.
        CheckpointError: keys that are unknown or missing, or values that are out of range or do not fit each other.
    """
    content = read_json(path)
    for key, (expected, neutral) in _OTHERS.items():
        if key in content and content.pop(key) not in neutral:
            raise UnsupportedError(f"{path}: {key} is set; expected {expected}. Use the files of Hugging Face.")
    params = read_fields(path, content, _FIELDS, _IGNORED)
    num_heads = params["n_heads"]
    num_key_value_heads = params["n_kv_heads"] or num_heads
    _check_multiple(path, "dim", params["dim"], 2 * num_heads, "2 * n_heads")
    _check_multiple(path, "n_heads", num_heads, num_key_value_heads, "n_kv_heads")
    rope_scaling, questions = _rope_scaling(path, params)
    config = {
        "vocabulary_size": None if params["vocab_size"] == -1 else params["vocab_size"],
        "num_layers": params["n_layers"],
        "num_query_heads": num_heads,
        "hidden_dim": params["dim"],
        "intermediate_dim": _intermediate_dim(params["dim"], params["multiple_of"], params["ffn_dim_multiplier"]),
        "num_key_value_heads": num_key_value_heads,
        "head_dim": params["dim"] // num_heads,
        "layer_norm_epsilon": params["norm_eps"],
        "rope_max_wavelength": params["rope_theta"],
        "rope_scaling": rope_scaling,
        "max_sequence_length": None,
        "tie_word_embeddings": False,
        **dict.fromkeys(("attention_bias", "attention_output_bias", "qk_norm", "mlp_bias"), False),
    }
    return config, questions


def _check_multiple(path: Path, name: str, value: int, divisor: int, divisor_name: str) -> None:
    if value % divisor:
        raise CheckpointError(f"{path}: {name} = {value}; expected a multiple of {divisor_name} ({divisor}).")


def _intermediate_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Compute F as Meta's code does: two thirds of 4 D, times the multiplier, rounded up to a multiple.

    Both products are rounded down, the first one as a float.
    """
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return -(-size // multiple_of) * multiple_of


def _rope_scaling(path: Path, params: dict) -> tuple[dict | None, dict[str, str]]:
    """Return the scaling of RoPE, or None and the question for it.

    The factor is that of the file, where a late version of Meta's code wrote it, else that of the released model of
    this size.
    """
    given = params["rope_scaling_factor"], params["rope_high_freq_factor"]
    if not params["use_scaled_rope"]:
        if given != (None, None):
            raise CheckpointError(
                f"{path}: rope_scaling_factor and rope_high_freq_factor = {shown(given)}, use_scaled_rope = false; "
                "expected null, or true."
            )
        return None, {}
    factor = given[0] or _FACTORS.get((params["dim"], params["n_layers"]))
    if factor is None:
        return None, {
            "rope_scaling": f"{path}: use_scaled_rope = true, but the file does not tell the factor, and no released "
            f"model has dim {params['dim']} with {params['n_layers']} layers. Pass rope_scaling={{'rope_type': "
            "'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, "
            "'original_max_position_embeddings': 8192}, with 8.0 for a model of Llama 3.1 or 3.3, 32.0 for one of 3.2."
        }
    return llama3_scaling(factor, given[1] or 4.0), {}


def llama3_scaling(factor: float, high_freq_factor: float = 4.0) -> dict:
    """Give the scaling of RoPE that Llama 3.1 and later have, as `rope_scaling` of `LlamaBackbone`."""
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": high_freq_factor,
        "original_max_position_embeddings": _ORIGINAL_LENGTH,
    }
