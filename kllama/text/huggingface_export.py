"""Write a tokenizer as the files that `AutoTokenizer` of transformers 4 and 5 reads, so that it gives the same ids.

    tokenizer.json                  the vocabulary and all rules, with the start token in its post-processor
    tokenizer_config.json           the class that takes them as they are, named tokens, chat templates
    special_tokens_map.json         the named tokens again, as version 4 writes them
    chat_template.jinja             and additional_chat_templates/NAME.jinja, where there are several

Two things transformers does its own way: a special token that is spelt in a text is the token there (`parse_special` of
our tokenizer), and without a pad token it refuses to pad. The tokenizer and the preprocessor export themselves through
this file, and `models/export_huggingface.py` a model's.
"""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import tokenizers

from kllama.checkpoints.files.reader import check_file_name
from kllama.checkpoints.files.writer import staged_directory
from kllama.checkpoints.huggingface.tokenizer import (
    CHAT_TEMPLATE,
    FLAGS,
    MORE_CHAT_TEMPLATES,
    SETTINGS,
    SPECIAL_TOKENS,
)
from kllama.checkpoints.huggingface.writing import write_json
from kllama.text.chat.template import BUILT_IN, open_template
from kllama.text.chat.tokenizer import ChatTokenizer
from kllama.text.formats.gguf_pre_tokenizers import PRE_TOKENIZERS
from kllama.text.formats.rules import flat, read_rules, sequence, start_template

VOCABULARY = "tokenizer.json"
# The one class of both versions that runs a tokenizer.json as it is: others put rules of their own in its place.
_CLASS = "PreTrainedTokenizerFast"
_DEFAULT = "default"
_ADDING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def export_tokenizer(
    tokenizer: ChatTokenizer, path: str | os.PathLike, *, add_start_token: bool, overwrite: bool = False
) -> None:
    """Write a directory that holds a tokenizer alone.

    Args:
        tokenizer: a `LlamaTokenizer`.
        path: the directory.
        add_start_token: whether each text begins with the start token.
        overwrite: whether a directory that holds something is replaced, whole.

    Raises:
        ValueError: the directory holds something and `overwrite` is false; and those of `write_tokenizer`.
        ResourceError: the disk is full or failing.
    """
    with staged_directory(path, overwrite=overwrite) as staging:
        write_tokenizer(staging, tokenizer, add_start_token=add_start_token)


def write_tokenizer(
    directory: Path,
    tokenizer: ChatTokenizer,
    *,
    add_start_token: bool,
    max_length: int | None = None,
    model_type: str | None = None,
) -> None:
    """Write the files of a tokenizer.

    Args:
        directory: where to.
        tokenizer: a `LlamaTokenizer`.
        add_start_token: whether each text begins with the start token.
        max_length: the longest sequence of the model, or None.
        model_type: that of the `config.json` beside it, or None without a model.

    Raises:
        ValueError: there is no vocabulary, no start token to add, or the name of a chat template is no name of a file.
    """
    if add_start_token and tokenizer.start_token is None:
        raise ValueError(
            "add_start_token = True, but start_token of the tokenizer = None; expected a token. Pass start_token= to "
            "the tokenizer, or add_start_token=False to the preprocessor."
        )
    encoder = _with_start_token(tokenizer, add_start_token)
    rules = read_rules(encoder)
    named = _named_tokens(tokenizer, encoder)
    templates = _chat_templates(tokenizer.chat_template)
    settings = {
        **_prefix_space(rules["pre_tokenizer"]),
        **{role: None if token is None else token["content"] for role, token in named.items()},
        **_template_setting(templates),
        "clean_up_tokenization_spaces": False,
        # Without this the class returns token types, which a Llama of transformers does not take.
        "model_input_names": ["input_ids", "attention_mask"],
        **({} if max_length is None else {"model_max_length": max_length}),
        "tokenizer_class": _CLASS,
    }
    encoder.save(str(directory / VOCABULARY))
    write_json(directory / SETTINGS, settings)
    write_json(directory / SPECIAL_TOKENS, {role: token for role, token in named.items() if token is not None})
    _write_chat_templates(directory, templates)
    _warn_of_other_rules(rules, model_type)


