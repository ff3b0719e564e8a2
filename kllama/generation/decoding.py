"""Continuing a batch of prompts: the host's side of the engine.

The host prepares arrays, gives the caches more slots when they fill up, and, where the framework computes in the
background, starts a chunk before it reads the one before. Text is not known here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from keras import ops

from kllama import backend
from kllama.generation import engine, kv_cache
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
    """

    rows: list[np.ndarray]
    max_new: np.ndarray
    stop_token_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    num_tokens: int


class Decoding:
    """A batch that is being continued; iterating gives int32 (B, n) arrays of new tokens, -1 where a row has ended.

    Args:
        compiled: function (`engine.prefill` or `engine.decode`, static settings by name) -> its compiled form over some
            model.
        request: what is to be written.
        chunk: how many steps are made between two looks at the result, at most `engine.CHUNK`.
    """

    def __init__(self, compiled: Callable, request: Request, chunk: int = engine.CHUNK):
        settings = {"plan": request.sampling.plan, "num_tokens": request.num_tokens}
        self._first = max(map(len, request.rows))
        self._most_new = int(request.max_new.max())
        self._num_slots = self._slots(_FIRST_SLOTS)
        self._prefill = compiled(engine.prefill, num_slots=self._num_slots, **settings)
        self._decode = compiled(engine.decode, **settings)
        self._request = request
        self._chunk = chunk
        self._is_ended = np.zeros(len(request.rows), bool)

    def end(self, row: int) -> None:
        """Give a row no more tokens."""
        self._is_ended[row] = True

    def __iter__(self) -> Iterator[np.ndarray]:
        waiting = []
        for written in self._chunks():
            waiting.append(written)
            if len(waiting) > int(backend.RUNS_AHEAD):
                yield self._read(waiting.pop(0))
            if self._is_ended.all():
                return
        yield from map(self._read, waiting)

    def _chunks(self) -> Iterator:
        """Start one chunk after another, and give what holds their tokens once they are done."""
        request = self._request
        token_ids = np.stack([np.pad(row, (0, bucket(self._first) - len(row))) for row in request.rows])
        inputs = engine.Inputs(
            _int32([len(row) for row in request.rows]),
            _int32(request.max_new),
            _int32(request.stop_token_ids or [-1]),
            ops.convert_to_tensor(request.sampling.values, "float32"),
        )
        state, written = self._prefill(_int32(token_ids), inputs, self._noise(0))
        yield written
        num_new = 1
        while num_new < self._most_new:
            num_steps = min(self._chunk, self._most_new - num_new)
            if self._first + num_new + num_steps - 1 > self._num_slots:
                self._num_slots = self._slots(2 * self._num_slots)
                state = state._replace(caches=kv_cache.grow(state.caches, self._num_slots))
            if self._is_ended.any():
                state = state._replace(is_done=state.is_done | ops.convert_to_tensor(self._is_ended))
            state, written = self._decode(state, inputs, self._noise(num_new), _int32(num_steps))
            num_new += num_steps
            yield written

    def _slots(self, wanted: int) -> int:
        """Give how many slots the caches are to have: as many as wanted, but no more than the longest row can fill."""
        next_chunk = self._first + engine.CHUNK
        num_slots = min(max(wanted, next_chunk), self._first + self._most_new - 1)
        return max(bucket(num_slots, smallest=64), bucket(self._first))

    def _noise(self, start: int):
        numbers = uniform_numbers(self._request.seed, range(len(self._request.rows)), start, engine.CHUNK)
        return ops.convert_to_tensor(numbers)

    def _read(self, written) -> np.ndarray:
        tokens = ops.convert_to_numpy(written)
        for row, new in enumerate(tokens):
            last = new[new >= 0][-1:]
            if not last.size or last[0] in self._request.stop_token_ids:
                self._is_ended[row] = True
        return tokens[:, : (tokens >= 0).sum(1).max()]


def _int32(array):
    return ops.convert_to_tensor(np.asarray(array, "int32"))
