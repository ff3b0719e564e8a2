"""The engine: prompts are read once, in a bucket of lengths, and continued in chunks of steps.

    prompts -> prefill -> decode -> decode -> ...

`prefill` and `decode` are pure functions of arrays, compiled by `backend.compile_function`; `decoding.py` calls them.
Every number that may change between calls is an array, so a program is made for shapes alone.
"""

import math
from typing import NamedTuple

from kllama import backend
from kllama.core.attention import scaled_dot_product
from kllama.core.masks import cached_causal_mask, causal_mask
from kllama.generation import kv_cache
from kllama.generation.choosing import Memory, Plan, choose_next
from kllama.generation.network import Network

CHUNK = 64
"""How many steps a call of `decode` makes at most."""


class Inputs(NamedTuple):
    """What stays the same while a batch is continued.

    Attributes:
        lengths: int32 (B,), the prompts' lengths, at least 1.
        max_new: int32 (B,), how many tokens each row gets at most.
        stop_token_ids: int32 (any number,): a row ends with the first of them that it is given. The number of tokens,
            which stands for no token, is always one of them.
        values: float32 (5,), `Sampling.values`.
        min_new: int32 scalar, how many tokens each row gets before it may get a stop token.
    """

    lengths: object
    max_new: object
    stop_token_ids: object
    values: object
    min_new: object


class State(NamedTuple):
    """A batch that is being continued; used up by the step that makes the next one of it.

    Attributes:
        caches: for each layer its keys and values; see `kv_cache`.
        token: int32 (B,), the token that each row was given last, which no cache holds yet.
        num_new: int32 scalar, how many tokens a row that still runs has been given.
        is_done: bool (B,), whether a row has ended.
        memory: what choosing remembers.
    """

    caches: list
    token: object
    num_new: object
    is_done: object
    memory: Memory


class Written(NamedTuple):
    """What the steps of one call gave each row; a column a step.

    Attributes:
        tokens: int32 (B, any number), then -1. A row that ends because its logits were no numbers has the number of
            tokens last.
        log_probs: float32, of the same shape, of the tokens under the softmax of the logits; `()` if not asked for.
    """

    tokens: object
    log_probs: object = ()


def prefill(
    network: Network,
    token_ids,
    inputs: Inputs,
    memory: Memory,
    noise,
    *,
    num_slots: int,
    num_sequences: int,
    plan: Plan,
    num_tokens: int,
):
    """Read prompts and choose the first token of each of their continuations.

    Args:
        network: the model.
        token_ids: int32 (B / num_sequences, T), the prompts, padded on the right.
        inputs: see there.
        memory: of the B rows.
        noise: float32 (B, CHUNK).
        num_slots: S, at least T.
        num_sequences: how many rows in succession continue one prompt.
        plan: how tokens are chosen.
        num_tokens: ids from here on are never chosen.

    Returns:
        `(state, Written of CHUNK columns)`.
    """
    lengths = inputs.lengths[::num_sequences]
    positions = backend.arange(token_ids.shape[1], lengths)[None]
    masks = {window: causal_mask(token_ids, None, window) for window in set(network.windows)}

    def attend(query, key, value, layer):
        context = scaled_dot_product(query, key, value, masks[network.windows[layer]], is_causal=True)
        return context, kv_cache.make(key, value, num_slots)

    hidden_states, caches = network.run(token_ids, positions, network.frequencies(backend.reduce_max(lengths)), attend)
    logits = network.logits(backend.take_last(hidden_states, lengths))
    if num_sequences > 1:
        logits, caches = backend.repeat_axis(logits, num_sequences, 0), kv_cache.repeat(caches, num_sequences, lengths)
    return _begin(logits, caches, inputs, memory, noise, plan, num_tokens)


def extend(
    network: Network,
    caches: list,
    token_ids,
    start,
    inputs: Inputs,
    memory: Memory,
    noise,
    *,
    plan: Plan,
    num_tokens: int,
):
    """Read what follows on a prompt that the caches hold already, and choose the first token after it; B is 1.

    Args:
        network: the model.
        caches: of a state; used up.
        token_ids: int32 (1, T), padded on the right.
        start: int32 scalar, how many positions of the caches hold; start + T is at most S.
        inputs: see there; `lengths` are those of the whole prompt.
        memory: of the whole prompt.
        noise: float32 (1, CHUNK).
        plan: how tokens are chosen.
        num_tokens: ids from here on are never chosen.

    Returns:
        `(state, Written of CHUNK columns)`.
    """
    hidden_states, caches = run_on(network, caches, token_ids, start, inputs.lengths[0])
    logits = network.logits(backend.take_last(hidden_states, inputs.lengths - start))
    return _begin(logits, caches, inputs, memory, noise, plan, num_tokens)


