"""Prompt lookup: several tokens from one pass, where the text repeats itself.

A text often goes on as it did the last time that its last tokens occurred. What followed them there is the draft: one
pass of the network over it tells what the model says at each of its positions, and the text takes as much of the draft
as the model would have written itself. A pass reads all weights, whether it is over one token or over ten. Without a
draft, it is over the last token alone.

    text so far    the cat sat . the cat        its last two tokens occurred before; `sat . the` followed
    one pass       the network reads   cat sat . the
    it chooses     after each          sat .   a   ...
    given          sat . a                      two accepted, and the first token that differs

At each position the token is chosen exactly as without a draft, from the same logits by the same random number, and a
drafted token is accepted if it is the one chosen. So the text is the one that would be written without drafts: the
greedy one, and for each seed the sampled one. Of a draft that proposes single tokens, this is speculative sampling: a
drafted token x is accepted with its probability p(x), and else the token comes from p without x.

What it is not: drafts by a second model, and drafts for several rows at once, whose lengths would part after the first
pass; `PromptsInTurn` continues them one after another.

References: Saxena, "Prompt Lookup Decoding" (2023); Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding" (arXiv:2211.17192), section 2.3; Chen et al. (arXiv:2302.01318), algorithm 2.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from keras import ops

from kllama import backend
from kllama.generation import kv_cache
from kllama.generation.choosing import Memory, Plan, choose_next
from kllama.generation.decoding import Chunk, Decoding, Request
from kllama.generation.engine import CHUNK, Inputs, State, Written, nothing_written, run_on
from kllama.generation.network import Network

SHORTEST_NGRAM, LONGEST_NGRAM = 2, 3
"""How many of the last tokens are looked up. After one common token a text goes on in too many ways."""


class PromptLookup(Decoding):
    """A prompt that is being continued with drafts.

    Args:
        compiled: as of `Decoding`; called with `speculate`, too.
        request: what is to be written; one row.
        num_draft: how many tokens a draft has, at least 1.
        chunk: as of `Decoding`; of the tokens of a pass, some may lie beyond it.

    Attributes:
        num_passes: how often the network ran so far, reading the prompt not counted.
        num_proposed: how many tokens were drafted, those beyond the row's last one not counted.
        num_accepted: how many of them the text took.
    """

    num_ahead = 0  # where a chunk begins is known once the one before is done

    def __init__(self, compiled: Callable, request: Request, num_draft: int, chunk: int = CHUNK):
        self.num_spare = num_draft + 1
        super().__init__(compiled, request, chunk)
        settings = {"plan": request.plan, "num_tokens": request.num_tokens}
        self._speculate = compiled(speculate, num_draft=num_draft, **settings)
        self.num_passes = self.num_proposed = self.num_accepted = 0

    @property
    def acceptance_rate(self) -> float:
        """Which share of the drafted tokens the text has taken so far; NaN without a draft."""
        return _share(self.num_accepted, self.num_proposed)

    def _chunks(self) -> Iterator:
        inputs = self._inputs()
        self.state, written = self._read_prompts(inputs)
        yield written
        token_ids, counts = self._text(written), ops.zeros((3,), "int32")
        num_new = 1
        while num_new < self._most_new:
            num_steps = min(self.chunk, self._most_new - num_new)
            state, self.state = self.state, None
            if self._first + num_new + num_steps - 1 + self.num_spare > self._num_slots:
                self._num_slots = self._slots(2 * self._num_slots)
                state = state._replace(caches=kv_cache.grow(state.caches, self._num_slots))
                token_ids = backend.grow_slots(token_ids, self._num_slots)
            drafted = Drafted(state, token_ids, counts)
            noise = self._noise(num_new, self.num_spare)
            drafted, written = self._speculate(drafted, inputs, noise, ops.convert_to_tensor(num_steps, "int32"))
            self.state, token_ids, counts = drafted
            self.num_passes, self.num_proposed, self.num_accepted = ops.convert_to_numpy(counts).tolist()
            num_new += int((ops.convert_to_numpy(written.tokens) >= 0).sum())
            yield written

    def _text(self, written: Written):
        """Lay out the prompt and the first token after it like a cache: int32 (1, S, 1)."""
        token_ids = np.zeros((1, self._num_slots, 1), "int32")
        token_ids[0, : self._first, 0] = self._request.rows[0]
        token_ids[0, self._first, 0] = ops.convert_to_numpy(written.tokens)[0, 0]
        return ops.convert_to_tensor(token_ids)


class PromptsInTurn:
    """Prompts that are continued with drafts, one after another; iterated and ended like a `Decoding`.

    Args:
        compiled: as of `PromptLookup`.
        request: what is to be written; any number of rows.
        num_draft: as of `PromptLookup`.
        chunk: as of `PromptLookup`.
    """

    def __init__(self, compiled: Callable, request: Request, num_draft: int, chunk: int = CHUNK):
        parts = (
            dataclasses.replace(
                request, rows=[row], max_new=request.max_new[index : index + 1], first_row=index, num_sequences=1
            )
            for index, row in enumerate(request.rows)
        )
        self._rows = [PromptLookup(compiled, part, num_draft, chunk) for part in parts]

    @property
    def num_passes(self) -> int:
        """How often the network ran so far, reading the prompts not counted."""
        return sum(row.num_passes for row in self._rows)

    @property
    def num_proposed(self) -> int:
        """How many tokens were drafted, those beyond a row's last one not counted."""
        return sum(row.num_proposed for row in self._rows)

    @property
    def num_accepted(self) -> int:
        """How many of them the texts took."""
        return sum(row.num_accepted for row in self._rows)

    @property
    def acceptance_rate(self) -> float:
        """Which share of the drafted tokens the texts have taken so far; NaN without a draft."""
        return _share(self.num_accepted, self.num_proposed)

    def end(self, row: int) -> None:
        """Give a row no more tokens."""
        self._rows[row].end(0)

    def __iter__(self) -> Iterator[Chunk]:
        for index, row in enumerate(self._rows):
            for tokens, log_probs in row:
                yield Chunk(self._widen(index, tokens), None if log_probs is None else self._widen(index, log_probs))
            row.state = None  # its caches make room for those of the next one

    def _widen(self, index: int, row: np.ndarray) -> np.ndarray:
        rows = np.full((len(self._rows), row.shape[1]), -1 if row.dtype.kind == "i" else np.nan, row.dtype)
        rows[index] = row[0]
        return rows


