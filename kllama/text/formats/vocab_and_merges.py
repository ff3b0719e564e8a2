"""Read a `vocab.json` with its `merges.txt`: GPT-2, Qwen2, and the tokenizer assets of KerasHub.

The two files do not say how a text is split. A `tokenizer_config.json` beside them may name the class, KerasHub's
Llama 3 is known by its special tokens, and any other pair is GPT-2's. What a caller hands over as a pair is always
Llama 3's. `recognise.py` calls it.
"""

import operator
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import models

from kllama.checkpoints.files.reader import JSON_LIMIT, check_file, read_json, read_text, shown
from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.formats.added_tokens import added_token, check_added_id
from kllama.text.formats.opened import MAX_BYTES, MAX_VOCABULARY_SIZE, OpenedVocabulary
from kllama.text.formats.options import with_options
from kllama.text.formats.patterns import LLAMA3, QWEN2
from kllama.text.formats.rules import build_encoder, byte_level, rust_errors, sequence, split, start_template

END = "<|endoftext|>"
LLAMA3_START, LLAMA3_END, LLAMA3_TURN_END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
_LLAMA3_SPECIAL = re.compile(r"<\|[^|]+\|>")


class VocabularyAndMerges(NamedTuple):
    """A byte-level vocabulary that is split as Llama 3's, in the form that KerasHub's Llama 3 tokenizer takes it.

    Attributes:
        vocabulary: ids by token, or the path of a JSON file of them.
        merges: texts of two tokens with a space between, or the path of a file with one a line. It may be empty.
        start_token: the token that begins a text, `None` for none.
        special_tokens: special tokens beside the start token and all that are spelt `<|...|>`.
    """

    vocabulary: Mapping[str, int] | str | os.PathLike
    merges: Iterable[str] | str | os.PathLike
    start_token: str | None = LLAMA3_START
    special_tokens: tuple[str, ...] = ()


class _Scheme(NamedTuple):
    """What the two files leave out."""

    rules: dict
    special: list[str]
    ignore_merges: bool
    start_token: str | None
    end_token: str | None


def open_vocab_and_merges(
    vocab: Mapping[str, object],
    merges: str,
    path: Path,
    legacy: bool | None = None,
    add_prefix_space: bool | None = None,
) -> OpenedVocabulary:
    """Return a byte-level vocabulary.

    Args:
        vocab: ids by token, as parsed from the JSON.
        merges: the text of the merges, one pair a line; the first line may be a header.
        path: the JSON file, for messages; `merges.txt` and `tokenizer_config.json` lie beside it.
        legacy: must be `None`; see `options.py`.
        add_prefix_space: whether a text gets a space before it, `None` for the class's own rule: no.

    Raises:
        CheckpointError: ids that are not one to a token, or a merge that cannot be; the message has the line.
        UnsupportedError: `tokenizer_config.json` names a class that is not known here.
    """
    _check_ids(vocab, path)
    pairs = _read_merges(merges, vocab, path.with_name("merges.txt"))
    opened = _opened(vocab, pairs, _scheme(vocab, path), legacy, add_prefix_space, path)
    _add_tokens(opened.encoder, path.with_name("tokenizer_config.json"))
    return opened


def open_given(
    pair: VocabularyAndMerges, legacy: bool | None = None, add_prefix_space: bool | None = None
) -> OpenedVocabulary:
    """Return the vocabulary of a pair that a caller hands over; what it holds is not changed.

    Args:
        pair: vocabulary and merges.
        legacy: must be `None`; see `options.py`.
        add_prefix_space: must be `None` or `False`: Llama 3 puts no space before a text.

    Raises:
        TypeError: the vocabulary, the merges, a token, an id or a merge is of another type.
        MissingFileError: a path at which there is no file.
        CheckpointError: ids that are not one to a token, a merge that cannot be, or special tokens that are missing.
    """
    vocab, vocab_name = _given_vocabulary(pair.vocabulary)
    merges, merges_name = _given_merges(pair.merges)
    _check_ids(vocab, vocab_name)
    pairs = _read_merges(merges, vocab, merges_name)
    named = [*pair.special_tokens] if pair.start_token is None else [pair.start_token, *pair.special_tokens]
    for token in named:
        if token not in vocab:
            raise CheckpointError(f"{vocab_name}: special token = {token!r}; expected one of its {len(vocab)} tokens.")
    scheme = _llama3_scheme(vocab, pair.start_token, pair.special_tokens)
    return _opened(vocab, pairs, scheme, legacy, add_prefix_space, vocab_name)


def _given_vocabulary(vocabulary) -> tuple[Mapping[str, int], object]:
    if isinstance(vocabulary, str | os.PathLike):
        return read_json(Path(vocabulary), MAX_BYTES), vocabulary
    if not isinstance(vocabulary, Mapping):
        raise TypeError(f"vocabulary = {reprlib.repr(vocabulary)}; expected ids by token, or the path of a JSON file.")
    ids = {}
    for token, token_id in vocabulary.items():
        if not isinstance(token, str):
            raise TypeError(f"vocabulary has {reprlib.repr(token)}; expected a str.")
        try:
            ids[token] = operator.index(token_id)
        except TypeError as error:
            raise TypeError(f"vocabulary[{token!r}] = {reprlib.repr(token_id)}; expected an integer.") from error
    return ids, "vocabulary"


