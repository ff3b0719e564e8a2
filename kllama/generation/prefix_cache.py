"""Finding again what was read before: the caches of earlier conversations, by the token ids that they hold.

A conversation grows at its end, and each answer is asked for with all of it. What an earlier call has read is still
right as long as the ids are the same and no weight has changed:

    first call     system, question            -> answer         kept: system, question, answer
    second call    system, question, answer, question            read: the last question alone

Texts are not known here, and neither is the model: the caller, `kllama.models.streaming`, says what its weights are.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops
from keras_hub.src.utils.tensor_utils import get_tensor_size_in_bits

from kllama.generation import engine, kv_cache
from kllama.generation.buckets import bucket
from kllama.generation.decoding import Decoding, Request
from kllama.generation.speculation import PromptLookup

_SMALLEST_SLOTS = 256
"""How many slots the caches of a conversation have at least: as it grows, few sizes are to be compiled for."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """The caches of a sequence.

    Attributes:
        token_ids: int32 (any number,), what the first slots of the caches hold.
        caches: of an engine's state.
        weights: what stands for the weights that they were made with; see `backend.variables_state`.
    """

    token_ids: np.ndarray
    caches: list
    weights: object

    @property
    def num_bytes(self) -> int:
        """The memory that the caches take."""
        arrays = (array for cache in self.caches for array in cache)
        bits = (get_tensor_size_in_bits(x.shape, keras.backend.standardize_dtype(x.dtype)) for x in arrays)
        return int(sum(bits)) // 8


class PrefixCaches:
    """The caches of the last few sequences that a model has read; several threads may use it.

    A plain object on purpose: Keras tracks what lies in the lists and dicts of a model as its own.

    Args:
        num_kept: how many sequences are kept at most; 0 keeps none.
        max_bytes: how large their caches may be together.
    """

    def __init__(self, num_kept: int = 2, max_bytes: int = 2**30):
        self.num_kept = num_kept
        self.max_bytes = max_bytes
        self._kept = []  # the latest last
        self._lock = threading.Lock()

    def take(self, token_ids: np.ndarray, weights) -> Kept | None:
        """Take out the caches that hold the most of a sequence from its beginning, if that is worth it.

        It is if they hold half of the sequence, or if half of what they hold belongs to it: else another conversation
        would lose its caches for the sake of a few words that all begin with.

        Args:
            token_ids: int32 (any number,), the sequence.
            weights: what stands for the present weights. Caches that were made with others are dropped.

        Returns:
            The caches, with as many ids as they share; at least the last of the sequence is not among them, because it
            has to be read for what comes next. None if nothing was found.
        """
        with self._lock:
            self._kept = [kept for kept in self._kept if kept.weights == weights]
            best = max(self._kept, key=lambda kept: count_common(kept.token_ids, token_ids), default=None)
            if best is None:
                return None
            num_common = count_common(best.token_ids, token_ids)
            if 2 * num_common < min(len(token_ids), len(best.token_ids)):
                return None
            self._kept = [kept for kept in self._kept if kept is not best]
        num_held = min(num_common, len(token_ids) - 1)
        return dataclasses.replace(best, token_ids=best.token_ids[:num_held]) if num_held else None

    def put(self, kept: Kept) -> None:
        """Keep caches, which are given away; the oldest ones make room for them."""
        with self._lock:
            self._kept.append(kept)
            self._make_room()

    def limit(self, num_kept: int) -> None:
        """Change how many sequences are kept; the oldest ones go."""
        with self._lock:
            self.num_kept = num_kept
            self._make_room()

    def _make_room(self):
        while len(self._kept) > self.num_kept or sum(kept.num_bytes for kept in self._kept) > self.max_bytes:
            del self._kept[0]

    def clear(self) -> None:
        """Drop all caches."""
        with self._lock:
            self._kept = []


def count_common(first: np.ndarray, second: np.ndarray) -> int:
    """Count the ids at the beginning that two sequences have in common."""
    size = min(len(first), len(second))
    differs = np.flatnonzero(first[:size] != second[:size])
    return int(differs[0]) if differs.size else size


class _Resumed:
    """What a decoding of one row does differently if it does not read again what kept caches hold.

    It runs no chunk ahead of the one that is read: what is left early has done little in vain.
    """

    num_ahead = 0

    def __init__(self, compiled: Callable, request: Request, *arguments, kept: Kept | None = None):
        super().__init__(compiled, request, *arguments)
        self._kept = kept
        self._extend = compiled(engine.extend, plan=request.plan, num_tokens=request.num_tokens)

    def keep(self, new: Sequence[int], weights) -> Kept | None:
        """Give what can be kept of it, once it has ended or was left; None while its caches are not whole.

        Args:
            new: the tokens that it has given.
            weights: what stands for the weights that it ran with.
        """
        if self.state is None or not len(new):
            return None
        token_ids = np.concatenate([self._request.rows[0], new[:-1]])  # no cache holds the last one yet
        return Kept(token_ids.astype("int32"), self.state.caches, weights)

    def _read_prompts(self, inputs: engine.Inputs) -> tuple:
        if self._kept is None:
            return super()._read_prompts(inputs)
        kept, self._kept = self._kept, None
        start = len(kept.token_ids)
        row = self._request.rows[0][start:]
        token_ids = np.pad(row, (0, bucket(len(row)) - len(row)))[None]
        num_slots = kept.caches[0][0].shape[1]
        self._num_slots = max(num_slots, self._slots(num_slots), _rounded_up(start + token_ids.shape[1]))
        caches = kv_cache.grow(kept.caches, self._num_slots) if self._num_slots > num_slots else kept.caches
        arrays = (ops.convert_to_tensor(np.asarray(array, "int32")) for array in (token_ids, start))
        return self._extend(caches, *arrays, inputs, self._memory(), self._noise(0))

    def _slots(self, wanted: int) -> int:
        return _rounded_up(super()._slots(wanted))


class ResumedDecoding(_Resumed, Decoding):
    """A `Decoding` of one row that begins with kept caches, and whose own caches can be kept.

    Args:
        compiled: as for `Decoding`.
        request: as for `Decoding`, with one row.
        chunk: as for `Decoding`.
        kept: caches that hold the beginning of the row, which are used up, or None.
    """


class ResumedLookup(_Resumed, PromptLookup):
    """A `PromptLookup` that begins with kept caches, and whose own caches can be kept; see `ResumedDecoding`."""


def _rounded_up(num_slots: int) -> int:
    return max(_SMALLEST_SLOTS, 1 << (num_slots - 1).bit_length())
