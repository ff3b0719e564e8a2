"""Read the `tokenizer.model` of SentencePiece: byte-pair encoding with scores (Llama 1 and 2, Mistral, KerasHub's spm).

The rules are made so that ids equal SentencePiece's own on every text. What cannot be equal is refused: tables of
normalization, unused pieces, other algorithms than BPE, but for words (`sentencepiece_words.py`). `recognise.py` calls
it.
"""

import math
from collections.abc import Mapping

from tokenizers import models

from kllama.checkpoints.files.reader import shown
from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.formats.merges import scored_merges
from kllama.text.formats.opened import OpenedVocabulary
from kllama.text.formats.options import with_options
from kllama.text.formats.rules import (
    MARK,
    build_encoder,
    replace,
    rust_errors,
    sequence,
    start_template,
    strip_start,
)
from kllama.text.formats.sentencepiece_words import check_words, word_model, word_normalizers
from kllama.text.formats.splits import isolating_splits, word_splits

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_ALL = 2**16
_MODEL_TYPES = {1: "unigram", 4: "char"}
_WORDS = 3


def open_sentencepiece(
    data: bytes, source: object, legacy: bool | None = None, add_prefix_space: bool | None = None
) -> OpenedVocabulary:
    """Return the vocabulary of a SentencePiece model.

    Args:
        data: the bytes of the file.
        source: its name, for messages.
        legacy: `None` and `True` are SentencePiece's own rules; see `options.py`.
        add_prefix_space: `None` is what the file says.

    Raises:
        CheckpointError: not a SentencePiece model, or a damaged one.
        UnsupportedError: a model that cannot be run exactly.
    """
    proto = _parse(data, source)
    pieces = _checked_pieces(proto, source)
    ids = {piece: token_id for token_id, piece in enumerate(pieces)}
    of_kind = {wanted: [piece for piece, (kind, _) in pieces.items() if kind == wanted] for wanted in range(1, 7)}
    _check_supported(proto, of_kind, source)
    named = (proto.trainer_spec.bos_piece, proto.trainer_spec.eos_piece)
    start, end = (piece if piece in of_kind[_CONTROL] else None for piece in named)
    if proto.trainer_spec.model_type == _WORDS:
        model, splits = word_model(ids, of_kind[_UNKNOWN][0], of_kind[_NORMAL], source)
        normalizers = word_normalizers(proto.normalizer_spec.precompiled_charsmap, of_kind[_NORMAL], source)
    else:
        model, splits = _model(proto, pieces, of_kind, source)
        normalizers = []
    rules = {
        "normalizer": sequence([*normalizers, *_normalizers(proto.normalizer_spec)], "normalizers"),
        "pre_tokenizer": sequence(splits, "pretokenizers"),
        "decoder": sequence(_decoders(proto.normalizer_spec), "decoders"),
        "post_processor": None if start is None else start_template(start, ids[start]),
    }
    rules = with_options(rules, legacy, add_prefix_space, source)
    with rust_errors(f"{source}: the pieces do not make a vocabulary"):
        encoder = build_encoder(model, rules, sorted(of_kind[_UNKNOWN] + of_kind[_CONTROL], key=ids.__getitem__))
    return OpenedVocabulary(encoder, start, end, None if start is None else True)


def _parse(data: bytes, source: object):
    # Imported here: the other formats do without protobuf.
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise CheckpointError(f"{source}: {error}; expected a SentencePiece model. Download it again.") from error
    missing = [name for name in ("trainer_spec", "normalizer_spec") if not proto.HasField(name)]
    if missing or not proto.pieces:
        what = ", ".join(missing) or "pieces"
        raise CheckpointError(f"{source}: no {what}; expected a whole SentencePiece model. Download it again.")
    return proto


