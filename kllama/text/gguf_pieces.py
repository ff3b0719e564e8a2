"""A SentencePiece vocabulary as keys of a GGUF file: pieces, and scores that give the merges in their order.

llama.cpp joins the neighbours that form the best-scoring piece, whichever two they are, and the leftmost of equals; the
Rust library applies a list of pairs in its order. So every pair that forms a piece has to be a merge, and the score of
a piece is the place of its first one. `gguf_tokens.py` calls it.

A text that spells U+2581 is the only one whose ids differ without a word: llama2.c takes that character for itself,
llama.cpp for a space, as SentencePiece does.
"""

import re
import warnings
from enum import IntEnum

import tokenizers

from kllama.checkpoints.files.reader import listed, shown
from kllama.errors import UnsupportedError
from kllama.text.formats.merges import check_work, ranked_merges
from kllama.text.formats.rules import MARK, flat
from kllama.text.formats.splits import isolating_splits, word_splits

BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
_PREPEND = {"type": "Prepend", "prepend": MARK}


class TokenType(IntEnum):
    """What kind of token it is, as a GGUF file says it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def cannot_run(field: str, received: object, expected: str) -> UnsupportedError:
    """Return the exception for a tokenizer that llama.cpp does not have."""
    return UnsupportedError(
        f"tokenizer: {field} = {shown(received)}; expected {expected}: llama.cpp has no such tokenizer. Export the "
        "model without its preprocessor, and give llama.cpp token ids."
    )


def sentencepiece_keys(
    encoder: tokenizers.Tokenizer, tokens: list[str], types: list[int], model: dict, rules: dict
) -> dict[str, object]:
    """Give the keys of a vocabulary of pieces, without the `tokenizer.ggml.` before them.

    Args:
        encoder: the tokenizer.
        tokens: by id, a text for each row of the model.
        types: the `TokenType` of each.
        model: the JSON of the encoder's model, byte-pair encoding.
        rules: the JSON of its other parts.

    Raises:
        UnsupportedError: rules that llama.cpp does not have, or merges that no scores give.
    """
    if not model["byte_fallback"] or not BYTES.issubset(tokens):
        raise cannot_run("byte_fallback", model["byte_fallback"], "true, and a token for each byte")
    space, has_prefix = _space(rules)
    user_defined = _isolated_pieces(rules) if model["ignore_merges"] else []
    types = [
        TokenType.USER_DEFINED if token in user_defined else kind for token, kind in zip(tokens, types, strict=True)
    ]
    pieces = {token: token_id for token_id, token in enumerate(tokens) if types[token_id] == TokenType.NORMAL}
    _check_splits(encoder, rules, space, pieces, user_defined)
    if user_defined and has_prefix:
        warnings.warn(
            f"tokenizer: llama.cpp puts no space before a user-defined piece ({listed(user_defined)}) that begins a "
            "text, and one before the text behind it. Such texts get other ids there.",
            stacklevel=2,
        )
    scores = _scores(pieces, [tuple(merge) for merge in model["merges"]])
    _check_spelling(pieces, [token for token, kind in zip(tokens, types, strict=True) if kind != TokenType.NORMAL])
    return {
        "model": "llama",
        "pre": "default",
        "tokens": _with_marks(tokens, pieces, space),
        "scores": [scores.get(token, 0.0) for token in tokens],
        "token_type": types,
        "add_space_prefix": has_prefix,
    }


def _space(rules: dict) -> tuple[str, bool]:
    """Return what stands for a space in the pieces, and whether llama.cpp has to put one before a text."""
    normalizers = flat(rules["normalizer"], "normalizers")
    metaspace = [part for part in flat(rules["pre_tokenizer"], "pretokenizers") if part["type"] == "Metaspace"]
    if not metaspace:
        if normalizers in ([_PREPEND, _ESCAPE], [_ESCAPE, _PREPEND]):
            return MARK, True
        if normalizers == [_ESCAPE]:
            return MARK, False
        if normalizers == [{"type": "Prepend", "prepend": " "}]:
            return " ", True
    if normalizers or len(metaspace) != 1 or metaspace[0]["replacement"] != MARK:
        raise cannot_run("normalizer", rules["normalizer"], f"one that writes {MARK!r} for spaces, and does no more")
    scheme = metaspace[0]["prepend_scheme"]
    if scheme != "never":
        warnings.warn(
            f"tokenizer: prepend_scheme = {scheme}; llama.cpp begins every text, and what follows a special token, "
            "with a space of its own. Texts that begin with a space, or have text behind a special token, get other "
            "ids there. Build the tokenizer with legacy=True for ids that are the same everywhere.",
            stacklevel=2,
        )
    return MARK, scheme != "never"


def _check_splits(
    encoder: tokenizers.Tokenizer, rules: dict, space: str, pieces: dict[str, int], user_defined: list[str]
) -> None:
    """Refuse splits that keep pieces from being formed: llama.cpp joins whatever is in the vocabulary."""
    parts = [
        part
        for part in flat(rules["pre_tokenizer"], "pretokenizers")
        if not (part["type"] == "Metaspace" and not part["split"])
    ]
    at_words = word_splits(space, pieces, byte_fallback=True)
    if user_defined:
        model = tokenizers.Tokenizer.from_str(encoder.to_str()).model
        model.ignore_merges = False
        ids = dict(sorted(encoder.get_vocab().items(), key=lambda item: item[1]))
        first, *guards = isolating_splits(model, ids, user_defined, "tokenizer")
        if parts == [first, *at_words, *guards]:
            return
    elif parts in ([], at_words):
        return
    single = [{"type": "Split", "pattern": {"String": MARK}, "behavior": "MergedWithNext", "invert": False}]
    splits_words = parts == single or [part["type"] for part in parts] == ["Metaspace"]
    if user_defined or not splits_words or any(MARK in piece[1:] for piece in pieces):
        raise cannot_run("pre_tokenizer", rules["pre_tokenizer"], "none that parts what could be one piece")


def _isolated_pieces(rules: dict) -> list[str]:
    """Return the pieces that `formats/splits.py` cuts out of a text, by the pattern that it wrote for them."""
    parts = flat(rules["pre_tokenizer"], "pretokenizers")
    if not parts or parts[0]["type"] != "Split" or "Regex" not in parts[0]["pattern"]:
        raise cannot_run("ignore_merges", True, "false")
    alternatives = re.findall(r"(?:\\.|[^\\|])+", parts[0]["pattern"]["Regex"], re.DOTALL)
    return [re.sub(r"\\(.)", r"\1", alternative, flags=re.DOTALL) for alternative in alternatives]


def _scores(pieces: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, float]:
    """Give each piece a score, so that the best one that neighbours can form is the one of the first merge.

    Raises:
        UnsupportedError: a piece can be formed in a way that is no merge, or merges of two pieces alternate.
    """
    check_work(pieces, "tokenizer")
    if missing := dict.fromkeys(ranked_merges(pieces)).keys() - set(merges):
        raise cannot_run("merges without", min(missing), "every way to join two pieces into a third")
    if unknown := [piece for piece in pieces if any(character not in pieces for character in piece)]:
        raise cannot_run("piece", unknown[0], "pieces of characters that are pieces")
    first, count, alternating = {}, {}, {}
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        count[piece] = count.get(piece, 0) + 1
        if rank - first.setdefault(piece, rank) >= count[piece]:
            alternating[piece] = first[piece]
    _check_alternating(alternating)
    formed = [*first, *(piece for piece in pieces if piece not in first)]
    return {piece: -float(rank) for rank, piece in enumerate(formed)}


def _check_alternating(first: dict[str, int]) -> None:
    """Refuse merges of one piece between those of another, but for runs of one character, the longest first.

    A run grows from its left end, and the longest that can be formed is the leftmost; see `formats/merges.py`.
    """
    by_rank = sorted(first, key=first.__getitem__)
    is_run = len({character for piece in first for character in piece}) <= 1
    if not is_run or by_rank != sorted(first, key=len, reverse=True):
        raise cannot_run("merges of", by_rank[0], "all merges that form a piece in one row")


def _check_spelling(pieces: dict[str, int], others: list[str]) -> None:
    """Refuse tokens that text cannot spell here, and that llama.cpp would join two pieces to."""
    for token in others:
        for end in range(1, len(token)):
            if token[:end] in pieces and token[end:] in pieces:
                raise cannot_run("token", token, f"no pieces {token[:end]!r} and {token[end:]!r}, which make it")


def _with_marks(tokens: list[str], pieces: dict[str, int], space: str) -> list[str]:
    """Write `MARK` for a space in the pieces of llama2.c."""
    if space == MARK:
        return tokens
    marked = [token.replace(space, MARK) if token in pieces else token for token in tokens]
    if len(set(marked)) != len(marked):
        raise cannot_run("pieces with", MARK, "none beside the same with a space")
    return marked
