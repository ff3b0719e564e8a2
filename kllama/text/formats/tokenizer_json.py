"""Open a `tokenizer.json`: a strict parse, patterns that end, and ids that are the file's own.

Everything that can be wrong with the file is a `CheckpointError` here, so that the tokenizer can trust what it gets. It
encodes nothing itself. `recognise.py` calls it.
"""

import json
from collections.abc import Mapping

import tokenizers
from tokenizers import models

from kllama.checkpoints.files.reader import shown
from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.formats.added_tokens import check_added_id
from kllama.text.formats.opened import MAX_BYTES, MAX_VOCABULARY_SIZE, OpenedVocabulary
from kllama.text.formats.options import with_options
from kllama.text.formats.patterns import check_patterns
from kllama.text.formats.rules import MARK, flat, read_rules, replace, rust_errors
from kllama.text.formats.splits import word_splits

SPACE = {"String": " "}


def open_json(
    source: str | Mapping | tokenizers.Tokenizer,
    legacy: bool | None = None,
    add_prefix_space: bool | None = None,
    name: str = "tokenizer",
) -> OpenedVocabulary:
    """Return the vocabulary of a `tokenizer.json`.

    Args:
        source: its text, its parsed dict, or a `tokenizers.Tokenizer`, which is copied.
        legacy: `None` is what the file says; see `options.py`.
        add_prefix_space: the same.
        name: the file, for messages.

    Raises:
        CheckpointError: too large, not JSON, not a tokenizer, or its ids are not one to a token.
        UnsupportedError: one of its patterns could run without end, or it begins texts with more than one token.
        ValueError: the file has no rule that an option could change.
    """
    text = _as_text(source)
    return open_parsed(text, parse_object(text, name), legacy, add_prefix_space, name)


def open_parsed(
    text: str, content: dict, legacy: bool | None, add_prefix_space: bool | None, name: str
) -> OpenedVocabulary:
    """Return the vocabulary of a `tokenizer.json` that `parse_object` has read; the rest is as in `open_json`."""
    with rust_errors(f"{name}: not a valid tokenizer.json"):
        encoder = tokenizers.Tokenizer.from_str(text)
        rules = read_rules(encoder)
    check_patterns(rules, name)
    changed = with_options(rules, legacy, add_prefix_space, name)
    if changed is not rules:
        with rust_errors(f"{name}: not a valid tokenizer.json"):
            encoder = tokenizers.Tokenizer.from_str(json.dumps({**content, **changed}))
    _split_words(encoder, changed, content["model"])
    _drop_settings(encoder)
    _check_ids(encoder, content, name)
    _check_merges(content, name)
    start_token, adds_start_token = _start(rules["post_processor"], encoder, name)
    return OpenedVocabulary(encoder, start_token, None, adds_start_token)


def parse_object(text: str, name: str) -> dict:
    """Return a JSON object, no key of which stands twice.

    Raises:
        CheckpointError: too large, not JSON, or not an object.
    """
    if len(text) > MAX_BYTES:
        raise CheckpointError(f"{name}: size = more than {MAX_BYTES} bytes; expected at most that.")
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: {error}; expected the JSON of a tokenizer.json.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: top level = {shown(content)}; expected an object.")
    return content


def _as_text(source: str | Mapping | tokenizers.Tokenizer) -> str:
    if isinstance(source, str):
        return source
    if isinstance(source, tokenizers.Tokenizer):
        with rust_errors("tokenizer: this tokenizers.Tokenizer cannot be written as JSON"):
            return source.to_str()
    try:
        return json.dumps(source, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"tokenizer: {error}; expected the dict of a tokenizer.json.") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    content = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} stands twice in one object")
        content[key] = value
    return content


def _split_words(encoder: tokenizers.Tokenizer, rules: dict, model: dict) -> None:
    """Give the rules of SentencePiece that split nothing their split at word starts: the same ids, much sooner."""
    marks = [part["content"] for part in flat(rules["normalizer"], "normalizers") if part == replace(SPACE, MARK)]
    plain = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    is_plain = isinstance(encoder.model, models.BPE) and not any(map(model.get, plain))
    if marks and rules["pre_tokenizer"] is None and is_plain:
        for part in word_splits(MARK, model["vocab"], bool(model.get("byte_fallback"))):
            pattern = tokenizers.Regex(part["pattern"]["Regex"])
            encoder.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "merged_with_next")


def _drop_settings(encoder: tokenizers.Tokenizer) -> None:
    """Forget settings of a call, or of a training, that happen to be saved with the rules."""
    encoder.no_truncation()
    encoder.no_padding()
    if isinstance(encoder.model, models.BPE):
        encoder.model.dropout = None  # It leaves out merges at random, to vary what a model is trained on.


def _check_ids(encoder: tokenizers.Tokenizer, content: dict, name: str) -> None:
    tokens = {}
    for token, token_id in encoder.get_vocab().items():
        if token_id >= MAX_VOCABULARY_SIZE:
            raise CheckpointError(f"{name}: id of {token!r} = {token_id}; expected less than {MAX_VOCABULARY_SIZE}.")
        if (other := tokens.setdefault(token_id, token)) != token:
            raise CheckpointError(f"{name}: id of {token!r} = {token_id}; expected an id other than {other!r} has.")
    if not tokens:
        raise CheckpointError(f"{name}: number of tokens = 0; expected at least 1.")
    for added in content.get("added_tokens") or ():
        check_added_id(encoder, added["content"], added["id"], name)


def _check_merges(content: dict, name: str) -> None:
    seen = set()
    for merge in content["model"].get("merges") or ():
        # Tokens of a list may hold spaces, so that joining them would make equals of different pairs.
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        if pair in seen:
            raise CheckpointError(f"{name}: model.merges has {shown(merge)} twice; expected each pair once.")
        seen.add(pair)


def _start(post_processor: dict | None, encoder: tokenizers.Tokenizer, name: str) -> tuple[str | None, bool | None]:
    """Return the token that the post-processor puts before a text, and whether it puts one; `None` if it is silent."""
    beginnings = [_beginning(part, name) for part in flat(post_processor, "processors")]
    beginnings = [beginning for beginning in beginnings if beginning is not None]
    if not beginnings:
        return None, None
    tokens = [token for beginning in beginnings for token in beginning]
    if len(tokens) > 1:
        raise UnsupportedError(f"{name}: post_processor begins texts with {shown(tokens)}; expected one token at most.")
    for token in tokens:
        if encoder.token_to_id(token) is None:
            raise CheckpointError(f"{name}: post_processor begins texts with {shown(token)}; expected a known token.")
    return (tokens[0], True) if tokens else (None, False)


def _beginning(part: dict, name: str) -> list[str] | None:
    """Return the tokens that a post-processor puts before a single text, `None` for one that never adds any."""
    if part["type"] in ("BertProcessing", "RobertaProcessing"):
        return [part["cls"][0]]
    if part["type"] != "TemplateProcessing":
        return None
    tokens = []
    for piece in part["single"]:
        if "SpecialToken" not in piece:
            break
        token = piece["SpecialToken"]["id"]
        if token not in part["special_tokens"]:
            raise CheckpointError(
                f"{name}: post_processor.single has {shown(token)}; expected one of its special_tokens."
            )
        tokens += part["special_tokens"][token]["tokens"]
    return tokens
