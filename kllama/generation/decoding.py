"""Continuing a batch of prompts: the host's side of the engine.

The host prepares arrays, gives the caches more slots when they fill up, and, where the framework computes in the
background, starts a chunk before it reads the one before. Text is not known here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from keras import ops

from kllama import backend
from kllama.errors import NonFiniteError
from kllama.generation import choosing, engine, kv_cache
from kllama.generation.buckets import bucket
from kllama.generation.noise import uniform_numbers
from kllama.generation.sampling import Sampling

_FIRST_SLOTS = 256
"""How many slots a cache starts with at most, unless the prompts need more."""


@dataclass(frozen=True)
class Request:
    """What is to be written.

    Attributes:
        rows: the prompts, each int32 (any number >= 1,).
        max_new: int32 (B,), how many tokens each row gets at most, at least 1.
        stop_token_ids: a row ends with the first of them that it is given.
        sampling: how tokens are chosen.
        seed: of the random numbers.
        num_tokens: ids from here on are never chosen.
        first_row: the number of the first row in its batch, which its random numbers depend on.
        min_new_tokens: how many tokens each row gets before it may get a stop token.
        logits_processors: functions of the caller's that change logits; see `choosing.Plan`.
        log_probs: whether the tokens' log-probabilities are wanted.
        num_sequences: how many rows in succession are the same prompt, which is read once.
    """

    rows: list[np.ndarray]
    max_new: np.ndarray
    stop_token_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    num_tokens: int
    first_row: int = 0
    min_new_tokens: int = 0
    logits_processors: tuple[Callable, ...] = ()
    log_probs: bool = False
    num_sequences: int = 1

    @property
    def plan(self) -> choosing.Plan:
        """The steps of choosing a token."""
        return choosing.make_plan(self.sampling, self.min_new_tokens, self.logits_processors, self.log_probs)


class Chunk(NamedTuple):
    """What some steps gave each row.

    Attributes:
        tokens: int32 (B, n), -1 where a row has ended.
        log_probs: float32 (B, n), of the tokens under the softmax of the raw logits; None where nobody asked.
    """

    tokens: np.ndarray
    log_probs: np.ndarray | None


class Decoding:
    """A batch that is being continued; iterating gives the new tokens, a `Chunk` at a time.

    Args:
        compiled: function (`engine.prefill` or `engine.decode`, static settings by name) -> its compiled form over some
            model.
        request: what is to be written.
        chunk: how many steps are made between two looks at the result, at most `engine.CHUNK`.

    Attributes:
        chunk: the same; may be changed at any time.
        state: the last `engine.State`, or None before the first one and while a program uses it up.
    """

    num_ahead = int(backend.RUNS_AHEAD)
    """How many chunks are started before the first of them is read."""
    num_spare = 0
    """How many slots the caches have beyond the last token of the longest row."""

    def __init__(self, compiled: Callable, request: Request, chunk: int = engine.CHUNK):
        settings = {"plan": request.plan, "num_tokens": request.num_tokens}
        self._first = max(map(len, request.rows))
        self._most_new = int(request.max_new.max())
        self._num_slots = self._slots(_FIRST_SLOTS)
        sizes = {"num_slots": self._num_slots, "num_sequences": request.num_sequences}
        self._prefill = compiled(engine.prefill, **sizes, **settings)
        self._decode = compiled(engine.decode, **settings)
        self._request = request
        self.chunk = chunk
        self.state = None
        self._is_ended = np.zeros(len(request.rows), bool)
        self._num_read = 0  # tokens of the longest row

    def end(self, row: int) -> None:
        """Give a row no more tokens."""
        self._is_ended[row] = True

    def __iter__(self) -> Iterator[Chunk]:
        try:
            yield from self._ahead()
        finally:
            if self.state is not None:
                choosing.give_back(self._request.plan, self.state.memory)

    def _ahead(self) -> Iterator[Chunk]:
        """Read chunks, each after the next one was started."""
        waiting = []
        for written in self._chunks():
            waiting.append(written)
            if len(waiting) > self.num_ahead:
                yield self._read(waiting.pop(0))
            if self._is_ended.all():
                return
        yield from map(self._read, waiting)

    def _chunks(self) -> Iterator:
        """Start one chunk after another, and give what holds their tokens once they are done."""
        inputs = self._inputs()
        self.state, written = self._read_prompts(inputs)
        yield written
        num_new = 1
        while num_new < self._most_new:
            num_steps = min(self.chunk, self._most_new - num_new)
            state, self.state = self.state, None
            # One slot more than these steps fill: a step too many would write there.
            if self._first + num_new + num_steps > self._num_slots:
                self._num_slots = self._slots(2 * self._num_slots)
                state = state._replace(caches=kv_cache.grow(state.caches, self._num_slots))
            if self._is_ended.any():
                state = state._replace(is_done=state.is_done | ops.convert_to_tensor(self._is_ended))
            self.state, written = self._decode(state, inputs, self._noise(num_new), _int32(num_steps))
            num_new += num_steps
            yield written

    def _inputs(self) -> engine.Inputs:
        request = self._request
        return engine.Inputs(
            _int32([len(row) for row in request.rows]),
            _int32(request.max_new),
            _int32(_padded([*request.stop_token_ids, request.num_tokens])),
            ops.convert_to_tensor(request.sampling.values, "float32"),
            _int32(request.min_new_tokens),
        )

    def _memory(self) -> choosing.Memory:
        request = self._request
        return choosing.remember(request.plan, request.rows, request.num_tokens, bucket(self._first + self._most_new))

    def _read_prompts(self, inputs: engine.Inputs) -> tuple:
        """Give the state after the prompts, and what holds the first token of each row."""
        rows = self._request.rows[:: self._request.num_sequences]
        token_ids = np.stack([np.pad(row, (0, bucket(self._first) - len(row))) for row in rows])
        return self._prefill(_int32(token_ids), inputs, self._memory(), self._noise(0))

    def _slots(self, wanted: int) -> int:
        """Give how many slots caches are to have: as many as wanted, but not two more than the longest row can fill."""
        next_chunk = self._first + engine.CHUNK
        num_slots = min(max(wanted, next_chunk), self._first + self._most_new) + self.num_spare
        return max(bucket(num_slots, smallest=64), bucket(self._first))

    def _noise(self, start: int, spare: int = 0):
        first = self._request.first_row
        rows = range(first, first + len(self._request.rows))
        numbers = uniform_numbers(self._request.seed, rows, start, engine.CHUNK + spare)
        return ops.convert_to_tensor(numbers)

    def _read(self, written: engine.Written) -> Chunk:
        tokens = np.where(self._is_ended[:, None], -1, ops.convert_to_numpy(written.tokens))
        check_tokens(tokens, self._request.num_tokens, self._request.first_row, self._num_read)
        for row, new in enumerate(tokens):
            last = new[new >= 0][-1:]
            if not last.size or last[0] in self._request.stop_token_ids:
                self._is_ended[row] = True
        num_steps = int((tokens >= 0).sum(1).max())
        self._num_read += num_steps
        log_probs = ops.convert_to_numpy(written.log_probs)[:, :num_steps] if self._request.log_probs else None
        return Chunk(tokens[:, :num_steps], log_probs)


def check_tokens(tokens: np.ndarray, num_tokens: int, row: int, num_before: int) -> None:
    """Raise a NonFiniteError for the id that stands for no token: the logits were no numbers.

    Args:
        tokens: int32 (any number, any number), what rows were given.
        num_tokens: that id.
        row: the number of the first row in its batch.
        num_before: how many tokens these rows were given before.
    """
    for index, step in np.argwhere(tokens >= num_tokens)[:1]:
        raise NonFiniteError(
            f"row {row + index}, new token {num_before + step + 1}: the logits are NaN or infinite, or none is left; "
            "expected finite ones. Look at the weights, at the dtype (float16 overflows), and at logits_processors, if "
            "there are any."
        )


def _padded(ids: list[int]) -> list[int]:
    """Repeat the last of some ids, so that one program serves a few of them and one."""
    return ids + ids[-1:] * (bucket(len(ids), smallest=8) - len(ids))


def _int32(array):
    return ops.convert_to_tensor(np.asarray(array, "int32"))
