"""The rows of a call while they grow: ids, log-probabilities and stop strings, on the host.

It writes no tokens itself: the loops of `models/continuation.py` hand them over.
"""

import math

import numpy as np

from kllama.models.generate_options import SettledCall
from kllama.models.prompts import Prompts
from kllama.models.results import Continued
from kllama.models.stop_text import StopText


class WrittenRows:
    """The rows of a call while they grow, on the host.

    Args:
        call: whose rows they are.

    Attributes:
        acceptance_rate: which share of the drafted tokens was taken; NaN without drafts.
    """

    def __init__(self, call: SettledCall):
        prompts = Prompts(call.rows)
        self._call = call
        self._starts = prompts.lengths
        self._lengths = prompts.lengths
        self._token_ids = prompts.padded(int(call.limits.max()))
        self._log_probs = np.full(self._token_ids.shape, np.nan, "float32") if call.options.return_dict else None
        strings = call.options.stop_strings
        self._stop_text = StopText(strings, call.rows, call.tokenizer) if strings else None
        self.acceptance_rate = math.nan

    def take(self, row: int, new: np.ndarray, log_probs: np.ndarray | None = None) -> bool:
        """Take a row's next ids; tell whether the row goes on, as far as stop strings are concerned."""
        count = len(new) if self._stop_text is None else self._stop_text.add(row, new.tolist())
        start, end = self._lengths[row], self._lengths[row] + count
        self._token_ids[row, start:end] = new[:count]
        if self._log_probs is not None and log_probs is not None:
            self._log_probs[row, start:end] = log_probs[:count]
        self._lengths[row] = end
        return self._stop_text is None or not self._stop_text.is_found[row]

    def take_whole(self, token_ids: np.ndarray, lengths: np.ndarray, log_probs: np.ndarray | None = None) -> None:
        """Take all rows at once, from a loop that cannot be stopped from outside."""
        for row, (start, end) in enumerate(zip(self._starts, lengths, strict=True)):
            self.take(row, token_ids[row, start:end], None if log_probs is None else log_probs[row, start:end])

    def finish(self) -> Continued:
        """Give the rows, and tell why each of them ended."""
        num_dropped, is_stopped = [0] * len(self._lengths), self._ends_with_a_stop_token()
        if self._stop_text is not None:
            for row in range(len(self._lengths)):
                self._stop_text.finish(row)
            num_dropped, is_stopped = self._stop_text.num_dropped, is_stopped | self._stop_text.is_found
        reasons = ["stop" if stopped else "length" for stopped in is_stopped]
        return Continued(self._token_ids, self._lengths, self._log_probs, reasons, num_dropped, self.acceptance_rate)

    def _ends_with_a_stop_token(self):
        last = self._token_ids[np.arange(len(self._lengths)), self._lengths - 1]
        return (self._lengths > self._starts) & np.isin(last, self._call.stop_token_ids)
