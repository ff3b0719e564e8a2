"""Tokens that a file adds to a vocabulary: from their description to the library's own, and the check of their ids.

The readers call it, and `Vocabulary` for tokens that files beside the vocabulary list.
"""

import reprlib
from collections.abc import Mapping

import tokenizers

from kllama.errors import CheckpointError

FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


def added_token(description: Mapping) -> tokenizers.AddedToken:
    """Return the token that a file describes.

    Args:
        description: `{"content"}` and some of the `FLAGS`. A flag that is missing is false, but `"normalized"` is true
            for a token that is not special.

    Raises:
        KeyError: there is no content.
        TypeError: the content is not a str.
    """
    flags = {flag: bool(description[flag]) for flag in FLAGS if flag in description}
    return tokenizers.AddedToken(description["content"], **flags)


def check_added_id(encoder: tokenizers.Tokenizer, content: str, token_id: int, source: object) -> None:
    """Refuse an added token that has another id than its file says.

    The library numbers added tokens itself, and only logs a warning where the file says otherwise.

    Args:
        encoder: the tokenizer that has the token.
        content: its text.
        token_id: what the file says.
        source: the file, for the message.

    Raises:
        CheckpointError: the ids differ.
    """
    if (received := encoder.token_to_id(content)) != token_id:
        raise CheckpointError(
            f"{source}: id of the added token {reprlib.repr(content)} = {token_id}; expected {received}: the "
            "vocabulary's own, else the next free one."
        )
