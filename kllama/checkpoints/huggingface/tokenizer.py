"""The tokenizer files of a Hugging Face directory, beside the vocabulary itself: what they say about it.

`tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and the chat templates become arguments of
kllama's tokenizer and preprocessor; the file with the vocabulary is found and not opened. Builds neither. Called by
`checkpoints/huggingface/reading.py`.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kllama.checkpoints.files.reader import read_json, read_text, shown
from kllama.checkpoints.huggingface.config import token_ids
from kllama.errors import CheckpointError

# In the order in which they count: what transformers wrote for its fast tokenizers holds all rules, the others do not.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
MORE_CHAT_TEMPLATES = "additional_chat_templates"
CHAT_TEMPLATE_LIMIT = 2**20
# The names of special tokens, and of lists of them.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTED = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


class AddedTokens(NamedTuple):
    """Tokens that a directory adds to the vocabulary.

    Attributes:
        source: the file that lists them, for messages.
        tokens: in the order of their ids, dicts of `"id"`, `"content"` and those of the `FLAGS` that are known.
    """

    source: Path
    tokens: list[dict]


class HuggingFaceTokenizer:
    """The tokenizer files of a directory, or the one file of a vocabulary: no weights need be there.

    Args:
        path: the directory, or the file. What it holds is left to the tokenizer where no file of Hugging Face says it.

    Attributes: `path`, `tokenizer_config` and `preprocessor_config`, as an opened checkpoint has them; and
        `backbone_config`, of which only `vocabulary_size` is known, and that only where there is a `config.json`.

    Raises:
        CheckpointError: a file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        names = os.listdir(path) if path.is_dir() else []
        settings, config = (read_json(path / name) if name in names else {} for name in (SETTINGS, "config.json"))
        self.tokenizer_config = tokenizer_config(path, names, settings, config) or {"tokenizer": str(path)}
        self.preprocessor_config = preprocessor_config(settings) if settings else {}
        size = config.get("vocab_size")
        self.backbone_config = {"vocabulary_size": size} if type(size) is int else {}


def tokenizer_config(directory: Path, names: Iterable[str], settings: dict, config: dict) -> dict | None:
    """Say with which arguments a `LlamaTokenizer` does what the files say; None without a vocabulary.

    Special tokens are as `tokenizer_config.json` names them, else `special_tokens_map.json`, else by the ids in
    `config.json`, else "auto": the vocabulary's own.

    Args:
        directory: the directory.
        names: what lies in it.
        settings: content of `tokenizer_config.json`, or an empty dict.
        config: content of `config.json`.
    """
    found = [name for name in VOCABULARIES if name in names]
    if not found:
        return None
    source = directory / SETTINGS
    files = {source: settings}
    if SPECIAL_TOKENS in names:
        files[directory / SPECIAL_TOKENS] = read_json(directory / SPECIAL_TOKENS)
    arguments = {
        "tokenizer": str(directory / found[0]),
        "start_token": _token(files, "bos_token", _token_id(config, "bos_token_id", directory)),
        "end_token": _token(files, "eos_token", _token_id(config, "eos_token_id", directory)),
        "pad_token": _token(files, "pad_token", None),
    }
    if found[0] != "tokenizer.json":  # which has all of these in its own rules
        arguments["add_prefix_space"] = _flag(settings, "add_prefix_space", source)
        added = _added_tokens(directory, names, settings, _special_tokens(files))
        if found[0] == "tokenizer.model":
            arguments["legacy"] = _flag(settings, "legacy", source)
            # They are found in the text as it is: the normalizer of such a vocabulary does no more than put marks.
            added = added._replace(tokens=[{**token, "normalized": False} for token in added.tokens])
        arguments["added_tokens"] = added
    template = _chat_template(directory, names, settings)
    return arguments if template is None else {**arguments, "chat_template": template}


def preprocessor_config(settings: dict) -> dict:
    """Say whether texts begin with the start token, where that does not follow from the vocabulary's own rules."""
    if isinstance(settings.get("add_bos_token"), bool):
        return {"add_start_token": settings["add_bos_token"]}
    if str(settings.get("tokenizer_class", "LlamaTokenizer")).startswith("Llama"):
        return {"add_start_token": True}
    return {}


