"""Read the vocabulary of a GGUF file: SentencePiece by scores (`llama`), or byte-level by merges (`gpt2`).

The ids are those of the lists in the file, and the rules those of llama.cpp and of the tokenizers that such files are
converted from: control tokens are special, user-defined ones are cut out of every text, and what follows either is a
new stretch of text. `recognise.py` calls it.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import models

from kllama.checkpoints.files.reader import shown
from kllama.checkpoints.gguf.file import GgufFile
from kllama.checkpoints.gguf.tokenizer import (
    ADD_START,
    BYTE_LEVEL,
    KINDS,
    MERGES,
    MODEL,
    SCORES,
    SENTENCEPIECE,
    TOKENS,
    checked_tokens,
    flag,
    token_id,
)
from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.formats.added_tokens import added_token, check_added_id
from kllama.text.formats.gguf_pre_tokenizers import PRE_TOKENIZERS
from kllama.text.formats.merges import check_work, scored_merges
from kllama.text.formats.opened import MAX_VOCABULARY_SIZE, OpenedVocabulary
from kllama.text.formats.options import with_options
from kllama.text.formats.rules import (
    MARK,
    build_encoder,
    byte_level,
    replace,
    rust_errors,
    sequence,
    start_template,
    strip_start,
)
from kllama.text.formats.splits import word_splits

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_PRE, _SPACE_PREFIX = "tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix"
_REFUSED = ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap")
# Where a SentencePiece file names no start and no end, llama.cpp takes those of Llama 2.
_DEFAULT_IDS = {"bos": 1, "eos": 2}


def open_gguf_vocabulary(
    path: Path, legacy: bool | None = None, add_prefix_space: bool | None = None
) -> OpenedVocabulary:
    """Return the vocabulary of a GGUF file; its weights are not read, and of any architecture.

    Args:
        path: the file, or the first part of a split one.
        legacy: `None` and `True` put the mark of a word start before every stretch between special tokens; see
            `options.py`.
        add_prefix_space: `None` is what the file says.

    Raises:
        CheckpointError: a damaged file, or one without a vocabulary.
        UnsupportedError: a vocabulary of another kind, or a pre-tokenizer that is not known.
    """
    metadata = GgufFile(path).metadata
    kind = metadata.get(MODEL)
    if kind is None or TOKENS not in metadata:
        raise CheckpointError(f"{path}: no {MODEL if kind is None else TOKENS}; expected a file with a tokenizer.")
    if not isinstance(kind, str) or kind not in (SENTENCEPIECE, BYTE_LEVEL):
        raise UnsupportedError(f'{path}: {MODEL} = {shown(str(kind))}; expected "{SENTENCEPIECE}" or "{BYTE_LEVEL}".')
    for key in _REFUSED:
        if metadata.get(key) is not None and metadata[key] is not False:
            raise UnsupportedError(f"{path}: {key}; expected no such rule. Use the tokenizer.json instead.")
    kinds = _kinds(metadata, path)
    open_kind = _open_sentencepiece if kind == SENTENCEPIECE else _open_byte_level
    return open_kind(metadata, kinds, path, legacy, add_prefix_space)


def _kinds(metadata: Mapping, path: Path) -> dict[str, int]:
    """Return the kind of each token, in the order of the ids."""
    tokens = checked_tokens(metadata, path)
    if len(tokens) > MAX_VOCABULARY_SIZE:
        raise CheckpointError(f"{path}: number of tokens = {len(tokens)}; expected at most {MAX_VOCABULARY_SIZE}.")
    if metadata.get(KINDS) is None:
        raise CheckpointError(f"{path}: no {KINDS}; expected the kind of each token.")
    kinds = dict(zip(tokens, metadata[KINDS].tolist(), strict=True))
    if len(kinds) != len(tokens) or "" in kinds:
        seen = {""}
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise CheckpointError(f"{path}: token {shown(twice)}; expected texts that are not empty and stand once.")
    for token, kind in kinds.items():
        if not NORMAL <= kind <= BYTE:
            raise CheckpointError(f"{path}: {KINDS} of {shown(token)} = {kind}; expected {NORMAL} to {BYTE}.")
    check_work(tokens, path)
    return kinds


def _open_sentencepiece(
    metadata: Mapping, kinds: Mapping[str, int], path: Path, legacy: bool | None, add_prefix_space: bool | None
) -> OpenedVocabulary:
    pre = metadata.get(_PRE, "default")
    if not isinstance(pre, str) or pre != "default":
        raise UnsupportedError(f"{path}: {_PRE} = {shown(str(pre))}; expected none with {MODEL} = llama.")
    scores = _scores(metadata, kinds, path)
    has_bytes = _has_bytes(kinds, path)
    _check_pieces(kinds, scores, path)
    ids = {token: place for place, token in enumerate(kinds)}
    unknown = next((token for token, kind in kinds.items() if kind == UNKNOWN), None)
    start, end = (_named(metadata, name, kinds, path) for name in ("bos", "eos"))
    adds_start = flag(metadata, ADD_START, path) is not False and start is not None
    has_prefix = flag(metadata, _SPACE_PREFIX, path) is not False
    prepend = [{"type": "Prepend", "prepend": MARK}] if has_prefix else []
    spaces = replace({"String": MARK}, " ")
    rules = {
        "normalizer": sequence([*prepend, replace({"String": " "}, MARK)], "normalizers"),
        "pre_tokenizer": sequence(word_splits(MARK, scores, has_bytes), "pretokenizers"),
        "decoder": sequence(
            [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip_start()] if has_prefix else [])], "decoders"
        ),
        "post_processor": start_template(start, ids[start]) if adds_start else None,
    }
    rules = with_options(rules, legacy, add_prefix_space, path)
    settings = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": has_bytes}
    merges = scored_merges(scores, path)
    with rust_errors(f"{path}: the tokens do not make a vocabulary"):
        encoder = build_encoder(models.BPE(vocab=ids, merges=merges, **settings), rules, ())
    _add_tokens(encoder, kinds, path)
    return OpenedVocabulary(encoder, start, end, adds_start)


def _open_byte_level(
    metadata: Mapping, kinds: Mapping[str, int], path: Path, legacy: bool | None, add_prefix_space: bool | None
) -> OpenedVocabulary:
    name = metadata.get(_PRE)
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{path}: {_PRE} = {shown(None if name is None else str(name))}; expected one of "
            f"{', '.join(PRE_TOKENIZERS)}. How others split a text is not known for sure: use the tokenizer.json."
        )
    if flag(metadata, _SPACE_PREFIX, path):
        raise UnsupportedError(f"{path}: {_SPACE_PREFIX} = true with {MODEL} = gpt2; expected false.")
    known = PRE_TOKENIZERS[name]
    start, end = (_named(metadata, name, kinds, path) for name in ("bos", "eos"))
    given = flag(metadata, ADD_START, path)
    adds_start = known.adds_start_token if given is None else given
    if adds_start and start is None:
        raise CheckpointError(f"{path}: texts begin with a start token; expected tokenizer.ggml.bos_token_id.")
    ids = _model_ids(kinds)
    processors = [byte_level(trim_offsets=False)]
    if adds_start:
        processors.append(start_template(start, list(kinds).index(start)))
    rules = {
        "normalizer": known.normalizer,
        "pre_tokenizer": known.pre_tokenizer,
        "decoder": byte_level(),
        "post_processor": sequence(processors, "processors"),
    }
    rules = with_options(rules, legacy, add_prefix_space, path)
    merges = _merges(metadata, ids, path)
    with rust_errors(f"{path}: the tokens and merges do not make a vocabulary"):
        model = models.BPE(vocab=ids, merges=merges, ignore_merges=known.ignore_merges)
        encoder = build_encoder(model, rules, ())
    _add_tokens(encoder, kinds, path)
    return OpenedVocabulary(encoder, start, end, adds_start)


def _scores(metadata: Mapping, kinds: Mapping[str, int], path: Path) -> dict[str, float]:
    """Return the scores of the tokens that merges can form."""
    if metadata.get(SCORES) is None:
        raise CheckpointError(f"{path}: no {SCORES}; expected the score of each token.")
    scores = dict(zip(kinds, metadata[SCORES].tolist(), strict=True))
    for token, score in scores.items():
        if not math.isfinite(score):
            raise CheckpointError(f"{path}: score of {shown(token)} = {score}; expected a finite number.")
    return {token: score for token, score in scores.items() if kinds[token] == NORMAL}


def _has_bytes(kinds: Mapping[str, int], path: Path) -> bool:
    """Return whether there is a token for each byte; some of them alone are an error."""
    found = {token for token, kind in kinds.items() if kind == BYTE}
    wrong = found ^ {f"<0x{byte:02X}>" for byte in range(256)}
    if found and wrong:
        raise CheckpointError(
            f"{path}: tokens of bytes = {len(found)}, {shown(min(wrong))} being wrong or missing; expected 256 or none."
        )
    return bool(found)


def _check_pieces(kinds: Mapping[str, int], scores: Mapping[str, float], path: Path) -> None:
    """Refuse tokens that the list of merges would form, or not form, where the scores say otherwise."""
    for token in scores:
        if unknown := [character for character in token if character not in scores]:
            raise UnsupportedError(
                f"{path}: token {shown(token)} has {shown(unknown[0])}; expected characters that are tokens."
            )
    unused = {token for token, kind in kinds.items() if kind == UNUSED}
    pieces = scores.keys() | unused
    for token in unused:
        if any(token[:end] in pieces and token[end:] in pieces for end in range(1, len(token))):
            raise UnsupportedError(f"{path}: the unused token {shown(token)} can be formed; expected one that cannot.")
    for token, kind in kinds.items():
        if len(token) == 1 and kind not in (NORMAL, USER_DEFINED):
            raise UnsupportedError(f"{path}: {KINDS} of {shown(token)} = {kind}; expected a character to be text.")


def _named(metadata: Mapping, name: str, kinds: Mapping[str, int], path: Path) -> str | None:
    """Return the token that begins or ends a text."""
    tokens = metadata[TOKENS]
    named = token_id(metadata, name, path)
    if named is not None:
        return tokens[named]
    default = _DEFAULT_IDS[name]
    is_default = metadata[MODEL] == SENTENCEPIECE and default < len(tokens) and kinds[tokens[default]] == CONTROL
    return tokens[default] if is_default else None


def _model_ids(kinds: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of the tokens of the model; added tokens at the end are none of it, as in a `tokenizer.json`.

    A vocabulary that takes whole stretches for tokens would else find a control token that is spelt in a text.
    """
    last = max((place for place, kind in enumerate(kinds.values()) if not _is_added(kind)), default=-1)
    return {token: place for place, token in enumerate(kinds) if place <= last}


