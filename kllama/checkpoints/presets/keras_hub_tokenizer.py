"""The tokenizer and the preprocessor of KerasHub's own Llama and Llama 3 presets.

    tokenizer.json                    {"registered_name": "keras_hub>Llama3Tokenizer", "config": {...}}
    assets/tokenizer/                 vocabulary.spm of a Llama, or vocabulary.json and merges.txt of a Llama 3
    preprocessor.json                 may be there

Their fields become arguments of kllama's tokenizer and preprocessor, and of what `generate` stops at. The vocabulary is
found, and opened for the ids of Llama 3's stop tokens alone. Called by `keras_hub.py` and `formats.py`.
"""

import re
from pathlib import Path

from kllama.checkpoints.files.reader import check_file, listed, read_json, shown
from kllama.checkpoints.presets.dtype import read_policy
from kllama.checkpoints.presets.fields import (
    COUNT,
    FLAG,
    LAYER_KEYS,
    LIST,
    PREPROCESSOR_FIELDS,
    Kind,
    read_fields,
    read_object,
)
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError

_PACKAGES = ("keras_hub", "keras_nlp")
_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"
_PREPROCESSOR = "preprocessor.json"
_ASSETS = Path("assets", "tokenizer")
_MERGES = "merges.txt"
_VOCABULARY_LIMIT = 64 * 2**20
_NO_PATH = Kind("null: a preset names no other file", lambda value: value is None).since(None)
_TOKENIZER_FIELDS = {
    "LlamaTokenizer": {"proto": _NO_PATH, "add_bos": FLAG.since(False), "add_eos": FLAG.since(False)},
    "Llama3Tokenizer": {
        "vocabulary": _NO_PATH,
        "merges": _NO_PATH,
        "add_prefix_space": FLAG.since(False),
        "unsplittable_tokens": LIST.or_null().since(None),
    },
}
_VOCABULARIES = {"LlamaTokenizer": "vocabulary.spm", "Llama3Tokenizer": "vocabulary.json"}
# What the classes themselves say; the end token of a Llama 3 is looked for in its vocabulary.
_SPECIAL_TOKENS = {
    "LlamaTokenizer": {"start_token": "<s>", "end_token": "</s>"},
    "Llama3Tokenizer": {"start_token": "<|begin_of_text|>", "end_token": "auto"},
}
_LLAMA3_STOPS = ("<|end_of_text|>", "<|eot_id|>")
# Options of KerasHub's tokenizers at the values at which they do what kllama's does.
_NEUTRAL = {"sequence_length": None, "add_bos": False, "add_eos": False, "add_prefix_space": False}
_SPECIAL_TOKEN = re.compile(r"<\|[^|]+\|>")


def is_keras_hub_tokenizer(path: Path) -> bool:
    """Tell whether a path is a directory with a tokenizer of KerasHub, whose `tokenizer.json` names its class."""
    return (path / _ASSETS).is_dir() and names_keras_hub(path / _TOKENIZER)


def names_keras_hub(file: Path) -> bool:
    """Tell whether a JSON file is there and names a class of KerasHub, or of keras-nlp."""
    name = read_json(file).get("registered_name") if file.is_file() else None
    return isinstance(name, str) and name.split(">")[0] in _PACKAGES


def read_class(file: Path, kind: str) -> dict:
    """Read the config of KerasHub's Llama or Llama 3 class of a kind, such as `"Backbone"`."""
    return read_object(file, *(f"{package}>{model}{kind}" for package in _PACKAGES for model in ("Llama", "Llama3")))


class KerasHubTokenizer:
    """The tokenizer and the preprocessor of a preset directory of KerasHub, which need not have a model.

    Args:
        path: the directory.

    Attributes: those of `kllama.checkpoints.presets.reading.PresetTokenizer`.

    Raises:
        MissingFileError: if there is no tokenizer, or not its vocabulary.
        UnsupportedError: if it holds another class, or asks for what kllama does not do.
        CheckpointError: if a file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tokenizer_config = tokenizer_config(path)
        if self.tokenizer_config is None:
            raise MissingFileError(f"{path}: no tokenizer; expected {_TOKENIZER}.", str(path / _TOKENIZER))
        self.preprocessor_config = preprocessor_config(path)
        self.backbone_config = {}
        if (path / _CONFIG).is_file():
            config = read_class(path / _CONFIG, "Backbone")
            self.backbone_config["vocabulary_size"] = config.get("vocabulary_size")


def tokenizer_config(path: Path) -> dict | None:
    """Say with which arguments a `LlamaTokenizer` does what the files say; None where there are none."""
    file = path / _TOKENIZER
    if not file.is_file():
        return None
    config, name = read_class(file, "Tokenizer"), _class_name(file)
    dtype = read_policy(file, "dtype", config.get("dtype"), ("int32", "int64"))
    fields = {"sequence_length": COUNT.or_null().since(None), **_TOKENIZER_FIELDS[name]}
    _check_options(file, read_fields(file, config, fields, LAYER_KEYS))
    check_file(path / _ASSETS / _VOCABULARIES[name], path)
    if name == "Llama3Tokenizer":
        check_file(path / _ASSETS / _MERGES, path)
    return {"tokenizer": str(path / _ASSETS / _VOCABULARIES[name]), **_SPECIAL_TOKENS[name], "dtype": dtype}


def _check_options(file: Path, fields: dict) -> None:
    for name, neutral in _NEUTRAL.items():
        if fields.get(name, neutral) != neutral:
            raise UnsupportedError(
                f"{file}: {name} = {shown(fields[name])}; expected {shown(neutral)}. kllama's preprocessor adds tokens "
                "and pads, its tokenizer does not."
            )
    tokens = fields.get("unsplittable_tokens") or []
    others = [token for token in tokens if not (type(token) is str and _SPECIAL_TOKEN.fullmatch(token))]
    if others:
        raise UnsupportedError(
            f"{file}: unsplittable_tokens holds {listed(map(shown, others))}; expected tokens such as <|eot_id|>."
        )


def _class_name(file: Path) -> str:
    return read_json(file)["registered_name"].split(">")[1]


def preprocessor_config(path: Path) -> dict:
    """Give the arguments of `LlamaCausalLMPreprocessor` that `preprocessor.json` states, if it is there."""
    file = path / _PREPROCESSOR
    if not file.is_file():
        return {}
    return read_fields(file, read_class(file, "CausalLMPreprocessor"), PREPROCESSOR_FIELDS, LAYER_KEYS)


def generation_config(path: Path) -> dict:
    """Say where to stop: KerasHub's Llama 3 does so at two tokens, of which one is the tokenizer's end token."""
    if not (path / _TOKENIZER).is_file() or _class_name(path / _TOKENIZER) != "Llama3Tokenizer":
        return {}
    file = path / _ASSETS / _VOCABULARIES["Llama3Tokenizer"]
    vocabulary = read_json(file, _VOCABULARY_LIMIT)
    stops = {token: vocabulary[token] for token in _LLAMA3_STOPS if token in vocabulary}
    for token, token_id in stops.items():
        if type(token_id) is not int or token_id < 0:
            raise CheckpointError(f"{file}: {token} = {shown(token_id)}; expected the id of a token.")
    return {"stop_token_ids": list(stops.values())}
