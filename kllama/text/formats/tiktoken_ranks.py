"""Read the tiktoken `tokenizer.model` of Llama 3: byte strings in base64, each with its rank.

Such a file holds neither the pattern that splits a text nor the special tokens, so only the vocabulary that is known to
go with Llama 3's is taken. `recognise.py` calls it.
"""

import base64
import binascii
import re

from tokenizers import models

from kllama.checkpoints.files.reader import shown
from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.formats.merges import check_work, ranked_merges
from kllama.text.formats.opened import OpenedVocabulary
from kllama.text.formats.options import with_options
from kllama.text.formats.patterns import LLAMA3
from kllama.text.formats.rules import (
    build_encoder,
    byte_characters,
    byte_level,
    rust_errors,
    sequence,
    split,
    start_template,
)

NUM_RANKS = 128_000
NUM_SPECIAL_TOKENS = 256
START, END = "<|begin_of_text|>", "<|end_of_text|>"
# The names of Llama 3.1 and later, by their place behind the ranks. In Llama 3 places 4, 8 and 10 were still reserved;
# no id and no text but these names changes by it. The others are <|reserved_special_token_0|> and so on.
_NAMED = {
    0: START,
    1: END,
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (-?\d{1,18})")


def is_tiktoken(data: bytes) -> bool:
    """Tell whether the first line is a byte string in base64 and a number."""
    line = _LINE.fullmatch(data[:4096].split(b"\n", 1)[0].rstrip(b"\r"))
    return line is not None and len(line[1]) % 4 == 0


def open_tiktoken(
    data: bytes, source: object, legacy: bool | None = None, add_prefix_space: bool | None = None
) -> OpenedVocabulary:
    """Return the vocabulary of Llama 3's tiktoken file, with the special tokens of Llama 3.1 and later.

    Args:
        data: the bytes of the file.
        source: its name, for messages.
        legacy: must be `None`; see `options.py`.
        add_prefix_space: must not be `True`.

    Raises:
        CheckpointError: a damaged file; the message has the line.
        UnsupportedError: the ranks of another model than Llama 3.
    """
    ranks = _read_ranks(data, source)
    if len(ranks) != NUM_RANKS:
        raise UnsupportedError(
            f"{source}: number of ranks = {len(ranks)}; expected {NUM_RANKS}, those of Llama 3. The file does not say "
            "how other models split a text: use their tokenizer.json."
        )
    characters = byte_characters()
    vocabulary = {"".join(map(characters.__getitem__, token)): rank for token, rank in ranks.items()}
    check_work(vocabulary, source)
    rules = {
        "normalizer": None,
        "pre_tokenizer": sequence([split(LLAMA3), byte_level()], "pretokenizers"),
        "decoder": byte_level(),
        "post_processor": sequence([byte_level(trim_offsets=False), start_template(START, NUM_RANKS)], "processors"),
    }
    rules = with_options(rules, legacy, add_prefix_space, source)
    with rust_errors(f"{source}: the ranks do not make a vocabulary"):
        model = models.BPE(vocab=vocabulary, merges=ranked_merges(vocabulary), ignore_merges=True)
        encoder = build_encoder(model, rules, special_tokens())
    return OpenedVocabulary(encoder, START, END, True)


def special_tokens() -> list[str]:
    """Return the names of the special tokens of Llama 3.1 and later, in the order of their ids."""
    names, reserved = [], 0
    for place in range(NUM_SPECIAL_TOKENS):
        names.append(_NAMED.get(place, f"<|reserved_special_token_{reserved}|>"))
        reserved += place not in _NAMED
    return names


def _read_ranks(data: bytes, source: object) -> dict[bytes, int]:
    """Return the ranks by byte string, which are the numbers of the lines."""
    ranks = {}
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, start=1):
        token, rank = _read_line(line.rstrip(b"\r"), f"{source}: line {number}")
        if rank != number - 1:
            raise CheckpointError(f"{source}: line {number}: rank = {rank}; expected {number - 1}.")
        if token in ranks:
            raise CheckpointError(f"{source}: line {number}: the token of line {ranks[token] + 1} once more.")
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(f"{source}: no token for {len(missing)} bytes, such as 0x{missing[0]:02x}; expected all.")
    return ranks


def _read_line(line: bytes, place: str) -> tuple[bytes, int]:
    parts = _LINE.fullmatch(line)
    if parts is None:
        received = shown(line[:60].decode("utf-8", "replace"))
        raise CheckpointError(f"{place}: {received}; expected a token in base64 and its rank.")
    try:
        return base64.b64decode(parts[1], validate=True), int(parts[2])
    except binascii.Error as error:
        raise CheckpointError(f"{place}: {shown(parts[1][:60].decode())}: {error}; expected base64.") from error