def _with_start_token(tokenizer: ChatTokenizer, add_start_token: bool) -> tokenizers.Tokenizer:
    """Copy the encoder, and let it put the start token before each text, or nothing."""
    encoder = tokenizers.Tokenizer.from_str(tokenizer._loaded().encoder.to_str())
    parts = flat(read_rules(encoder)["post_processor"], "processors")
    parts = [part for part in parts if part["type"] not in _ADDING]
    if add_start_token:
        parts.append(start_template(tokenizer.start_token, tokenizer.start_token_id))
    # The library takes parts out of a whole tokenizer only.
    empty = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "post_processor": sequence(parts, "processors")}
    encoder.post_processor = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", **empty})).post_processor
    return encoder


def _named_tokens(tokenizer: ChatTokenizer, encoder: tokenizers.Tokenizer) -> dict[str, dict | None]:
    """Describe the tokens that play a role. transformers would take any of them out of texts, as special tokens."""
    added = {token.content: _described(token) for token in encoder.get_added_tokens_decoder().values()}
    unknown = encoder.model.unk_token if isinstance(encoder.model, tokenizers.models.BPE) else None
    tokens = dict(zip(_ROLES, (tokenizer.start_token, tokenizer.end_token, unknown, tokenizer.pad_token), strict=True))
    if tokenizer.pad_token is not None and tokenizer.pad_token not in added:
        warnings.warn(
            f"pad_token = {tokenizer.pad_token!r} is left out: transformers would make a special token of it, and "
            "split texts at it. Add a token for padding with add_tokens, and name that one.",
            stacklevel=2,
        )
    return {role: added.get(token) for role, token in tokens.items()}


def _described(token: tokenizers.AddedToken) -> dict:
    return {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}


def _prefix_space(pre_tokenizer: dict | None) -> dict:
    """Say again what a lone byte-level rule says of a space before the text: version 4 would set it to false."""
    name = "add_prefix_space"
    return {name: pre_tokenizer[name]} if pre_tokenizer is not None and name in pre_tokenizer else {}


def _chat_templates(chat_template: str | Mapping[str, str] | None) -> dict[str, str]:
    """Give the text of each template by its name; one alone is the default."""
    if chat_template is None:
        return {}
    templates = chat_template if isinstance(chat_template, Mapping) else {_DEFAULT: chat_template}
    for name in templates:
        check_file_name(name, "name of a chat_template")
    return {name: open_template(text).source if text in BUILT_IN else text for name, text in templates.items()}


def _template_setting(templates: dict[str, str]) -> dict:
    """Write the templates as versions before the files of their own read them."""
    if list(templates) == [_DEFAULT]:
        return {"chat_template": templates[_DEFAULT]}
    entries = [{"name": name, "template": text} for name, text in templates.items()]
    return {"chat_template": entries} if entries else {}


def _write_chat_templates(directory: Path, templates: dict[str, str]) -> None:
    for name, text in templates.items():
        file = directory / CHAT_TEMPLATE if name == _DEFAULT else directory / MORE_CHAT_TEMPLATES / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text.encode())


def _warn_of_other_rules(rules: dict, model_type: str | None) -> None:
    """Warn of the one model type for which version 5 ignores the rules of the files."""
    if model_type == "qwen2" and _split_rules(rules) != _split_rules(PRE_TOKENIZERS["qwen2"]._asdict()):
        warnings.warn(
            "this tokenizer is not Qwen2's, and AutoTokenizer of transformers 5 splits texts by Qwen2's rules beside a "
            f"model of type qwen2. Open it with {_CLASS}.from_pretrained instead.",
            stacklevel=2,
        )


def _split_rules(rules: Mapping) -> tuple:
    """Give what decides about ids; `trim_offsets` does not."""
    parts = flat(rules["pre_tokenizer"], "pretokenizers")
    parts = [{name: value for name, value in part.items() if name != "trim_offsets"} for part in parts]
    return rules["normalizer"], parts
