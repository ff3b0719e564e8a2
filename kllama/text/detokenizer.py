"""The streaming detokenizer: ids to text, one id at a time, each piece of text as soon as nothing can change it.

The pieces joined are what the tokenizer's decoder makes of all the ids at once. Nothing is decoded twice: the decoder
is split into its steps, and each step holds back what a later id may still change. Ids are not chosen here, and texts
are not searched for stop words. `LlamaTokenizer.detokenize_stream` calls it.

What is held back depends on the step:

* ByteLevel: the first bytes of a character, until it is whole or can no longer become one.
* ByteFallback: a run of byte tokens, until a token of another kind ends it or the run can no longer become UTF-8. The
  run is judged as a whole: text if all of it is UTF-8, else one U+FFFD for each byte.
* Replace, Metaspace, and Strip on a single token: nothing.
* Fuse, with a Strip of leading characters after it: nothing but these characters.

A decoder with any other step (CTC, WordPiece, ...) gives its text at the end.
"""

import codecs
import functools
import json
import operator
import re
import reprlib
from collections.abc import Callable, Collection

import tokenizers

from kllama.text.formats.rules import byte_characters, decoder_parts

REPLACEMENT = "\ufffd"

# What the Rust library reads as a byte token: its number parser takes a sign, too.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


class StreamingDetokenizer:
    """Join token ids into text while they come in.

    All pieces joined are exactly `encoder.decode(ids, skip_special_tokens=...)`, literal tokens apart. A piece never
    ends in a part of a character. The work for an id does not grow with the number of ids before it.

    Args:
        encoder: the tokenizer whose decoder makes the text.
        skip_special_tokens: bool. Leave special tokens out of the text.
        literal_ids: ids of tokens that are text as they are spelt, whatever the decoder makes of them. The ids between
            two of them are decoded by themselves.

    Example:
    ```python
    detokenizer = StreamingDetokenizer(encoder)
    for token_id in ids:
        print(detokenizer.add(token_id), end="")
    print(detokenizer.finish())
    ```
    """

    def __init__(
        self,
        encoder: tokenizers.Tokenizer,
        *,
        skip_special_tokens: bool = False,
        literal_ids: Collection[int] = frozenset(),
    ):
        added = encoder.get_added_tokens_decoder().values() if skip_special_tokens else ()
        self._encoder = encoder
        self._skipped = {token.content for token in added if token.special}
        self._literal_ids = literal_ids
        self._spec = _decoder_spec(encoder)
        self._steps = _steps(self._spec)

    def add(self, token_id: int) -> str:
        """Take the next id, and return the text that has become final with it, often none.

        Raises:
            TypeError: the id is not an integer.
            ValueError: no token has the id.
        """
        token = self._token(token_id)
        if token in self._skipped:
            return ""
        if token_id in self._literal_ids:
            return self.finish() + token
        return "".join(_run(self._steps, [token]))

    def finish(self) -> str:
        """Return the rest of the text, and begin a new text."""
        tokens = []
        for step in self._steps:
            tokens = [*_run([step], tokens), *step.finish()]
        self._steps = _steps(self._spec)
        return "".join(tokens)

    def _token(self, token_id) -> str:
        if isinstance(token_id, bool):
            raise TypeError(f"id = {token_id!r}; expected an integer.")
        try:
            index = operator.index(token_id)
        except TypeError as error:
            raise TypeError(f"id = {reprlib.repr(token_id)}; expected an integer.") from error
        token = self._encoder.id_to_token(index) if 0 <= index < 2**32 else None
        if token is None:
            raise ValueError(f"id = {index}; expected the id of a token of the vocabulary.")
        return token


def _decoder_spec(encoder: tokenizers.Tokenizer) -> list[dict] | None:
    """Return the steps of the decoder as a tokenizer.json has them; `None` where the tokenizer has no decoder."""
    return None if encoder.decoder is None else decoder_parts(encoder)


