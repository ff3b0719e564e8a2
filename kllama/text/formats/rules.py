"""Put an encoder together from a model and its rules, written as in a `tokenizer.json`.

The readers state their rules as JSON, so that one function (`options.py`) can change those of any format, and what is
written to a `tokenizer.json` is what was run.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import models

from kllama.errors import CheckpointError

MARK = "\u2581"  # what SentencePiece writes for a space
PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]


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


def build_encoder(model: models.BPE, rules: dict, special: Iterable[str]) -> tokenizers.Tokenizer:
    """Return an encoder.

    Args:
        model: vocabulary and merges.
        rules: JSON of the `PARTS`; one that is missing or `None` does nothing.
        special: the special tokens, in the order of their ids where they are not in the vocabulary yet.
    """
    encoder = tokenizers.Tokenizer(model)
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    parts = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "model": empty, **rules}))
    for name in PARTS:
        if rules.get(name) is not None:
            setattr(encoder, name, getattr(parts, name))
    encoder.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    return encoder


def read_rules(encoder: tokenizers.Tokenizer) -> dict:
    """Return the rules of an encoder as JSON, in the library's own spelling whatever the file's was."""
    parts = {name: getattr(encoder, name) for name in PARTS}
    return {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}


def decoder_parts(encoder: tokenizers.Tokenizer) -> list[dict]:
    """Return the steps of an encoder's decoder as JSON, none where it has no decoder."""
    decoder = encoder.decoder
    return [] if decoder is None else flat(json.loads(decoder.__getstate__()), "decoders")


def sequence(parts: list[dict], kind: str) -> dict | None:
    """Join rules of one kind, `"normalizers"`, `"pretokenizers"`, `"decoders"` or `"processors"`, into one."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return {"type": "Sequence", kind: parts}


def flat(rule: dict | None, kind: str) -> list[dict]:
    """Return the parts of a rule, those of nested sequences too."""
    if rule is None:
        return []
    if rule["type"] != "Sequence":
        return [rule]
    return [part for inner in rule[kind] for part in flat(inner, kind)]


def split(pattern: str, behavior: str = "Isolated") -> dict:
    """Return the pre-tokenizer that splits at the matches of a regular expression."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def replace(pattern: dict, content: str) -> dict:
    """Return the normalizer, and the decoder, that replaces `{"String": ...}` or `{"Regex": ...}`."""
    return {"type": "Replace", "pattern": pattern, "content": content}


def strip_start(count: int = 1) -> dict:
    """Return the decoder that takes spaces away at the start of a text, at most so many."""
    return {"type": "Strip", "content": " ", "start": count, "stop": 0}


def byte_level(add_prefix_space: bool = False, use_regex: bool = False, trim_offsets: bool = True) -> dict:
    """Return the rule that writes bytes as characters; it is a pre-tokenizer, a decoder and a post-processor."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    }


def start_template(token: str, token_id: int) -> dict:
    """Return the post-processor that puts one token before each text."""
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, {"SpecialToken": {"id": token, "type_id": 1}}, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def byte_characters() -> dict[int, str]:
    """Return the printable character that stands for each byte in a byte-level vocabulary (that of GPT-2)."""
    others = [byte for byte in range(256) if byte not in _BYTES]
    return {byte: chr(byte) for byte in _BYTES} | {byte: chr(256 + place) for place, byte in enumerate(others)}