def _share(num_accepted: int, num_proposed: int) -> float:
    return num_accepted / num_proposed if num_proposed else math.nan


class Drafted(NamedTuple):
    """A text that is being continued with drafts; used up by the step that makes the next one of it.

    Attributes:
        state: as without drafts; B is 1.
        token_ids: int32 (1, S, 1), the prompt and what was written after it, laid out like a cache.
        counts: int32 (3,): how often the network ran, how many tokens were drafted (those beyond the row's last one not
            counted), and how many of them the text took.
    """

    state: State
    token_ids: object
    counts: object


def speculate(
    network: Network,
    drafted: Drafted,
    inputs: Inputs,
    noise,
    num_steps,
    *,
    num_draft: int,
    plan: Plan,
    num_tokens: int,
):
    """Continue one row by at least `num_steps` tokens, unless it ends, and at most `num_steps + num_draft`.

    Args:
        network: the model.
        drafted: used up; before each pass, S is at least the tokens so far and `num_draft + 1`.
        inputs: as of `engine.decode`; B is 1.
        noise: float32 (1, C), one number for each token; C is at least `num_steps + num_draft`.
        num_steps: int32 scalar.
        num_draft: how many tokens a draft has.
        plan: how tokens are chosen.
        num_tokens: ids from here on are never chosen.

    Returns:
        `(drafted, Written of C columns)`.
    """
    # Copies: PyTorch's compiler takes arrays that no program gave, and one that is met twice, for another program.
    start = drafted.state.num_new + 0
    drafted = drafted._replace(token_ids=drafted.token_ids + 0, counts=drafted.counts + 0)

    def propose(drafted):
        length = inputs.lengths[0] + drafted.state.num_new
        return find_draft(drafted.token_ids[0, :, 0], length, num_draft)

    def is_running(carry):
        state = carry[0].state
        return (state.num_new < start + num_steps) & ~backend.reduce_all(state.is_done)

    def passing(size):
        def run_one(carry):
            drafted, written, (draft, _) = carry
            draft, column = draft[:size], drafted.state.num_new - start
            numbers = _part(noise[0], column, size + 1)
            drafted, chosen = _choose(network, drafted, draft, inputs, numbers, plan, num_tokens)
            drafted, written = _take(drafted, written, draft, chosen, column, inputs, num_tokens)
            return drafted, written, propose(drafted)

        return run_one

    def run_some(carry):
        """Loops in a loop: XLA would copy the caches that a choice between two kinds of pass gives."""
        for size, has_draft in ((num_draft, True), (0, False)):
            carry = backend.run_while(
                lambda carry, has_draft=has_draft: is_running(carry) & (carry[2][1] == has_draft),
                passing(size),
                carry,
                is_capturable=plan.only_computes,
            )
        return carry

    return backend.run_while(is_running, run_some, (drafted, nothing_written(noise, plan), propose(drafted)))[:2]