def run_on(network: Network, caches: list, token_ids, start, length):
    """Run new tokens of one sequence, whose position is their slot, through the network.

    Args:
        network: the model.
        caches: hold the positions before `start`; used up.
        token_ids: int32 (1, T).
        start: int32 scalar, the position of the first of them; start + T is at most S.
        length: int32 scalar, of the sequence that the frequencies are for, where they depend on it.

    Returns:
        `(hidden states (1, T, D), caches)`.
    """
    num_slots = caches[0][0].shape[1]
    positions = (backend.arange(token_ids.shape[1], token_ids) + start)[None]
    visible = {w: cached_causal_mask(token_ids, num_slots, start, w)[:, 0] for w in set(network.windows)}

    def attend(query, key, value, layer):
        written = kv_cache.write(caches[layer], key, value, start)
        return kv_cache.attend(query, written, visible[network.windows[layer]]), written

    return network.run(token_ids, positions, network.frequencies(length), attend)


def decode(network: Network, state: State, inputs: Inputs, noise, num_steps, *, plan: Plan, num_tokens: int):
    """Give each row that still runs up to `num_steps` more tokens.

    Args:
        network: the model.
        state: used up.
        inputs: see there.
        noise: float32 (B, CHUNK), one number for each token.
        num_steps: int32 scalar, at most CHUNK.
        plan: how tokens are chosen.
        num_tokens: ids from here on are never chosen.

    Returns:
        `(state, Written of CHUNK columns)`.
    """
    frequencies = network.frequencies(backend.reduce_max(inputs.lengths))
    start = state.num_new + 0  # a copy: that they are the same array in the first step alone is not to be compiled in

    def step(caches, rest):
        state, written = rest
        hidden_states, caches = _run_last(network, state._replace(caches=caches), inputs.lengths, frequencies)
        logits = network.logits(hidden_states[:, 0])
        return caches, _give(state, written, logits, inputs, noise, state.num_new - start, plan, num_tokens)

    def is_over(rest):
        state, _ = rest
        return backend.reduce_all(state.is_done)

    rest = state._replace(caches=()), nothing_written(noise, plan)
    caches, (state, written) = backend.run_steps(
        step, is_over, state.caches, rest, num_steps, CHUNK, is_capturable=plan.only_computes
    )
    return state._replace(caches=caches), written


def _run_last(network: Network, state: State, lengths, frequencies):
    """Run the token that each row was given last through the network: `(hidden states (B, 1, D), caches)`."""
    index, first = state.num_new - 1, backend.reduce_max(lengths)
    num_slots = state.caches[0][0].shape[1]
    visible = {w: kv_cache.visible_slots(num_slots, lengths, first, index, w) for w in set(network.windows)}

    def attend(query, key, value, layer):
        written = kv_cache.write(state.caches[layer], key, value, first + index)
        return kv_cache.attend(query, written, visible[network.windows[layer]]), written

    return network.run(state.token[:, None], (lengths + index)[:, None], frequencies, attend)


def _begin(logits, caches, inputs, memory, noise, plan, num_tokens):
    """Make the state after prompts from the logits of their last tokens."""
    state = State(caches, inputs.lengths, inputs.lengths[0] * 0, inputs.lengths < 0, memory)
    return _give(state, nothing_written(noise, plan), logits, inputs, noise, 0, plan, num_tokens)


def _give(state, written, logits, inputs, noise, column, plan, num_tokens):
    """Choose a token for each row that still runs, and note it in a column of `written`."""
    here = backend.arange(noise.shape[1], logits)[None] == column
    now = backend.reduce_sum(backend.where(here, noise, 0.0), -1)
    chosen = choose_next(logits, plan, inputs, state.memory, now, state.num_new, num_tokens)
    token, log_prob, memory = chosen
    log_probs = written.log_probs
    if plan.gives_log_probs:
        log_probs = backend.where(here & ~state.is_done[:, None], log_prob[:, None], log_probs)
    new = backend.where(state.is_done, -1, token)[:, None]
    written = Written(backend.where(here, new, written.tokens), log_probs)
    num_new = state.num_new + 1
    is_stop = backend.reduce_any(token[:, None] == inputs.stop_token_ids[None], -1)
    is_done = state.is_done | is_stop | (num_new >= inputs.max_new)
    return State(state.caches, backend.minimum(token, num_tokens - 1), num_new, is_done, memory), written


def nothing_written(noise, plan: Plan) -> Written:
    """Give what no step has written to yet, with a column for each column of `noise`."""
    shape = tuple(noise.shape)
    log_probs = backend.full(shape, math.nan, "float32", noise) if plan.gives_log_probs else ()
    return Written(backend.full(shape, -1, "int32", noise), log_probs)
