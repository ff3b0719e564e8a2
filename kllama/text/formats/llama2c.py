"""Read the `tokenizer.bin` of llama2.c: pieces with scores and a space that is a space.

The rules are those of llama2.c's own encoder: one space before a text, characters that are no piece as bytes, and the
best-scoring neighbours joined. It has no U+2581, so one that is spelt in a text stays bytes. `recognise.py` calls it.
"""

import math
import struct

from tokenizers import models

from kllama.checkpoints.files.reader import shown
from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.formats.merges import scored_merges
from kllama.text.formats.opened import MAX_VOCABULARY_SIZE, OpenedVocabulary
from kllama.text.formats.options import with_options
from kllama.text.formats.rules import build_encoder, rust_errors, sequence, start_template, strip_start
from kllama.text.formats.splits import word_splits

UNKNOWN, START, END = "<unk>", "<s>", "</s>"
# The file has line breaks around two of the names, for the eyes of who reads the output.
_STORED_NAMES = {1: "\n<s>\n", 2: "\n</s>\n"}
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<fi")


def is_llama2c(data: bytes) -> bool:
    """Tell whether the header and the first entry can be those of a llama2.c tokenizer."""
    if len(data) < _HEADER.size + _ENTRY.size:
        return False
    (longest,) = _HEADER.unpack_from(data)
    score, length = _ENTRY.unpack_from(data, _HEADER.size)
    return 0 < longest < 2**16 and math.isfinite(score) and 0 < length <= longest


def open_llama2c(
    data: bytes, source: object, legacy: bool | None = None, add_prefix_space: bool | None = None
) -> OpenedVocabulary:
    """Return the vocabulary of a llama2.c tokenizer.

    Args:
        data: the bytes of the file.
        source: its name, for messages.
        legacy: `None` and `True` put a space before every stretch between special tokens; see `options.py`.
        add_prefix_space: `None` and `True` put one there, `False` does not.

    Raises:
        CheckpointError: a damaged file.
        UnsupportedError: scores that do not settle which pieces are formed.
    """
    scores = _read_pieces(data, source)
    names = list(scores)
    _check_names(names, source)
    merges = scored_merges(scores, source)
    for token_id, stored in _STORED_NAMES.items():
        if any(stored == left + right or stored in (left, right) for left, right in merges):
            raise UnsupportedError(f"{source}: token {token_id} = {shown(stored)}; expected one that no text spells.")
        names[token_id] = stored.strip()
    model = {"vocab": {name: token_id for token_id, name in enumerate(names)}, "merges": merges}
    rules = {
        "normalizer": {"type": "Prepend", "prepend": " "},
        "pre_tokenizer": sequence(word_splits(" ", scores, byte_fallback=True), "pretokenizers"),
        "decoder": sequence([{"type": "ByteFallback"}, {"type": "Fuse"}, strip_start()], "decoders"),
        "post_processor": start_template(START, 1),
    }
    rules = with_options(rules, legacy, add_prefix_space, source)
    with rust_errors(f"{source}: the pieces do not make a vocabulary"):
        bpe = models.BPE(**model, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
        encoder = build_encoder(bpe, rules, [UNKNOWN, START, END])
    return OpenedVocabulary(encoder, START, END, True)


def _read_pieces(data: bytes, source: object) -> dict[str, float]:
    """Return the scores by piece, in the order of the ids; the file does not say how many there are."""
    if len(data) < _HEADER.size:
        raise CheckpointError(f"{source}: size = {len(data)} bytes; expected a llama2.c tokenizer. Download it again.")
    (longest,) = _HEADER.unpack_from(data)
    scores, at = {}, _HEADER.size
    while at < len(data):
        place = f"{source}: token {len(scores)}"
        if len(data) - at < _ENTRY.size:
            raise CheckpointError(f"{place}: {len(data) - at} bytes left; expected {_ENTRY.size}. Download it again.")
        score, length = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        if not 0 < length <= min(longest, len(data) - at):
            raise CheckpointError(
                f"{place}: length = {length}; expected 1 to {longest}, the length of the longest token, and no more "
                f"than the {len(data) - at} bytes left."
            )
        piece = _piece(data[at : at + length], place)
        if piece in scores or not math.isfinite(score):
            raise CheckpointError(f"{place}: {shown(piece)}, {score}; expected a text of its own and a finite score.")
        if len(scores) == MAX_VOCABULARY_SIZE:
            raise CheckpointError(f"{source}: more than {MAX_VOCABULARY_SIZE} tokens; expected at most that.")
        scores[piece] = score
        at += length
    return scores


def _piece(stored: bytes, place: str) -> str:
    try:
        return stored.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{place}: byte 0x{stored[error.start]:02x}; expected UTF-8.") from error


def _check_names(names: list[str], source: object) -> None:
    """Check the tokens that llama2.c knows by their ids: unknown, start, end, and a token for each byte."""
    expected = [UNKNOWN, *_STORED_NAMES.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    for token_id, name in enumerate(expected):
        received = names[token_id] if token_id < len(names) else None
        if received != name:
            raise CheckpointError(f"{source}: token {token_id} = {shown(received)}; expected {shown(name)}.")
    if " " not in names:
        raise CheckpointError(f"{source}: no token is one space; expected one, which begins every text.")
    for name in (START, END):
        if name in names:
            raise CheckpointError(f"{source}: token {names.index(name)} = {shown(name)}; expected no such token.")
