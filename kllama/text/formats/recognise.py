"""Recognise the format of a vocabulary by its content, and open it with the reader of that format.

Names of files count only where several lie in one directory, for the order in which they are looked for.
`LlamaTokenizer` calls it.
"""

import os
import reprlib
from collections.abc import Mapping
from pathlib import Path

import tokenizers

from kllama.checkpoints.files.reader import check_file, read_bytes, read_json, read_text, shown
from kllama.checkpoints.gguf.header import starts_like_gguf
from kllama.errors import CheckpointError, MissingFileError
from kllama.text.formats.gguf_vocabulary import open_gguf_vocabulary
from kllama.text.formats.llama2c import is_llama2c, open_llama2c
from kllama.text.formats.opened import MAX_BYTES, OpenedVocabulary
from kllama.text.formats.sentencepiece_model import open_sentencepiece
from kllama.text.formats.tiktoken_ranks import is_tiktoken, open_tiktoken
from kllama.text.formats.tokenizer_json import open_json, open_parsed, parse_object
from kllama.text.formats.vocab_and_merges import VocabularyAndMerges, open_given, open_vocab_and_merges

VOCABULARIES = ("vocab.json", "vocabulary.json")
MERGES = "merges.txt"
# In this order: the first that is there is the one that is read.
LOOKED_FOR = ("tokenizer.json", "tokenizer.model", *VOCABULARIES, "vocabulary.spm", "tokenizer.bin")


def _is_sentencepiece(data: bytes) -> bool:
    return data[:1] == b"\n"  # the tag of the pieces, which come first


_READERS = ((is_tiktoken, open_tiktoken), (is_llama2c, open_llama2c), (_is_sentencepiece, open_sentencepiece))


def open_vocabulary(
    source: str | os.PathLike | bytes | Mapping | VocabularyAndMerges | tokenizers.Tokenizer,
    *,
    legacy: bool | None = None,
    add_prefix_space: bool | None = None,
) -> OpenedVocabulary:
    """Return the encoder of whatever describes one, and what its format says of start and end tokens.

    Args:
        source: path of a `tokenizer.json`, of a `tokenizer.model` of SentencePiece or tiktoken, of a `vocab.json` or
            the `merges.txt` beside it, of KerasHub's `vocabulary.json` or `vocabulary.spm`, of a llama2.c
            `tokenizer.bin`, of a GGUF model; path of a directory that holds one of these but the last; the text of a
            `tokenizer.json` (recognised by the opening brace), its parsed dict, or a `tokenizers.Tokenizer`, which is
            copied; the bytes of a `tokenizer.model` or `tokenizer.bin`; or a vocabulary with its merges, as KerasHub
            has them.
        legacy: `True` puts the mark of a word start before every stretch between special tokens, `False` before the
            text as a whole, `None` leaves that to the file; see `options.py`.
        add_prefix_space: whether there is such a mark, or a space, at all; `None` leaves that to the file.

    Raises:
        TypeError: `source` is something else, or an option is not a bool.
        ValueError: the file has no rule that an option could change.
        MissingFileError: there is no such file, or none of a vocabulary in the directory.
        CheckpointError: the file is damaged, or of none of these formats.
        UnsupportedError: it is sound, but kllama cannot run it exactly.
    """
    options = (legacy, add_prefix_space)
    if isinstance(source, tokenizers.Tokenizer | Mapping):
        return open_json(source, *options)
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return open_json(source, *options)
    if isinstance(source, VocabularyAndMerges):
        return open_given(source, *options)
    if isinstance(source, bytes):
        return _open_bytes(source, *options)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"tokenizer = {reprlib.repr(source)}; expected a path, JSON text, a dict or a tokenizers.Tokenizer, "
            f"received {type(source).__name__}."
        )
    path = os.fspath(source)
    if not os.path.exists(path):  # which is False, too, for what cannot be a path
        raise MissingFileError(f"{reprlib.repr(path)}: there is no such file; expected that of a vocabulary.", path)
    return _open_file(_in_directory(Path(path)) if os.path.isdir(path) else Path(path), *options)


def _in_directory(directory: Path) -> Path:
    for name in LOOKED_FOR:
        if (directory / name).exists():
            return directory / name
    raise MissingFileError(
        f"{directory}: no vocabulary; expected {', '.join(LOOKED_FOR[:-1])} or {LOOKED_FOR[-1]}.", str(directory)
    )


def _open_file(path: Path, *options: bool | None) -> OpenedVocabulary:
    if starts_like_gguf(path):
        return open_gguf_vocabulary(path, *options)
    data = read_bytes(path, MAX_BYTES)
    if data.lstrip()[:1] == b"{":
        return _open_object(path, *options)
    for is_format, open_format in _READERS:
        if is_format(data):
            return open_format(data, path, *options)
    if _is_merges(data):
        return _open_pair(_beside(path, VOCABULARIES), path, *options)
    raise CheckpointError(
        f"{path}: first bytes = {shown(data[:16].decode('latin-1'))}; expected a tokenizer.json, a SentencePiece or "
        "tiktoken model, a vocab.json with its merges.txt, a llama2.c tokenizer, or a GGUF model."
    )


def _open_bytes(data: bytes, *options: bool | None) -> OpenedVocabulary:
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"tokenizer: size = {len(data)} bytes; expected at most {MAX_BYTES}.")
    for is_format, open_format in _READERS:
        if is_format(data):
            return open_format(data, "tokenizer", *options)
    raise CheckpointError(
        f"tokenizer: first bytes = {shown(data[:16].decode('latin-1'))}; expected those of a SentencePiece or tiktoken "
        "model, or of a llama2.c tokenizer. Pass the path of any other file."
    )


def _open_object(path: Path, *options: bool | None) -> OpenedVocabulary:
    """Open a JSON object: a vocab.json has ids in it, a tokenizer.json has no number among its fields."""
    text = read_text(path, MAX_BYTES)
    content = parse_object(text, str(path))
    if not isinstance(content.get("model"), dict) and any(type(value) is int for value in content.values()):
        return _open_pair(path, _beside(path, (MERGES,)), *options)
    return open_parsed(text, content, *options, str(path))


def _open_pair(vocab: Path, merges: Path, *options: bool | None) -> OpenedVocabulary:
    # A vocabulary of bytes alone has no merges, and some write no header either.
    text = read_text(merges, MAX_BYTES) if check_file(merges) else ""
    return open_vocab_and_merges(read_json(vocab, MAX_BYTES), text, vocab, *options)


def _is_merges(data: bytes) -> bool:
    """Tell whether the first line is the header of a merges.txt, or two tokens with a space between."""
    line = data[:4096].split(b"\n", 1)[0].rstrip(b"\r")
    return line.startswith(b"#version") or (len(line.split(b" ")) == 2 and all(line.split(b" ")) and b"\0" not in line)


def _beside(path: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if path.with_name(name).exists():
            return path.with_name(name)
    raise MissingFileError(f"{path}: no {' or '.join(names)} beside it; expected one.", str(path.with_name(names[0])))