def _choose(network: Network, drafted: Drafted, draft, inputs: Inputs, noise, plan: Plan, num_tokens: int) -> tuple:
    """Choose the token at each place of a draft (k,), and the one after it, as if all before it were taken.

    Returns:
        `(drafted, what choose_next gives for k + 1 rows)`.
    """
    state = drafted.state
    length = inputs.lengths[0] + state.num_new
    pieces = backend.concatenate([state.token, draft], 0)[None]
    hidden_states, caches = run_on(network, state.caches, pieces, length - 1, inputs.lengths[0])
    logits, memory = network.logits(hidden_states[0]), _expect(state.memory, draft, length)
    num_new = state.num_new + backend.arange(noise.shape[0], noise)
    chosen = choose_next(logits, plan, inputs, memory, noise, num_new, num_tokens)
    return drafted._replace(state=state._replace(caches=caches)), chosen


def find_draft(token_ids, length, num_draft: int):
    """Give what followed the last tokens of a text where they occurred before.

    The longest match counts, of `SHORTEST_NGRAM` to `LONGEST_NGRAM` tokens, and of the longest ones the latest. A
    draft that reaches the end of the text goes on with its own beginning, so that short periods fill it, too.

    Args:
        token_ids: int32 (S,), of which the first `length` are the text.
        length: int32 scalar, at least 1.
        num_draft: k, how many tokens are wanted.

    Returns:
        `(draft int32 (k,), is_found bool scalar)`; the draft means nothing where there is none.
    """
    size = token_ids.shape[0]
    ends = backend.arange(size, token_ids)  # where a match ends, and its draft begins
    is_match, score = (ends > 0) & (ends < length), ends * 0
    for n in range(1, LONGEST_NGRAM + 1):
        wanted = backend.reduce_max(backend.where(ends == length - n, token_ids, 0))
        before = backend.concatenate([backend.full((n,), -1, "int32", token_ids), token_ids[: size - n]], 0)
        is_match = is_match & (before == wanted)
        if n >= SHORTEST_NGRAM:
            score = backend.where(is_match, ends + n * size, score)
    best = backend.reduce_max(score)
    is_found = best > 0
    start = backend.where(is_found, best % size, 0)
    return _part(token_ids, start, num_draft, length - start), is_found


