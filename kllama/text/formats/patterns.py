"""Decide whether the regular expressions of a tokenizer file may run on text.

The Rust library matches with backtracking, so one pattern can take time exponential in a short text. A pattern is
accepted if a known tokenizer uses it, or if its structure rules that out. `tokenizer_json.py` calls it.
"""

import re
import reprlib
from collections.abc import Iterator
from typing import NamedTuple

from kllama.errors import UnsupportedError

MAX_LENGTH = 1024
# Without a repetition the cost of a match is bounded by the pattern alone: a list of words may be longer.
MAX_LENGTH_WITHOUT_REPETITION = 16 * 1024
MAX_REPETITIONS = 3
MAX_WAYS = 4096
_MAX_COUNT = 16
_MAX_DEPTH = 16

GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Of Mistral Nemo and its successors.
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}{_GPT4O_REST}"

# The `pattern` fields of the tokenizer.json files that their makers publish.
KNOWN = frozenset(
    {
        GPT2,
        LLAMA3,
        QWEN2,
        # GPT-4 (cl100k), in the spelling of tiktoken and in the older one.
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
        # GPT-4o (o200k), also Llama 4.
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}|\p{{N}}{{1,3}}{_GPT4O_REST}",
        TEKKEN,
        # DeepSeek LLM and DeepSeek Coder, one pattern a Split.
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        r"[一-龥ࠀ-一가-퟿]+",
        r"\p{N}+",
        r"\p{N}",
        r"\p{N}{1,3}",
        # Falcon.
        r"[0-9][0-9][0-9]",
        # BLOOM.
        r" ?[^(\s|[.,!?…。，、।۔،])]+",
        # Runs of spaces, in the normalizers of converted SentencePiece models.
        r" {2,}",
    }
)

_SIMPLE_ESCAPES = set("sSdDwWhHnrtvfaebBAzZ")
_COUNT = re.compile(r"\{(\d{0,9})(,?)(\d{0,9})\}")
_GROUP = re.compile(r"\((?:\?(?::|=|!|<=|<!|>|[im]+:))?(?![?*])")


class _Shape(NamedTuple):
    """How much a part of a pattern leaves open: its unbounded repetitions, and the ways to take its choices."""

    repetitions: int
    ways: int


class _Refused(Exception):
    """Why a pattern is not accepted."""


def check_patterns(rules: object, source: object) -> None:
    """Refuse regular expressions that could run without end.

    Args:
        rules: the JSON of a normalizer, pre-tokenizer, decoder, or of several.
        source: the file, for the message.

    Raises:
        UnsupportedError: naming the pattern.
    """
    for pattern in _patterns(rules):
        if reason := refusal(pattern):
            raise UnsupportedError(
                f"{source}: pattern = {reprlib.repr(pattern)}; expected the pattern of a known tokenizer, or one that "
                f"cannot run without end. This one {reason}."
            )


def refusal(pattern: str) -> str | None:
    """Return why a pattern is not accepted, `None` if it is."""
    if pattern in KNOWN:
        return None
    if len(pattern) > MAX_LENGTH_WITHOUT_REPETITION:
        return f"has {len(pattern)} characters, more than {MAX_LENGTH_WITHOUT_REPETITION}"
    try:
        shape = _Parser(pattern).parse()
    except _Refused as error:
        return str(error)
    if shape.repetitions > MAX_REPETITIONS:
        return f"has more than {MAX_REPETITIONS} unbounded repetitions in a branch"
    if shape.ways > MAX_WAYS:
        return f"leaves more than {MAX_WAYS} choices open"
    if shape.repetitions and len(pattern) > MAX_LENGTH:
        return f"has {len(pattern)} characters, more than {MAX_LENGTH}"
    return None


def _patterns(rules: object) -> Iterator[str]:
    if isinstance(rules, dict):
        for key, value in rules.items():
            if key == "Regex" and isinstance(value, str):
                yield value
            else:
                yield from _patterns(value)
    elif isinstance(rules, list):
        for part in rules:
            yield from _patterns(part)


