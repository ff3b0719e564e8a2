"""The text of a rendered conversation to token ids, its special tokens told apart from text that spells them.

The Rust library takes every spelling of a special token for the token, or none. So `ChatEncoder` encodes with a copy of
the tokenizer in which each special token has a second, private spelling, and gives it a text in which the template's
own special tokens are spelt so. All rules, of spaces around tokens as of the text between them, stay the library's,
except that each of these tokens is found: some rules would find one only behind a space, or between spaces.
"""

import bisect
import copy
from collections.abc import Callable

import tokenizers

from kllama.errors import CheckpointError
from kllama.text.chat.marks import EXACT_END, EXACT_START, TOKEN_END, TOKEN_START
from kllama.text.chat.template import RenderedChat, Spans
from kllama.text.formats.rules import rust_errors


class ChatEncoder:
    """Encode rendered conversations.

    Making one copies the vocabulary, which takes half a second for the 128 thousand tokens of Llama 3.

    Args:
        encoder: the tokenizer of the vocabulary. It is copied, and not changed.

    Raises:
        CheckpointError: the tokenizer cannot be copied.
    """

    def __init__(self, encoder: tokenizers.Tokenizer):
        with rust_errors("tokenizer: this vocabulary cannot be copied"):
            self._encoder = copy.deepcopy(encoder)
            self._encoder.no_truncation()
            self._encoder.no_padding()
            special = {
                token_id: token for token_id, token in encoder.get_added_tokens_decoder().items() if token.special
            }
            _use_up_holes(self._encoder, max(encoder.get_vocab().values(), default=0))
            # Not special, so that they are found while the spellings of special tokens are not.
            self._encoder.add_tokens([_alias(token) for token in special.values()])
            self._encoder.add_tokens([_exact_alias(token) for token in special.values()])
            self._encoder.encode_special_tokens = True
        self._ids = {
            self._encoder.token_to_id(spell(token.content)): token_id
            for spell in (_private, _exact)
            for token_id, token in special.items()
        }
        self.special_tokens: list[str] = [token.content for token in special.values()]

    def encode(self, chat: RenderedChat) -> tuple[list[int], list[bool] | None]:
        """Return the ids of a conversation, and which of them the assistant wrote.

        No start token is added to what the template wrote.

        Args:
            chat: a conversation rendered with the `special_tokens` of this encoder.

        Returns:
            The ids; and for each whether any of its characters is the assistant's, `None` where the spans of the
            assistant were not asked for.

        Raises:
            CheckpointError: the tokenizer's own rules fail on the text, or hide a special token in it.
        """
        spans = chat.special_spans
        encoding, found = self._encode(chat, [_private] * len(spans))
        if not all(found):
            encoding, found = self._encode(chat, [_private if is_found else _exact for is_found in found])
        if not all(found):
            start, stop = spans[found.index(False)]
            raise CheckpointError(
                f"tokenizer: its rules hide special token {chat.text[start:stop]!r} in the text of the conversation; "
                "expected it to be found. Give the token normalized = false."
            )
        ids = [self._ids.get(token_id, token_id) for token_id in encoding.ids]
        if chat.assistant_spans is None:
            return ids, None
        return ids, _mask(encoding.offsets, _moved(chat.assistant_spans, spans))

    def _encode(self, chat: RenderedChat, spellings: list[Callable]) -> tuple[tokenizers.Encoding, list[bool]]:
        """Encode the text with its special tokens spelt privately; return also which of them became tokens."""
        with rust_errors("tokenizer: the rules of this tokenizer fail on the conversation"):
            encoding = self._encoder.encode(_spell_privately(chat, spellings), add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        made = [offset for token_id, offset in pairs if token_id in self._ids]
        found = _mask(_moved(chat.special_spans, chat.special_spans), made)
        if len(made) != sum(found):
            raise CheckpointError("tokenizer: its rules take one special token of the conversation for several.")
        return encoding, found


def _use_up_holes(encoder: tokenizers.Tokenizer, last_id: int) -> None:
    """Add tokens that no text spells until the next one gets an id of its own.

    The library numbers by the count of tokens, which the ids of a vocabulary with holes run ahead of.
    """
    encoder.add_tokens([_private("0")])
    first_id = encoder.token_to_id(_private("0"))
    encoder.add_tokens([_private(str(number)) for number in range(1, last_id - first_id + 1)])


def _alias(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        _private(token.content),
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=False,
    )


def _exact_alias(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    """Return an alias that is found before any rule of the text, whatever stands around it."""
    return tokenizers.AddedToken(
        _exact(token.content), lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=False
    )


def _private(spelling: str) -> str:
    return f"{TOKEN_START}{spelling}{TOKEN_END}"


def _exact(spelling: str) -> str:
    return f"{EXACT_START}{spelling}{EXACT_END}"


def _spell_privately(chat: RenderedChat, spellings: list[Callable]) -> str:
    """Return the text with its special tokens spelt privately, each in its own way."""
    pieces, end = [], 0
    for (start, stop), spell in zip(chat.special_spans, spellings, strict=True):
        pieces += [chat.text[end:start], spell(chat.text[start:stop])]
        end = stop
    return "".join([*pieces, chat.text[end:]])


def _moved(spans: Spans, special_spans: Spans) -> Spans:
    """Return where spans of a text are when its special tokens are spelt privately."""
    starts = [start for start, _ in special_spans]
    stops = [stop for _, stop in special_spans]

    def moved(place):
        # One character more for each token that begins before a place, one more for each that has ended by then.
        return place + bisect.bisect_left(starts, place) + bisect.bisect_right(stops, place)

    return [(moved(start), moved(stop)) for start, stop in spans]


def _mask(offsets: Spans, spans: Spans) -> list[bool]:
    """Return for each token whether it has a character within a span; both lists ascend."""
    mask, index = [], 0
    for start, stop in offsets:
        while index < len(spans) and spans[index][1] <= start:
            index += 1
        mask.append(index < len(spans) and stop > spans[index][0])
    return mask