def _merges(metadata: Mapping, ids: Mapping[str, int], path: Path) -> list[tuple[str, str]]:
    if MERGES not in metadata:
        raise CheckpointError(f"{path}: no {MERGES}; expected those of a byte-level vocabulary.")
    pairs = {}
    for place, merge in enumerate(metadata[MERGES]):
        pair = tuple(merge.split(" "))
        if len(pair) != 2 or any(token not in ids for token in (*pair, "".join(pair))):
            raise CheckpointError(f"{path}: merge {place} = {shown(merge)}; expected two tokens that make a third.")
        if pairs.setdefault(pair, place) != place:
            raise CheckpointError(f"{path}: merge {place} = {shown(merge)}; expected another than {pairs[pair]} is.")
    return list(pairs)


def _add_tokens(encoder: tokenizers.Tokenizer, kinds: Mapping[str, int], path: Path) -> None:
    """Add the tokens that are found in a text before it is split: special ones, and user-defined ones."""
    added = {
        token: added_token({"content": token, "special": kind != USER_DEFINED, "normalized": False})
        for token, kind in kinds.items()
        if _is_added(kind)
    }
    with rust_errors(f"{path}: the special tokens cannot be added"):
        encoder.add_tokens(list(added.values()))
    for place, token in enumerate(kinds):
        if token in added:
            check_added_id(encoder, token, place, path)


def _is_added(kind: int) -> bool:
    return kind in (UNKNOWN, CONTROL, USER_DEFINED)