def _given_merges(merges) -> tuple[str, object]:
    if isinstance(merges, str | os.PathLike):
        # KerasHub writes an empty file where there are no merges, which is else the mark of a broken download.
        return read_text(Path(merges), MAX_BYTES) if check_file(Path(merges)) else "", merges
    if isinstance(merges, bytes | Mapping) or not isinstance(merges, Iterable):
        raise TypeError(f"merges = {reprlib.repr(merges)}; expected a list of str, or the path of a file.")
    lines = list(merges)
    for place, line in enumerate(lines):
        if not isinstance(line, str):
            raise TypeError(f"merges[{place}] = {reprlib.repr(line)}; expected a str: two tokens with a space between.")
    return "\n".join(lines), "merges"


def _opened(
    vocab: Mapping[str, int],
    pairs: list[tuple[str, str]],
    scheme: _Scheme,
    legacy: bool | None,
    add_prefix_space: bool | None,
    source: object,
) -> OpenedVocabulary:
    rules = with_options(scheme.rules, legacy, add_prefix_space, source)
    with rust_errors(f"{source}: not a byte-pair vocabulary"):
        model = models.BPE(vocab=dict(vocab), merges=pairs, ignore_merges=scheme.ignore_merges)
        encoder = build_encoder(model, rules, scheme.special)
    return OpenedVocabulary(encoder, scheme.start_token, scheme.end_token, scheme.start_token is not None)


def _check_ids(vocab: Mapping[str, object], path: object) -> None:
    tokens = {}
    for token, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < MAX_VOCABULARY_SIZE:
            raise CheckpointError(
                f"{path}: id of {shown(token)} = {shown(token_id)}; expected an integer from 0 to "
                f"{MAX_VOCABULARY_SIZE - 1}."
            )
        if (other := tokens.setdefault(token_id, token)) != token:
            raise CheckpointError(f"{path}: id of {shown(token)} = {token_id}; expected other than {shown(other)} has.")
    if not tokens:
        raise CheckpointError(f"{path}: number of tokens = 0; expected at least 1.")


def _read_merges(text: str, vocab: Mapping[str, object], path: object) -> list[tuple[str, str]]:
    pairs = {}
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if (number == 1 and line.startswith("#version")) or (number == len(lines) and not line):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not all(pair):
            raise CheckpointError(f"{path}: line {number}: {shown(line)}; expected two tokens with a space between.")
        for token in (*pair, "".join(pair)):
            if token not in vocab:
                raise CheckpointError(f"{path}: line {number}: {shown(token)}; expected a token of the vocabulary.")
        if pair in pairs:
            raise CheckpointError(
                f"{path}: line {number}: {shown(line)}; expected another pair than line {pairs[pair]}."
            )
        pairs[pair] = number
    return list(pairs)


def _scheme(vocab: Mapping[str, int], path: Path) -> _Scheme:
    name = _settings(path.with_name("tokenizer_config.json")).get("tokenizer_class")
    if name in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        special = [END] if END in vocab else []
        rules = _rules([split(QWEN2), byte_level()], {"type": "NFC"})
        return _Scheme(rules, special, False, None, END if special else None)
    if name not in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise UnsupportedError(
            f"{path.with_name('tokenizer_config.json')}: tokenizer_class = {shown(name)}; expected GPT2Tokenizer or "
            "Qwen2Tokenizer, as the files do not say how other classes split a text. Use the tokenizer.json instead."
        )
    if name is None and LLAMA3_START in vocab:
        return _llama3_scheme(vocab, LLAMA3_START)
    rules = _rules([byte_level(use_regex=True)])
    return _Scheme(rules, [END] if END in vocab else [], False, None, END if END in vocab else None)


def _llama3_scheme(vocab: Mapping[str, int], start_token: str | None, special: Iterable[str] = ()) -> _Scheme:
    rules = _rules([split(LLAMA3), byte_level()])
    named = {*filter(_LLAMA3_SPECIAL.fullmatch, vocab), *special}
    if start_token is not None:
        template = start_template(start_token, vocab[start_token])
        rules["post_processor"] = sequence([byte_level(trim_offsets=False), template], "processors")
    end_token = LLAMA3_END if LLAMA3_END in vocab else None
    return _Scheme(rules, sorted(named, key=vocab.__getitem__), True, start_token, end_token)


def _rules(pre_tokenizers: list[dict], normalizer: dict | None = None) -> dict:
    return {
        "normalizer": normalizer,
        "pre_tokenizer": sequence(pre_tokenizers, "pretokenizers"),
        "decoder": byte_level(),
        "post_processor": byte_level(trim_offsets=False),
    }


def _settings(path: Path) -> dict:
    return read_json(path, JSON_LIMIT) if path.exists() else {}


def _add_tokens(encoder: tokenizers.Tokenizer, path: Path) -> None:
    """Add the tokens that `tokenizer_config.json` lists with their ids."""
    listed = _settings(path).get("added_tokens_decoder", {})
    try:
        tokens = {int(token_id): dict(token) for token_id, token in listed.items()}
        added = {token_id: added_token(token) for token_id, token in sorted(tokens.items())}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: added_tokens_decoder = {shown(listed)}; expected objects of content and flags by id."
        ) from error
    encoder.add_tokens(list(added.values()))
    for token_id, token in added.items():
        check_added_id(encoder, token.content, token_id, path)