def count_accepted(draft, tokens):
    """Count how many tokens of a draft stand before the first that was not chosen: (..., k), (..., k + 1) -> (...)."""
    differs = tokens[..., :-1] != draft
    return backend.first_true(backend.concatenate([differs, tokens[..., -1:] == tokens[..., -1:]], -1))


def _expect(memory: Memory, draft, length) -> Memory:
    """Give what choosing would remember before each token of a draft (k,) and after it, if the text took it all.

    The tokens that the text holds stay the same: a draft is a part of it.
    """
    if isinstance(memory.token_ids, tuple) or not draft.shape[0]:
        return memory
    place = backend.arange(memory.token_ids.shape[1], draft)[:, None] - length
    is_here = place == backend.arange(draft.shape[0], draft)[None]
    drafted = backend.reduce_max(backend.where(is_here, draft[None], 0), 1)
    token_ids = backend.where(backend.reduce_any(is_here, 1)[None], drafted[None], memory.token_ids)
    return memory._replace(token_ids=backend.repeat_axis(token_ids, draft.shape[0] + 1, 0))


def _take(drafted: Drafted, written: Written, draft, chosen, column, inputs: Inputs, num_tokens: int) -> tuple:
    """Give a row the tokens that were chosen up to the first that no draft leads to, a stop token or its limit."""
    state, (tokens, log_probs, memory) = drafted.state, chosen
    order = backend.arange(tokens.shape[0], tokens)
    num_accepted = count_accepted(draft, tokens)
    is_stop = backend.reduce_any(tokens[:, None] == inputs.stop_token_ids[None], -1)
    has_room = order < inputs.max_new[0] - state.num_new
    is_given = has_room & (order <= num_accepted) & (order <= backend.first_true(is_stop))
    num_given = _count(is_given)
    is_last = order == num_given - 1
    token = backend.minimum(backend.reduce_max(backend.where(is_last, tokens, 0)), num_tokens - 1)
    num_new = state.num_new + num_given
    is_done = state.is_done | backend.reduce_any(is_given & is_stop) | (num_new >= inputs.max_new)
    counts = [order[0] + 1, _count(has_room[:-1]), _count(is_given & (order < num_accepted))]
    drafted = Drafted(
        State(state.caches, state.token * 0 + token, num_new, is_done, _at(memory, is_last)),
        backend.write_slots(drafted.token_ids, tokens[None, :, None], inputs.lengths[0] + state.num_new),
        drafted.counts + backend.concatenate([backend.reshape(x, (1,)) for x in counts], 0),
    )
    return drafted, _note(written, tokens, log_probs, is_given, column)


def _at(memory: Memory, is_here) -> Memory:
    """Give the memory of one row, where bool (B,) is True."""
    seen, token_ids = memory.seen, memory.token_ids
    if not isinstance(seen, tuple):
        seen = backend.reduce_any(seen & is_here[:, None], 0)[None]
    if not isinstance(token_ids, tuple):
        token_ids = backend.reduce_max(backend.where(is_here[:, None], token_ids, 0), 0)[None]
    return Memory(seen, token_ids, memory.variables)


def _note(written: Written, tokens, log_probs, is_given, column) -> Written:
    """Write what a row was given, and nothing behind it, to the columns from `column` on."""

    def put(old, new):
        return backend.write_slots(old[..., None], new[None, :, None], column)[..., 0]

    noted = put(written.tokens, backend.where(is_given, tokens, -1))
    if isinstance(written.log_probs, tuple):
        return Written(noted)
    return Written(noted, put(written.log_probs, backend.where(is_given, log_probs, math.nan)))


def _part(x, start, count: int, period=None):
    """Give `count` entries of `x` (any number,) from `start` on, the same again after each `period` of them."""
    order = backend.arange(count, x)
    if period is not None:
        order = order % period
    return backend.take_rows(x[:, None], (start + order)[None])[0, :, 0]


def _count(x):
    return backend.cast(backend.reduce_sum(backend.cast(x, "int32")), "int32")