class _Parser:
    """Reads the part of Oniguruma's syntax that tokenizers use, and refuses the rest of it."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.at = 0

    def parse(self) -> _Shape:
        shape = self._alternatives(depth=0)
        if self.at < len(self.pattern):
            raise _Refused("has a parenthesis that was not opened")
        return shape

    def _alternatives(self, depth: int) -> _Shape:
        if depth > _MAX_DEPTH:
            raise _Refused(f"nests groups deeper than {_MAX_DEPTH}")
        branches = [self._branch(depth)]
        while self._take("|"):
            branches.append(self._branch(depth))
        return _Shape(max(branch.repetitions for branch in branches), sum(branch.ways for branch in branches))

    def _branch(self, depth: int) -> _Shape:
        repetitions, ways = 0, 1
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            part = self._repeated(self._atom(depth))
            repetitions += part.repetitions
            ways = min(ways * part.ways, MAX_WAYS + 1)
        return _Shape(repetitions, ways)

    def _atom(self, depth: int) -> _Shape:
        character = self.pattern[self.at]
        if character == "(":
            return self._group(depth)
        if character in "*+?{":
            raise _Refused(f"repeats nothing at character {self.at}, or repeats a repetition")
        if character == "[":
            self._character_class()
        elif character == "\\":
            self._escape()
        else:
            self.at += 1
        return _Shape(0, 1)

    def _group(self, depth: int) -> _Shape:
        opening = _GROUP.match(self.pattern, self.at)
        if opening is None:
            raise _Refused(f"has a group of a kind that is not read, at character {self.at}")
        self.at = opening.end()
        shape = self._alternatives(depth + 1)
        if not self._take(")"):
            raise _Refused("has a parenthesis that is not closed")
        return shape

    def _repeated(self, shape: _Shape) -> _Shape:
        least, most = self._quantifier()
        if least == most == 1:
            return shape
        if most is None or most > 1:
            if shape.repetitions or shape.ways > 1:
                raise _Refused("repeats a group that holds a repetition or a choice")
            return _Shape(1, 1) if most is None else _Shape(0, most - least + 1)
        return _Shape(shape.repetitions, shape.ways + 1)  # as often as not at all

    def _quantifier(self) -> tuple[int, int | None]:
        """Return the least and the greatest number of times that the last atom may stand; `None` is no bound."""
        if count := _COUNT.match(self.pattern, self.at):
            self.at = count.end()
            bounds = self._counts(*count.groups())
            self._take("?")
        elif sign := self._take(*"*+?"):
            bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
            self._take(*"?+")
        else:
            return 1, 1
        if self.pattern[self.at : self.at + 1] in ("*", "+", "?", "{"):
            raise _Refused("repeats a repetition")
        return bounds

    def _counts(self, least: str, comma: str, most: str) -> tuple[int, int | None]:
        if not least and not most:
            raise _Refused("has an empty count")
        low = int(least or 0)
        high = int(most) if most else None if comma else low
        if low > _MAX_COUNT or (high or 0) > _MAX_COUNT or (high is not None and high < low):
            raise _Refused(f"counts to more than {_MAX_COUNT}, or downward")
        return low, high

    def _character_class(self) -> None:
        depth = 0
        while self.at < len(self.pattern):
            character = self.pattern[self.at]
            if character == "\\":
                self._escape()
                continue
            self.at += 1
            if character == "[":
                depth += 1
                self._take("^")
                if self.pattern[self.at : self.at + 1] == "]":
                    raise _Refused("has an empty set of characters")
            elif character == "]":
                depth -= 1
                if depth == 0:
                    return
        raise _Refused("has a set of characters that is not closed")

    def _escape(self) -> None:
        character = self.pattern[self.at + 1 : self.at + 2]
        self.at += 2
        if character in ("p", "P", "x") and self._take("{"):
            end = self.pattern.find("}", self.at)
            if not 0 < end - self.at <= 40:
                raise _Refused("has a name of characters that is not closed")
            self.at = end + 1
        elif not character or (character.isalnum() and character not in _SIMPLE_ESCAPES):
            raise _Refused(f"has the escape \\{character}, such as a reference back")

    def _take(self, *characters: str) -> str | None:
        character = self.pattern[self.at : self.at + 1]
        if character and character in characters:
            self.at += 1
            return character
        return None
