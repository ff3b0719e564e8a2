"""Pre-tokenizers that keep the ids of a model and make them cheaper, or possible, to compute.

The Rust library remembers the ids of short stretches of text, so a split at word starts is worth much where no token
reaches over it. Pieces that a text spells as a whole are cut out by a split as well. The readers of SentencePiece and
llama2.c files call it.
"""

from collections.abc import Iterable, Mapping

from tokenizers import models

from kllama.checkpoints.files.reader import shown
from kllama.errors import UnsupportedError
from kllama.text.formats.patterns import refusal
from kllama.text.formats.rules import split


def word_splits(space: str, pieces: Iterable[str], byte_fallback: bool) -> list[dict]:
    """Return the split before each run of spaces if no piece could reach over it, else nothing.

    Args:
        space: the character that stands for a space in the pieces.
        pieces: what merges can form.
        byte_fallback: whether unknown characters become bytes. If not, neighbours become one unknown token, and a space
            must be known to part them.
    """
    pieces = set(pieces)
    if any(space in piece.lstrip(space) for piece in pieces) or not (byte_fallback or space in pieces):
        return []
    return [split(f"{space}+", "MergedWithNext")]


def isolating_splits(model: models.BPE, ids: Mapping[str, int], isolated: Iterable[str], source: object) -> list[dict]:
    """Return two splits with which a model of `ignore_merges=True` takes some pieces whole, and merges the rest.

    The first cuts the isolated pieces out, the longest first. The other one guards what `ignore_merges` would else take
    for a token too: a stretch of text that spells a token which merges never form, such as `<s>`. It is cut after its
    first token, which changes nothing: no merge reaches over the end of a token.

    Args:
        model: the same model with `ignore_merges=False`.
        ids: the id of each token.
        isolated: the tokens to take whole.
        source: the file, for messages.

    Raises:
        UnsupportedError: there are too many of them, or one of the guarded stretches cannot be cut.
    """
    isolated = set(isolated)
    formed = {token for token in ids if [part.id for part in model.tokenize(token)] == [ids[token]]}
    guarded = [token for token in ids if token not in formed and token not in isolated]
    by_head = {}
    for token in guarded:
        head = _first_stretch(model, token)
        tail = token[len(head) :]
        if not tail or (tail in ids and tail not in formed):
            raise UnsupportedError(f"{source}: {shown(token)} beside a user-defined piece; no split keeps it text.")
        by_head.setdefault(head, []).append(tail)
    patterns = [any_of(sorted(isolated, key=lambda token: (-len(token), token)))]
    if by_head:
        patterns.append(
            "|".join(rf"\A{_escaped(head)}(?=(?:{any_of(tails)})\z)" for head, tails in sorted(by_head.items()))
        )
    for pattern in patterns:
        if reason := refusal(pattern):
            raise UnsupportedError(f"{source}: the pattern of {len(isolated)} user-defined pieces {reason}.")
    return [split(pattern) for pattern in patterns]


def _first_stretch(model: models.BPE, token: str) -> str:
    """Return what the model's first token covers; of the bytes of one character, the whole character."""
    ends = {part.offsets[1] for part in model.tokenize(token)}  # in bytes
    return next(token[:end] for end in range(1, len(token) + 1) if len(token[:end].encode()) in ends)


def any_of(words: Iterable[str]) -> str:
    """Return the regular expression of any of some texts, the first one that fits."""
    return "|".join(map(_escaped, words))


def _escaped(text: str) -> str:
    return "".join("\\" + character if character in r"\.[]{}()*+?^$|" else character for character in text)
