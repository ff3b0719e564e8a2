"""SentencePiece models of words: each stretch between spaces is a piece, or unknown.

KerasHub's own tests use such models, and small ones are handy; no Llama has one. What cannot give SentencePiece's ids
on every text is refused. `sentencepiece_model.py` calls it.
"""

from collections.abc import Mapping

from tokenizers import models

from kllama.checkpoints.files.reader import shown
from kllama.errors import UnsupportedError
from kllama.text.formats.normalization_table import read_table, table_normalizers
from kllama.text.formats.patterns import refusal
from kllama.text.formats.rules import MARK, rust_errors, split
from kllama.text.formats.splits import any_of


def word_model(
    ids: Mapping[str, int], unknown: str, words: list[str], source: object
) -> tuple[models.WordLevel, list[dict]]:
    """Return the model and the split that it needs.

    Neighbours that are unknown are one unknown token to SentencePiece. So the split cuts out the words that are pieces,
    and leaves all that stands between two of them whole.

    Args:
        ids: the id of each piece.
        unknown: the piece of unknown words.
        words: the pieces that text is made of; `check_words` has seen them.
        source: the file, for messages.

    Raises:
        UnsupportedError: there are too many of them.
    """
    pattern = f"{MARK}(?:{any_of(word.removeprefix(MARK) for word in words)})(?={MARK}|\\z)"
    if reason := refusal(pattern):
        raise UnsupportedError(f"{source}: the pattern of {len(words)} words {reason}. Use the tokenizer.json instead.")
    with rust_errors(f"{source}: the pieces do not make a vocabulary"):
        return models.WordLevel(dict(ids), unk_token=unknown), [split(pattern)]


def word_normalizers(table: bytes, words: list[str], source: object) -> list[dict]:
    """Return the normalizers that do what a table of normalization does, as far as words tell."""
    characters = {character for word in words for character in word.removeprefix(MARK)}
    return table_normalizers(read_table(table, source), characters, source) if table else []


def check_words(proto, words: list[str], others: list[str], source: object) -> None:
    """Refuse a model of words that cannot be run exactly.

    Args:
        proto: the model.
        words: its normal pieces.
        others: its other pieces, but for user-defined ones.
        source: the file, for messages.

    Raises:
        UnsupportedError: naming the field or the piece.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    num_named = len(words) + len(others)
    unsupported = {
        "byte_fallback": trainer.byte_fallback,
        "allow_whitespace_only_pieces": trainer.allow_whitespace_only_pieces,
        # Without it a text can spell a control piece, or begin with a word that has no mark.
        "add_dummy_prefix": not normalizer.add_dummy_prefix,
        # A text of characters that the table removes is a mark and nothing else.
        "remove_extra_whitespaces": bool(normalizer.precompiled_charsmap) and not normalizer.remove_extra_whitespaces,
        "a user-defined piece": len(proto.pieces) != num_named,
        "no word": not words,
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise UnsupportedError(
                f"{source}: {name} in a model of words, which cannot be run exactly. Use the tokenizer.json instead."
            )
    wrong = [word for word in words if not word.startswith(MARK) or MARK in word[1:] or " " in word]
    if wrong := wrong + [piece for piece in others if MARK in piece]:
        raise UnsupportedError(
            f"{source}: piece {shown(wrong[0])}; expected words with a mark before them, and it alone."
        )
