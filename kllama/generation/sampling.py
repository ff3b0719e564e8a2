"""Choosing the next token from its logits. A sampler sees logits, never the model.

The order is transformers': temperature, then top-k, top-p and min-p, then a draw from what is left.
"""

import dataclasses
import math
from typing import NamedTuple

import keras_hub
from keras import ops

from kllama import backend
from kllama.arguments import check_integer, check_number

REMOVED = -1e30
"""The logit of a token that cannot be drawn."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    Attributes:
        temperature: at least 0; what logits are divided by. 0 means greedy: the token with the largest logit.
        top_k: keep the k tokens with the largest logits, or None for all.
        top_p: keep the fewest tokens whose probabilities sum to at least p, in (0, 1].
        min_p: keep the tokens at least p times as probable as the most probable one, in [0, 1].

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range.

    References: Fan et al., "Hierarchical Neural Story Generation" (arXiv:1805.04833), section 5.3 (top-k); Holtzman et
    al., "The Curious Case of Neural Text Degeneration" (arXiv:1904.09751), section 3.1 (top-p); Nguyen et al.,
    "Turning Up the Heat" (arXiv:2407.01082), section 3 (min-p).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        check_number("temperature", self.temperature, lambda x: 0 <= x < math.inf, "a finite number of at least 0")
        check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "greater than 0 and at most 1")
        check_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "at least 0 and at most 1")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, minimum=1)

    @property
    def is_greedy(self) -> bool:
        """Whether the token with the largest logit is taken."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def plan(self) -> "SamplingPlan":
        """What a compiled program is made for."""
        return SamplingPlan(self.is_greedy, self.top_k, self.top_p < 1, self.min_p > 0)

    @property
    def values(self) -> tuple[float, float, float]:
        """What a compiled program takes at each call: temperature, top_p and min_p."""
        return self.temperature, self.top_p, self.min_p


class SamplingPlan(NamedTuple):
    """The steps of sampling, without their numbers: another temperature is no other program."""

    is_greedy: bool
    top_k: int | None
    cuts_top_p: bool
    cuts_min_p: bool


GREEDY = Sampling(temperature=0.0)


def sampling_of(sampler) -> Sampling | None:
    """Translate a KerasHub sampler, or give None for one that has to run its own loop (beam search, a subclass)."""
    if type(sampler) is keras_hub.samplers.GreedySampler:
        return GREEDY
    if type(sampler) is keras_hub.samplers.RandomSampler:
        return Sampling(sampler.temperature)
    if type(sampler) is keras_hub.samplers.TopKSampler:
        return Sampling(sampler.temperature, top_k=sampler.k)
    if type(sampler) is keras_hub.samplers.TopPSampler and sampler.k is None:
        return Sampling(sampler.temperature, top_p=sampler.p)
    return None


def choose(logits, plan: SamplingPlan, values, noise):
    """Choose one token for each row.

    Args:
        logits: float32 (B, V).
        plan: `Sampling.plan`.
        values: `Sampling.values`, three numbers or a float32 (3,).
        noise: float32 (B,), uniform in [0, 1).

    Returns:
        int32 (B,).
    """
    if plan.is_greedy:
        return backend.argmax(logits)
    temperature, top_p, min_p = values[0], values[1], values[2]
    logits = logits / temperature
    if plan.top_k is not None:
        logits = keep_top_k(logits, plan.top_k)
    if plan.cuts_top_p:
        logits = keep_top_p(logits, top_p)
    if plan.cuts_min_p:
        logits = keep_min_p(logits, min_p)
    return draw(logits, noise)


def keep_top_k(logits, k: int):
    """Remove all but the k largest logits of each row (and what equals the k-th); (B, V) -> (B, V)."""
    smallest_kept = ops.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return ops.where(logits < smallest_kept, REMOVED, logits)


def keep_top_p(logits, p):
    """Remove all but the fewest largest logits of each row whose probabilities sum to at least p; (B, V) -> (B, V)."""
    order = ops.flip(ops.argsort(logits, axis=-1), axis=-1)
    probabilities = ops.softmax(ops.take_along_axis(logits, order, axis=-1), axis=-1)
    before = ops.cumsum(probabilities, axis=-1) - probabilities
    kept = ops.take_along_axis(before < p, ops.argsort(order, axis=-1), axis=-1)
    return ops.where(kept, logits, REMOVED)


def keep_min_p(logits, p):
    """Remove the logits of each row that are less than p times as probable as its largest; (B, V) -> (B, V)."""
    return ops.where(logits < ops.max(logits, axis=-1, keepdims=True) + ops.log(p), REMOVED, logits)


def draw(logits, noise):
    """Draw a token of each row from the softmax of its logits: the one at which the probabilities before reach `noise`.

    (B, V) and float32 (B,) in [0, 1) -> int32 (B,).
    """
    masses = backend.exp(logits - backend.reduce_max(logits, -1)[:, None])
    sums = backend.cumsum(masses, -1)
    total = backend.reduce_max(sums, -1)
    return backend.first_true((masses > 0) & (sums > (noise * total)[:, None]))
