"""Open a `tokenizer.json`: a bounded read, a strict parse, and ids that are the file's own.

Everything that can be wrong with the file is a `CheckpointError` here, so that the tokenizer can trust what it gets. It
encodes nothing itself. `LlamaTokenizer` calls it.
"""

import contextlib
import json
import os
import reprlib
from collections.abc import Iterator, Mapping

import tokenizers

from kllama.errors import CheckpointError, MissingFileError

MAX_BYTES = 64 * 2**20
# Ids may have holes, and a vocabulary has an entry for each: a bound keeps one large id from filling the memory.
MAX_VOCABULARY_SIZE = 2**22


def open_tokenizer(source: str | os.PathLike | Mapping | tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer of our own for whatever describes one.

    Args:
        source: path of a `tokenizer.json`, its text (recognised by the opening brace), its parsed dict, or a
            `tokenizers.Tokenizer`, which is copied.

    Raises:
        TypeError: `source` is something else.
        MissingFileError: there is no file at the path.
        CheckpointError: too large, not JSON, not a tokenizer, or its ids are not one to a token.
    """
    if isinstance(source, tokenizers.Tokenizer):
        with rust_errors("tokenizer: this tokenizers.Tokenizer cannot be written as JSON"):
            return _parse(source.to_str(), "tokenizer")
    if isinstance(source, Mapping):
        return _parse(_dump(source), "tokenizer")
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return _parse(source, "tokenizer")
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        return _parse(_read(path), path)
    raise TypeError(
        f"tokenizer = {reprlib.repr(source)}; expected a path, JSON text, a dict or a tokenizers.Tokenizer, "
        f"received {type(source).__name__}."
    )


@contextlib.contextmanager
def rust_errors(failure: str) -> Iterator[None]:
    """Turn whatever the Rust library raises into a `CheckpointError`.

    Arguments are checked before they get there, so a failure is the fault of the file. A panic derives from
    `BaseException`, and its class cannot be imported.

    Args:
        failure: the file and what could not be done; the library's message follows.
    """
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{failure}: {error}") from error


def _dump(content: Mapping) -> str:
    try:
        return json.dumps(content, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"tokenizer: {error}; expected the dict of a tokenizer.json.") from error


def _read(path: str) -> str:
    if not os.path.isfile(path):
        raise MissingFileError(f"{reprlib.repr(path)}: not a file; expected the path of a tokenizer.json.", path)
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: {error}; expected UTF-8 JSON.") from error


def _parse(text: str, source: str) -> tokenizers.Tokenizer:
    if len(text) > MAX_BYTES:
        raise CheckpointError(f"{source}: size = more than {MAX_BYTES} bytes; expected at most that.")
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: {error}; expected the JSON of a tokenizer.json.") from error
    with rust_errors(f"{source}: not a valid tokenizer.json"):
        encoder = tokenizers.Tokenizer.from_str(text)
        # Settings of a call that happen to be saved with the rules. Cutting text is not a rule.
        encoder.no_truncation()
        encoder.no_padding()
    _check_ids(encoder, content, source)
    _check_merges(content, source)
    return encoder


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    content = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} stands twice in one object")
        content[key] = value
    return content


def _check_ids(encoder: tokenizers.Tokenizer, content: dict, source: str) -> None:
    tokens = {}
    for token, token_id in encoder.get_vocab().items():
        if token_id >= MAX_VOCABULARY_SIZE:
            raise CheckpointError(f"{source}: id of {token!r} = {token_id}; expected less than {MAX_VOCABULARY_SIZE}.")
        if (other := tokens.setdefault(token_id, token)) != token:
            raise CheckpointError(f"{source}: id of {token!r} = {token_id}; expected an id other than {other!r} has.")
    if not tokens:
        raise CheckpointError(f"{source}: number of tokens = 0; expected at least 1.")
    for added in content.get("added_tokens") or ():
        # The library numbers added tokens itself, and only logs a warning where the file says otherwise.
        if (token_id := encoder.token_to_id(added["content"])) != added["id"]:
            raise CheckpointError(
                f"{source}: added_tokens: id of {added['content']!r} = {added['id']}; expected {token_id}: the id in "
                "model.vocab, else the next free one."
            )


def _check_merges(content: dict, source: str) -> None:
    seen = set()
    for merge in content["model"].get("merges") or ():
        pair = merge if isinstance(merge, str) else " ".join(merge)
        if pair in seen:
            raise CheckpointError(f"{source}: model.merges has {pair!r} twice; expected each pair once.")
        seen.add(pair)
