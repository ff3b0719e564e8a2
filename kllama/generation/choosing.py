"""Choosing each row's next token, options included: what every loop of generation does with logits.

The order is transformers': the repetition penalty, the fewest new tokens, the caller's functions, and then sampling. So
that one program serves many calls, a `Plan` has the steps alone; their numbers are arrays. What has to be remembered
from token to token is a `Memory`. Knows neither network nor text; called by the engine and by the plain loop.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from kllama import backend
from kllama.generation.sampling import REMOVED, Sampling, SamplingPlan, choose


class Plan(NamedTuple):
    """The steps of choosing a token, without their numbers.

    Attributes:
        sampling: `Sampling.plan`.
        penalizes: whether tokens that a row holds already become less likely.
        holds_back: whether stop tokens wait for the fewest new tokens.
        processors: functions `(token_ids int32 (B, S), lengths int32 (B,), logits float32 (B, V)) -> logits`.
        gives_log_probs: whether the probability of what was chosen is wanted.
    """

    sampling: SamplingPlan
    penalizes: bool = False
    holds_back: bool = False
    processors: tuple[Callable, ...] = ()
    gives_log_probs: bool = False

    @property
    def only_computes(self) -> bool:
        """Whether a step runs no code but ours, which never looks at the numbers."""
        return not self.processors and self.sampling.sampler is None


class Memory(NamedTuple):
    """What choosing remembers from token to token; `()` stands for what a plan has no use for.

    Attributes:
        seen: bool (B, V), which tokens each row holds, its prompt included.
        token_ids: int32 (B, S), the rows so far, prompts included; what lies behind them means nothing.
        variables: the values of the sampler's variables.
    """

    seen: object = ()
    token_ids: object = ()
    variables: object = ()


def make_plan(sampling: Sampling, min_new_tokens=0, logits_processors=(), log_probs: bool = False) -> Plan:
    """Give the steps that settings ask for."""
    penalizes = sampling.repetition_penalty != 1
    # Programs are kept by their plan. A bound method can always be looked up, by the very object that it is of.
    processors = tuple(each if isinstance(each, Hashable) else each.__call__ for each in logits_processors)
    return Plan(sampling.plan, penalizes, min_new_tokens > 0, processors, log_probs)


def remember(plan: Plan, rows: list[np.ndarray], num_tokens: int, width: int) -> Memory:
    """Make the memory of rows of which there is the prompt alone.

    Args:
        plan: what is to be done.
        rows: the prompts, each int32 (any number,).
        num_tokens: V.
        width: S, at least the length of any row at its end.
    """
    seen = token_ids = variables = ()
    if plan.penalizes:
        seen = np.zeros((len(rows), num_tokens), bool)
        for is_seen, row in zip(seen, rows, strict=True):
            is_seen[row[row < num_tokens]] = True
        seen = ops.convert_to_tensor(seen)
    if plan.processors:
        token_ids = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
        token_ids = ops.convert_to_tensor(token_ids, "int32")
    if plan.sampling.sampler is not None:
        variables = [ops.copy(variable.value) for variable in plan.sampling.sampler.variables]
    return Memory(seen, token_ids, variables)


def give_back(plan: Plan, memory: Memory) -> None:
    """Let the sampler's variables have their values, so that the next call goes on from there."""
    if plan.sampling.sampler is not None:
        for variable, value in zip(plan.sampling.sampler.variables, memory.variables, strict=True):
            variable.assign(value)