def _token(files: dict[Path, dict], name: str, default: str | int | None) -> str | int | None:
    """Return the text of a special token, as the first file that has its name says."""
    for source, settings in files.items():
        if name in settings:
            return _text(settings[name], name, source)
    return default


def _text(value: object, name: str, source: Path) -> str | None:
    """Return the text of a token, which a file spells as a string or as an object with its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is None or _is_text(text):
        return text
    raise CheckpointError(f"{source}: {name} = {shown(value)}; expected a token.")


def _is_text(value: object) -> bool:
    """Whether a value is a str that UTF-8 can write: JSON can spell halves of surrogate pairs."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _special_tokens(files: dict[Path, dict]) -> set[str]:
    """Return the texts of all special tokens that the files name."""
    found = {_text(settings.get(name), name, source) for source, settings in files.items() for name in NAMED}
    for source, settings in files.items():
        for name in LISTED:
            if isinstance(settings.get(name), list):  # An object gives names to tokens, which says nothing of them.
                found |= {_text(token, name, source) for token in settings[name]}
    return found - {None}


def _token_id(config: dict, name: str, directory: Path) -> str | int | None:
    """Return the id of a special token, the first one of a list; "auto" where `config.json` does not have the key."""
    if name not in config:
        return "auto"
    ids = token_ids(config, name, directory / "config.json")
    return ids[0] if ids else None


def _flag(settings: dict, name: str, source: Path) -> bool | None:
    value = settings.get(name)
    if not isinstance(value, bool | None):
        raise CheckpointError(f"{source}: {name} = {shown(value)}; expected true, false or null.")
    return value


def _added_tokens(directory: Path, names: Iterable[str], settings: dict, special: set[str]) -> AddedTokens:
    """Return the tokens that were added to a vocabulary; those that are `special` are so unless their flag says no."""
    source, added = directory / SETTINGS, settings.get("added_tokens_decoder")
    if added is None and ADDED_TOKENS in names:
        source, added = directory / ADDED_TOKENS, read_json(directory / ADDED_TOKENS)
        described = [{"id": token_id, "content": token, "normalized": False} for token, token_id in added.items()]
    else:
        described = _described(added or {}, source)
    for token in described:
        if not _is_sound(token):
            raise CheckpointError(f"{source}: added tokens = {shown(added)}; expected a content for each id.")
        token.setdefault("special", token["content"] in special)
    return AddedTokens(source, sorted(described, key=lambda token: token["id"]))


def _described(added: object, source: Path) -> list[dict]:
    try:
        return [{**token, "id": int(token_id)} for token_id, token in added.items()]
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: added tokens = {shown(added)}; expected a content for each id.") from error


def _is_sound(token: dict) -> bool:
    has_id = type(token["id"]) is int and token["id"] >= 0
    has_text = _is_text(token.get("content")) and token["content"] != ""
    return has_id and has_text and all(isinstance(token.get(flag, False), bool) for flag in FLAGS)


def _chat_template(directory: Path, names: Iterable[str], settings: dict) -> str | dict[str, str] | None:
    """Return the chat template, or several by name, of which "default" is the one that is used without a reason."""
    templates = settings.get("chat_template")
    if isinstance(templates, list):
        try:
            templates = {entry["name"]: entry["template"] for entry in templates}
        except (KeyError, TypeError) as error:
            message = f"{directory / SETTINGS}: chat_template = {shown(templates)}; expected names and templates."
            raise CheckpointError(message) from error
    if CHAT_TEMPLATE in names:
        templates = read_text(directory / CHAT_TEMPLATE, CHAT_TEMPLATE_LIMIT)
    if MORE_CHAT_TEMPLATES in names:
        if not isinstance(templates, dict):
            templates = {} if templates is None else {"default": templates}
        more = sorted((directory / MORE_CHAT_TEMPLATES).glob("*.jinja"))
        templates |= {path.stem: read_text(path, CHAT_TEMPLATE_LIMIT) for path in more}
    sources = templates.values() if isinstance(templates, dict) else [templates]
    if templates is not None and not all(isinstance(source, str) for source in sources):
        raise CheckpointError(f"{directory / SETTINGS}: chat_template = {shown(templates)}; expected a template.")
    return templates