def _steps(spec: list[dict] | None) -> list:
    """Return the steps that do on a stream of tokens what the decoder does on a list of them.

    A step has `add`, which takes a token and gives the list of tokens that are final with it, and `finish`, which
    gives the rest. After a step that fuses, what flows is no longer tokens but pieces of a single one.
    """
    if spec is None:
        return [_Separate()]
    steps, fused = [], False
    for part in spec:
        step = _FUSED_STEPS.get(part["type"]) if fused else _TOKEN_STEPS.get(part["type"])
        if step is None or (fused and part.get("stop")):
            return [_Whole(spec)]
        steps.append(step(part))
        fused = fused or part["type"] in ("ByteLevel", "Fuse")
    return steps


def _run(steps: list, tokens: list[str]) -> list[str]:
    for step in steps:
        tokens = [final for token in tokens for final in step.add(token)]
    return tokens


class _Step:
    """A step that holds nothing back, and changes nothing."""

    def __init__(self, spec: dict | None = None):
        pass

    def add(self, token: str) -> list[str]:
        return [token]

    def finish(self) -> list[str]:
        return []


class _Separate(_Step):
    """No decoder: the tokens with a space between them."""

    def __init__(self):
        self._separator = ""

    def add(self, token):
        separator, self._separator = self._separator, " "
        return [separator + token]


class _Single(_Step):
    """A step of the Rust library that looks at one token, and at whether it is the first."""

    def __init__(self, spec):
        self._decode = _rust_decoder([spec])
        self._before = []

    def add(self, token):
        text = self._decode([*self._before, token])
        self._before = [""]  # From now on no token is the first.
        return [text]


class _Whole(_Step):
    """A decoder of which it is not known when its text is final: all of it at the end."""

    def __init__(self, spec):
        self._decode = _rust_decoder(spec)
        self._tokens = []

    def add(self, token):
        self._tokens.append(token)
        return []

    def finish(self):
        return [self._decode(self._tokens)]


class _ByteLevel(_Step):
    """Characters that stand for bytes become the bytes; a token with any other character is text already."""

    def __init__(self, spec):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token):
        table = _byte_table()
        try:
            content = bytes([table[character] for character in token])
        except KeyError:
            content = token.encode()
        return [self._decoder.decode(content)]

    def finish(self):
        return [self._decoder.decode(b"", True)]


class _ByteFallback(_Step):
    """Tokens such as <0xE2> become bytes, a run of them judged as a whole."""

    def __init__(self, spec):
        self._begin()

    def _begin(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._characters = []
        self._num_bytes = 0
        self._is_broken = False

    def add(self, token):
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is None:
            return [*self.finish(), token]
        self._num_bytes += 1
        return self._take(bytes([int(byte[1], 16)]))

    def finish(self):
        if not self._num_bytes:
            return []
        rest = self._take(b"", final=True)
        if not self._is_broken:
            rest = ["".join(self._characters)]
        self._begin()
        return rest

    def _take(self, content, final=False):
        if self._is_broken:
            return [REPLACEMENT] * len(content)
        try:
            self._characters.append(self._decoder.decode(content, final))
        except UnicodeDecodeError:
            self._is_broken = True
            return [REPLACEMENT] * self._num_bytes
        return []


class _StripStart(_Step):
    """At most `start` times the character `content`, taken from the start of a single token that comes in pieces."""

    def __init__(self, spec):
        self._character, self._num_left = spec["content"], spec["start"]

    def add(self, token):
        while self._num_left and token.startswith(self._character):
            token = token[1:]
            self._num_left -= 1
        if token:
            self._num_left = 0
        return [token]


_TOKEN_STEPS = {
    "ByteFallback": _ByteFallback,
    "ByteLevel": _ByteLevel,
    "Fuse": _Step,
    "Metaspace": _Single,
    "Replace": _Single,
    "Strip": _Single,
}
_FUSED_STEPS = {"Fuse": _Step, "Strip": _StripStart}


def _rust_decoder(spec: list[dict]) -> Callable[[list[str]], str]:
    decoder = tokenizers.decoders.Sequence([])
    decoder.__setstate__(json.dumps({"type": "Sequence", "decoders": spec}).encode())
    return decoder.decode


@functools.cache
def _byte_table() -> dict[str, int]:
    return {character: byte for byte, character in byte_characters().items()}
