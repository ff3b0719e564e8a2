"""Ending rows at stop strings: the text of each row is read while its ids come.

It knows when a row has a stop string, how many of its ids make it, and how much of the text stands behind the cut.
`models/continuation.py` asks; the text itself is made once, at the end, by `models/results.py`.
"""

from collections.abc import Sequence

import numpy as np

from kllama.text.stop_strings import StopStrings


class StopText:
    """The texts of a batch of rows, looked through for stop strings.

    Args:
        strings: the stop strings.
        rows: the prompts' ids, one row for each row that is written.
        tokenizer: a `LlamaTokenizer`.

    Attributes:
        num_dropped: for each row, how many characters at its end belong to a stop string, or stand behind one.
        is_found: for each row, whether it has a stop string.
    """

    def __init__(self, strings: Sequence[str], rows: list[np.ndarray], tokenizer):
        automaton = StopStrings(strings)
        self._rows = [_RowText(row, tokenizer, automaton.scanner()) for row in rows]

    @property
    def num_dropped(self) -> list[int]:
        return [row.num_dropped for row in self._rows]

    @property
    def num_held(self) -> list[int]:
        """For each row, how many characters at its end may yet turn out to belong to a stop string."""
        return [row.num_held for row in self._rows]

    @property
    def is_found(self) -> list[bool]:
        return [row.is_found for row in self._rows]

    def add(self, row: int, new: Sequence[int]) -> int:
        """Take a row's next ids; give how many of them there are up to the one that makes a stop string whole."""
        return self._rows[row].add(new)

    def finish(self, row: int) -> None:
        """Look through what a decoder holds back until the end of a text."""
        self._rows[row].finish()


class _RowText:
    def __init__(self, prompt, tokenizer, scanner):
        self._hidden = set(tokenizer.special_token_ids)
        self._num_tokens = tokenizer.vocabulary_size()  # rows of the embedding without a token are no text
        self._detokenizer = tokenizer.streaming_detokenizer()
        self._scanner = scanner
        # A decoder may hold the end of a prompt back; no stop string is found in it all the same.
        self._num_before = len(tokenizer.detokenize([i for i in prompt.tolist() if self._is_text(i)]))
        for token_id in filter(self._is_text, prompt.tolist()):
            self._num_before -= len(self._detokenizer.add(token_id))
        self._num_seen = self._num_kept = 0

    @property
    def is_found(self):
        return self._scanner.is_found

    @property
    def num_held(self):
        return self._num_seen - self._num_kept

    @property
    def num_dropped(self):
        return self.num_held if self.is_found else 0

    def add(self, new):
        if self.is_found:
            return 0
        for count, token_id in enumerate(new, 1):
            if self._is_text(token_id):
                self._scan(self._detokenizer.add(token_id))
            if self.is_found:
                self._num_seen += len(self._detokenizer.finish())
                return count
        return len(new)

    def finish(self):
        if not self.is_found:
            self._scan(self._detokenizer.finish())

    def _scan(self, piece):
        num_before = min(len(piece), self._num_before)
        self._num_before -= num_before
        self._num_seen += len(piece) - num_before
        self._num_kept += len(self._scanner.add(piece[num_before:]))

    def _is_text(self, token_id):
        return token_id < self._num_tokens and token_id not in self._hidden
