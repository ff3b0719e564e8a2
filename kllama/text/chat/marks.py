"""Private marks in the text of a chat: what keeps a special token that a user spells from becoming the token.

Before a template renders, `Marker` puts a mark into every spelling of a special token that stands in a user's string,
and at the edges where a string could complete one together with its neighbour. After rendering, a spelling without a
mark can only be the template's own; `split_marks` finds those, and takes the marks out.

The marks are Unicode noncharacters, U+FDD0 and on, which Unicode reserves for such use inside a program. Those that
stand in a caller's text become U+FFFD first. This module knows no templates and no tokenizers.
"""

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.inputs import without_surrogates

BREAK = "\ufdd0"  # inside a spelling of a special token that is only text
CUT = "\ufdd1"  # where the final message ends that the model is to continue
SPAN_START = "\ufdd2"  # around what {% generation %} encloses
SPAN_END = "\ufdd3"
TOKEN_START = "\ufdd4"  # around a special token that the template wrote, in the text for the tokenizer
TOKEN_END = "\ufdd5"
EXACT_START = "\ufdd6"  # the same, for one that the rules of the tokenizer would not find
EXACT_END = "\ufdd7"

# Of one special token and of all of them: every beginning and every end of each is kept.
MAX_LENGTH = 256
MAX_TOTAL_LENGTH = 2**20

_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
# In a literal the mark is an escape, behind an even number of backslashes: each backslash of the text is doubled.
_ESCAPED_MARK = re.compile(r"(?<!\\)((?:\\\\)*)\\u(fdd[0-3])")


def clean_text(text: str) -> str:
    """Return a text without lone surrogates and without noncharacters, both replaced by U+FFFD."""
    return _NONCHARACTERS.sub("\ufffd", without_surrogates(text))


def strip_marks(text: str) -> str:
    """Return a text without its marks."""
    return _NONCHARACTERS.sub("", text)


def unescape_marks(literal: str) -> str:
    """Put the marks back that `repr` or JSON has written as escapes."""
    return _ESCAPED_MARK.sub(lambda match: match[1] + chr(int(match[2], 16)), literal)


class Marker:
    """Put marks into the strings of users.

    Args:
        special_tokens: the spellings of the special tokens.

    Raises:
        CheckpointError: they are too long, one of them or all together, to be looked for.
        UnsupportedError: one of them begins or ends with white space.
    """

    def __init__(self, special_tokens: Iterable[str]):
        self.tokens = sorted(set(special_tokens) - {""}, key=len, reverse=True)
        _check_lengths(self.tokens)
        _check_ends(self.tokens)
        self._inner = _inner_pattern(self.tokens)
        self._own = re.compile("|".join(_own_pattern(token) for token in self.tokens)) if self.tokens else None
        self._heads = {token[:length] for token in self.tokens for length in range(1, len(token))}
        self._tails = {token[length:] for token in self.tokens for length in range(1, len(token))}
        # A backslash is in what JSON or repr writes of a string, and need not be in the string.
        self._escaped = _inner_pattern([token for token in self.tokens if "\\" in token])
        self._longest = len(self.tokens[0]) if self.tokens else 0

    def mark(self, text: str, edges: bool = True) -> str:
        """Return a text in which no special token can be spelt; nor, with `edges`, across the ends of it."""
        if not self.tokens:
            return text
        marked = self._inner.sub(_break, text)
        if not edges:
            return marked
        body = marked.strip()
        if not body:
            return marked
        start = marked.index(body[0])
        head = BREAK if any(body[:length] in self._tails for length in range(1, self._longest)) else ""
        tail = BREAK if any(body[-length:] in self._heads for length in range(1, self._longest)) else ""
        return marked[:start] + head + body + tail + marked[start + len(body) :]

    def restore(self, literal: str) -> str:
        """Put the marks back into what `repr` or JSON has written, also where it has just spelt a special token."""
        literal = unescape_marks(literal)
        return literal if self._escaped is None else self._escaped.sub(_break, literal)

    def own_tokens(self, text: str) -> list[tuple[int, int]]:
        """Return where a marked text spells special tokens without a mark."""
        return [match.span() for match in self._own.finditer(text)] if self.tokens else []


@functools.lru_cache(maxsize=16)
def marker_of(special_tokens: tuple[str, ...]) -> Marker:
    """Return the `Marker` of some special tokens; the same one for the same tokens."""
    return Marker(special_tokens)


def _check_lengths(tokens):
    if tokens and len(tokens[0]) > MAX_LENGTH:
        raise CheckpointError(
            f"tokenizer: special token {tokens[0][:40]!r}... has {len(tokens[0])} characters; expected at most "
            f"{MAX_LENGTH}."
        )
    if (total := sum(map(len, tokens))) > MAX_TOTAL_LENGTH:
        raise CheckpointError(
            f"tokenizer: {len(tokens)} special tokens have {total} characters; expected at most {MAX_TOTAL_LENGTH}."
        )


def _check_ends(tokens):
    """Refuse what white space at an end of a string could complete: a mark there would keep it from being stripped."""
    for token in tokens:
        if token != token.strip():
            raise UnsupportedError(
                f"tokenizer: special token {token!r} begins or ends with white space; expected none there, as a chat "
                "could not tell it from text. Take it out of the special tokens."
            )


class Unmarked(NamedTuple):
    """A text without its marks, and where in it they were."""

    text: str
    tokens: list[tuple[int, int]]  # special tokens that the template wrote
    spans: list[tuple[int, int]]  # what {% generation %} enclosed


def split_marks(text: str, marker: Marker) -> Unmarked:
    """Take the marks out of a rendered text.

    Raises:
        CheckpointError: the marks around a generation block do not stand in pairs.
    """
    tokens = marker.own_tokens(text)
    edges = iter(sorted({edge for span in tokens for edge in span}))
    moved, edge, removed, open_span, spans = {}, next(edges, None), 0, None, []
    for match in _NONCHARACTERS.finditer(text):
        while edge is not None and edge <= match.start():
            moved[edge] = edge - removed
            edge = next(edges, None)
        if match[0] == SPAN_START:
            if open_span is not None:
                raise CheckpointError(
                    "chat template: a {% generation %} block inside another; expected them one by one."
                )
            open_span = match.start() - removed
        elif match[0] == SPAN_END:
            if open_span is None:
                raise CheckpointError("chat template: a part of a {% generation %} block; expected whole blocks.")
            spans.append((open_span, match.start() - removed))
            open_span = None
        removed += 1
    while edge is not None:
        moved[edge] = edge - removed
        edge = next(edges, None)
    if open_span is not None:  # the text was cut inside the block
        spans.append((open_span, len(text) - removed))
    return Unmarked(strip_marks(text), [(moved[start], moved[end]) for start, end in tokens], spans)


def _inner_pattern(tokens):
    """A pattern of the first character of each spelling: there the mark goes, also where two spellings overlap."""
    rests = {}
    for token in tokens:
        rests.setdefault(token[0], []).append(re.escape(token[1:]))
    branches = (f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
    return re.compile("|".join(branches)) if tokens else None


def _own_pattern(token):
    # There is no inside of a single character: its mark stands behind it.
    return re.escape(token) if len(token) > 1 else f"{re.escape(token)}(?!{BREAK})"


def _break(match):
    return match[0] + BREAK