def choose_next(logits, plan: Plan, inputs, memory: Memory, noise, num_new, num_tokens: int) -> tuple:
    """Choose one more token for each row.

    Args:
        logits: float32 (B, any number >= V), as the network gave them.
        plan: what is to be done.
        inputs: an `engine.Inputs`.
        memory: of the rows so far.
        noise: float32 (B,), uniform in [0, 1).
        num_new: int32, a scalar or (B,), how many tokens each row was given before.
        num_tokens: V; ids from here on are never chosen.

    Returns:
        `(token int32 (B,), its log-probability float32 (B,) or (), memory)`. The token is V for a row with a NaN or a
        positive infinity, and for one without a finite logit.
    """
    raw, logits, lengths = logits, logits[:, :num_tokens], inputs.lengths + num_new
    if plan.penalizes:
        logits = penalize(logits, memory.seen, inputs.values[4])
    if plan.holds_back:
        is_early = (inputs.lengths * 0 + num_new < inputs.min_new)[:, None]
        logits = hold_back(logits, inputs.stop_token_ids, is_early)
    for index, processor in enumerate(plan.processors):
        logits = _process(logits, index, processor, memory.token_ids, lengths)
    if plan.sampling.sampler is None:
        token, variables = choose(logits, plan.sampling, inputs.values, noise), ()
    else:
        token, variables = _draw_by(plan.sampling.sampler, logits, memory.variables)
    seen, token_ids = memory.seen, memory.token_ids
    if plan.penalizes:
        seen = seen | (backend.arange(num_tokens, logits)[None] == token[:, None])
    if plan.processors:
        is_here = backend.arange(token_ids.shape[1], token_ids)[None] == lengths[:, None]
        token_ids = backend.where(is_here, token[:, None], token_ids)
    log_prob = log_probability(raw, token) if plan.gives_log_probs else ()
    return token, log_prob, Memory(seen, token_ids, variables)


def only_for(rows, after: Memory, before: Memory) -> Memory:
    """Give a memory in which some rows alone, bool (B,), have gone on."""
    parts = ((after.seen, before.seen), (after.token_ids, before.token_ids))
    parts = (new if isinstance(new, tuple) else backend.where(rows[:, None], new, old) for new, old in parts)
    return Memory(*parts, after.variables)


def penalize(logits, seen, penalty):
    """Make tokens less likely: logits (B, V) where bool (B, V), divided by the penalty if positive, else multiplied."""
    return backend.where(seen, backend.where(logits < 0, logits * penalty, logits / penalty), logits)


def hold_back(logits, stop_token_ids, is_early):
    """Remove the stop tokens, int32 (any number,), of rows to which they would come too early, bool (B, 1)."""
    ids = backend.arange(logits.shape[-1], logits)
    is_stop = backend.reduce_any(ids[:, None] == stop_token_ids[None], -1)
    return backend.where(is_stop[None] & is_early, REMOVED, logits)


def log_probability(logits, token):
    """Give the logarithm of the probability that the softmax of logits (B, V) gives to a token int32 (B,)."""
    largest = backend.reduce_max(logits, -1)
    total = backend.reduce_sum(backend.exp(logits - largest[:, None]), -1)
    is_chosen = backend.arange(logits.shape[-1], logits)[None] == token[:, None]
    return backend.reduce_sum(backend.where(is_chosen, logits, 0.0), -1) - largest - backend.log(total)


def _process(logits, index: int, processor: Callable, token_ids, lengths):
    # Copies: on PyTorch a function may write to what it is given.
    result = processor(*map(ops.copy, (token_ids, lengths, logits)))
    if not ops.is_tensor(result):
        raise TypeError(f"logits_processors[{index}] gave {result!r}; expected a tensor of logits.")
    if tuple(result.shape) != tuple(logits.shape):
        raise ValueError(
            f"logits_processors[{index}] gave shape {tuple(result.shape)}; expected that of the logits, "
            f"{tuple(logits.shape)}."
        )
    return backend.cast(result, "float32")


def _draw_by(sampler, logits, variables) -> tuple:
    """Let a KerasHub sampler choose: `(token int32 (B,), the new values of its variables)`."""
    with keras.StatelessScope(state_mapping=zip(sampler.variables, variables, strict=True)) as scope:
        token = ops.convert_to_tensor(sampler.get_next_token(sampler.compute_probabilities(logits)))
    if tuple(token.shape) != tuple(logits.shape[:1]):
        raise ValueError(
            f"{type(sampler).__name__}.get_next_token gave shape {tuple(token.shape)}; expected one token for each "
            f"row, {tuple(logits.shape[:1])}."
        )
    variables = [scope.get_current_value(variable) for variable in sampler.variables]
    is_finite = backend.argmax(logits) < logits.shape[-1]
    return backend.where(is_finite, backend.cast(token, "int32"), logits.shape[-1]), variables
