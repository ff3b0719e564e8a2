"""Finding the strings that end a text, while the text comes in pieces.

An automaton reads one character after another, so the work for a piece grows neither with the text before it nor with
the number of strings, and where the text is cut does not depend on how it comes in pieces. It knows no token ids.
`generate`, `stream` and `chat` of the models call it.

Reference: Aho and Corasick, "Efficient string matching: an aid to bibliographic search" (CACM 18, 1975).
"""

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The strings that end a text, as an automaton.

    A state is the longest end of the text so far that is a beginning of one of the strings.

    Args:
        strings: the strings, none of them empty.
    """

    def __init__(self, strings: Sequence[str]):
        self._next, self._depth, self._found = [{}], [0], [0]
        for string in strings:
            self._insert(string)
        self._link()

    def _insert(self, string):
        state = 0
        for depth, character in enumerate(string, 1):
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(depth)
                self._found.append(0)
            state = self._next[state][character]
        self._found[state] = len(string)

    def _link(self):
        """Find the state to go on from where a string does not go on: that of the next shorter end of the text."""
        self._shorter = [0] * len(self._next)
        states = deque(self._next[0].values())
        while states:
            state = states.popleft()
            for character, longer in self._next[state].items():
                self._shorter[longer] = self.step(self._shorter[state], character)
                self._found[longer] = self._found[longer] or self._found[self._shorter[longer]]
                states.append(longer)

    def step(self, state: int, character: str) -> int:
        """Give the state after one more character."""
        while state and character not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(character, 0)

    def held(self, state: int) -> int:
        """Give how many characters at the end of the text may be the beginning of a string."""
        return self._depth[state]

    def found(self, state: int) -> int:
        """Give the length of the longest string that the text ends with, or 0."""
        return self._found[state]

    def scanner(self) -> "StopScanner":
        """Give what looks for the strings in one text."""
        return StopScanner(self)


class StopScanner:
    """Give the pieces of a text on, up to the stop string that is complete first.

    Args:
        strings: what ends the text.

    Attributes:
        is_found: whether a stop string came; the text ends before it.
    """

    def __init__(self, strings: StopStrings):
        self._strings = strings
        self._state = 0
        self._held = ""
        self.is_found = False

    def add(self, piece: str) -> str:
        """Take the next piece, and give the text that is final with it; that is none after a stop string."""
        if self.is_found:
            return ""
        text, start = self._held + piece, len(self._held)
        for end, character in enumerate(piece, start + 1):
            self._state = self._strings.step(self._state, character)
            if length := self._strings.found(self._state):
                self.is_found, self._held = True, ""
                return text[: end - length]
        num_final = len(text) - self._strings.held(self._state)
        self._held = text[num_final:]
        return text[:num_final]

    def finish(self) -> str:
        """Give the text that was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held
