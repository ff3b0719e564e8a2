"""What a reader of this folder returns: the encoder of a vocabulary, and what its file says of start and end.

The readers make it, `vocabulary.py` hands it to `LlamaTokenizer`.
"""

from typing import NamedTuple

import tokenizers

MAX_BYTES = 64 * 2**20
# Ids may have holes, and a vocabulary has an entry for each: a bound keeps one large id from filling the memory.
MAX_VOCABULARY_SIZE = 2**22


class OpenedVocabulary(NamedTuple):
    """An encoder, and the special tokens that the file it came from names.

    Attributes:
        encoder: the rules and the tokens, as the Rust library runs them.
        start_token: the token that begins a text, `None` if the format names none.
        end_token: the token that ends a text, `None` if the format names none.
        adds_start_token: whether the file's own rules put `start_token` before each text, `None` if they do not say.
    """

    encoder: tokenizers.Tokenizer
    start_token: str | None
    end_token: str | None
    adds_start_token: bool | None