def _checked_pieces(proto, source: object) -> dict[str, tuple[int, float]]:
    """Return the kind and the score of each piece, in the order of the ids."""
    pieces = {}
    for token_id, entry in enumerate(proto.pieces):
        piece = entry.piece
        if isinstance(piece, bytes):  # protobuf hands out what it cannot decode
            raise CheckpointError(f"{source}: piece {token_id} = {piece!r}; expected UTF-8.")
        if not piece or piece in pieces:
            raise CheckpointError(f"{source}: piece {token_id} = {shown(piece)}; expected a text that no other has.")
        if not math.isfinite(entry.score):
            raise CheckpointError(f"{source}: score of {shown(piece)} = {entry.score}; expected a finite number.")
        pieces[piece] = (entry.type, entry.score)
    kinds = [kind for kind, _ in pieces.values()]
    if kinds.count(_UNKNOWN) != 1:
        raise CheckpointError(f"{source}: number of unknown pieces = {kinds.count(_UNKNOWN)}; expected 1.")
    byte_pieces = {piece for piece, (kind, _) in pieces.items() if kind == _BYTE}
    expected = {f"<0x{byte:02X}>" for byte in range(256)} if proto.trainer_spec.byte_fallback else set()
    if byte_pieces != expected:
        wrong = min(byte_pieces ^ expected)
        raise CheckpointError(
            f"{source}: byte pieces = {len(byte_pieces)}, {shown(wrong)} being wrong or missing; expected "
            f"{len(expected)}, as byte_fallback = {proto.trainer_spec.byte_fallback}."
        )
    return pieces


def _check_supported(proto, of_kind: Mapping[int, list[str]], source: object) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type in _MODEL_TYPES:
        raise UnsupportedError(
            f"{source}: model_type = {_MODEL_TYPES[trainer.model_type]}; expected bpe. Use the tokenizer.json instead."
        )
    has_words = trainer.model_type == _WORDS
    unsupported = {
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        # The library applies such a table by grapheme, SentencePiece by character: they differ on accents.
        "precompiled_charsmap": (normalizer.precompiled_charsmap and not has_words)
        or proto.denormalizer_spec.precompiled_charsmap,
        "escape_whitespaces": not normalizer.escape_whitespaces,
        "an unused piece": of_kind[_UNUSED],
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise UnsupportedError(
                f"{source}: {name} is set to other than the models of the Llama family have it, and cannot be run "
                "exactly. Use the tokenizer.json instead."
            )
    if has_words:
        check_words(proto, of_kind[_NORMAL], of_kind[_UNKNOWN] + of_kind[_CONTROL], source)
    else:
        _check_pieces(of_kind, source)


def _check_pieces(of_kind: Mapping[int, list[str]], source: object) -> None:
    for piece in of_kind[_USER_DEFINED]:
        if MARK in piece or " " in piece:
            raise UnsupportedError(f"{source}: user-defined piece {shown(piece)}; expected one without spaces.")
    normal = set(of_kind[_NORMAL])
    for piece in of_kind[_NORMAL]:
        if unknown := [character for character in piece if character not in normal]:
            raise UnsupportedError(
                f"{source}: piece {shown(piece)} has {shown(unknown[0])}; expected characters that are pieces."
            )


def _model(
    proto, pieces: Mapping[str, tuple[int, float]], of_kind: Mapping[int, list[str]], source: object
) -> tuple[models.BPE, list[dict]]:
    """Return the model and the splits that it needs. Only normal pieces are formed by merges, and only from others."""
    scores = {piece: pieces[piece][1] for piece in of_kind[_NORMAL]}
    ids = {piece: token_id for token_id, piece in enumerate(pieces)}
    byte_fallback = proto.trainer_spec.byte_fallback
    settings = {"vocab": ids, "merges": scored_merges(scores, source), "unk_token": of_kind[_UNKNOWN][0]}
    settings |= {"fuse_unk": True, "byte_fallback": byte_fallback}
    splits = word_splits(MARK, scores, byte_fallback)
    with rust_errors(f"{source}: the pieces do not make a vocabulary"):
        if not of_kind[_USER_DEFINED]:
            return models.BPE(**settings), splits
        isolated, *guards = isolating_splits(models.BPE(**settings), ids, of_kind[_USER_DEFINED], source)
        return models.BPE(**settings, ignore_merges=True), [isolated, *splits, *guards]


def _normalizers(spec) -> list[dict]:
    parts = []
    if spec.remove_extra_whitespaces:
        # SentencePiece drops a spelt U+2581 at the end too. The look behind keeps the search linear.
        patterns = {r"\A +": "", r" {2,}": " ", rf"(?<![ {MARK}])[ {MARK}]+\z": ""}
        parts += [replace({"Regex": pattern}, content) for pattern, content in patterns.items()]
    if spec.add_dummy_prefix:
        parts.append({"type": "Prepend", "prepend": MARK})
    return [*parts, replace({"String": " "}, MARK)]


def _decoders(spec) -> list[dict]:
    parts = [replace({"String": MARK}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        # A model that never begins a text with spaces takes all of them away.
        start = _ALL if spec.remove_extra_whitespaces else 1
        parts.append(strip_start(start))
    return parts
