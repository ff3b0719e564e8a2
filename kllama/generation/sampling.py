"""Choosing the next token from its logits. A sampler sees logits, never the model.

The order is transformers': temperature, then top-k, top-p and min-p, then a draw from what is left. What comes before,
from the repetition penalty to the caller's own functions, is `choosing.py`'s.
"""

import dataclasses
import math
from typing import NamedTuple

import keras_hub

from kllama import backend
from kllama.arguments import check_integer, check_number

REMOVED = -math.inf
"""The logit of a token that cannot be drawn."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    Attributes:
        temperature: at least 0; what logits are divided by. 0 means greedy: the token with the largest logit.
        top_k: keep the k tokens with the largest logits, or None for all.
        top_p: keep the fewest tokens whose probabilities sum to at least p, in (0, 1].
        min_p: keep the tokens at least p times as probable as the most probable one, in [0, 1].
        repetition_penalty: what the positive logits of the tokens that a row holds already, its prompt included, are
            divided by, and the negative ones multiplied by; greater than 0. 1 changes nothing.
        sampler: a `keras_hub.samplers.Sampler` whose `get_next_token` draws, instead of the settings above but the
            penalty; or None.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range.

    References: Fan et al., "Hierarchical Neural Story Generation" (arXiv:1805.04833), section 5.3 (top-k); Holtzman et
    al., "The Curious Case of Neural Text Degeneration" (arXiv:1904.09751), section 3.1 (top-p); Nguyen et al.,
    "Turning Up the Heat" (arXiv:2407.01082), section 3 (min-p); Keskar et al., "CTRL" (arXiv:1909.05858), section 4.1
    (repetition penalty).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    sampler: keras_hub.samplers.Sampler | None = None

    def __post_init__(self):
        check_number("temperature", self.temperature, lambda x: 0 <= x < math.inf, "a finite number of at least 0")
        check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "greater than 0 and at most 1")
        check_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "at least 0 and at most 1")
        penalty = self.repetition_penalty
        check_number("repetition_penalty", penalty, lambda x: 0 < x < math.inf, "a positive finite number")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, minimum=1)

    @property
    def is_greedy(self) -> bool:
        """Whether the token with the largest logit is taken."""
        return self.sampler is None and (self.temperature == 0 or self.top_k == 1)

    @property
    def plan(self) -> "SamplingPlan":
        """What a compiled program is made for."""
        if self.is_greedy or self.sampler is not None:
            return SamplingPlan(self.is_greedy, False, False, False, self.sampler, _settings_of(self.sampler))
        return SamplingPlan(False, self.top_k is not None, self.top_p < 1, self.min_p > 0)

    @property
    def values(self) -> tuple[float, float, float, float, float]:
        """What a compiled program takes at each call: temperature, top_k, top_p, min_p and repetition_penalty."""
        return self.temperature, float(self.top_k or 0), self.top_p, self.min_p, self.repetition_penalty


class SamplingPlan(NamedTuple):
    """The steps of sampling, without their numbers: another temperature is no other program."""

    is_greedy: bool
    cuts_top_k: bool
    cuts_top_p: bool
    cuts_min_p: bool
    sampler: keras_hub.samplers.Sampler | None = None
    sampler_settings: tuple = ()


GREEDY = Sampling(temperature=0.0)


def sampling_of(sampler) -> Sampling | None:
    """Translate a KerasHub sampler, or give None for one that has to run its own loop (beam search, say)."""
    if type(sampler) is keras_hub.samplers.GreedySampler:
        return GREEDY
    if type(sampler) is keras_hub.samplers.RandomSampler:
        return Sampling(sampler.temperature)
    if type(sampler) is keras_hub.samplers.TopKSampler:
        return Sampling(sampler.temperature, top_k=sampler.k)
    if type(sampler) is keras_hub.samplers.TopPSampler and sampler.k is None:
        return Sampling(sampler.temperature, top_p=sampler.p)
    return None if _has_own_loop(sampler) else Sampling(sampler=sampler)


def _settings_of(sampler) -> tuple:
    """Give what a sampler's numbers and names are now: a program has them built in."""
    if sampler is None:
        return ()
    return tuple((name, value) for name, value in sorted(vars(sampler).items()) if isinstance(value, int | float | str))


def _has_own_loop(sampler) -> bool:
    base = keras_hub.samplers.Sampler
    if not isinstance(sampler, base) or "run_loop" in vars(sampler):
        return True
    return any(getattr(type(sampler), name) is not getattr(base, name) for name in ("__call__", "run_loop"))


def choose(logits, plan: SamplingPlan, values, noise):
    """Choose one token for each row; not for a plan with a sampler.

    Args:
        logits: float32 (B, V).
        plan: `Sampling.plan`.
        values: `Sampling.values`, five numbers or a float32 (5,).
        noise: float32 (B,), uniform in [0, 1).

    Returns:
        int32 (B,); V for a row with a NaN or a positive infinity, and for one without a finite logit.
    """
    if plan.is_greedy:
        return backend.argmax(logits)
    # The largest becomes 0 first: a tiny temperature leaves it there, and removes the others.
    return draw(keep(logits - backend.reduce_max(logits, -1)[:, None], plan, values), noise)


def keep(logits, plan: SamplingPlan, values):
    """Give the logits (B, V) whose softmax a token is drawn from, minus infinity for what cannot be drawn."""
    temperature, top_k, top_p, min_p = values[0], values[1], values[2], values[3]
    logits = logits / temperature
    if plan.cuts_top_k:
        logits = keep_top_k(logits, top_k)
    if plan.cuts_top_p:
        logits = keep_top_p(logits, top_p)
    if plan.cuts_min_p:
        logits = keep_min_p(logits, min_p)
    return logits


def keep_top_k(logits, k):
    """Remove all but the k largest logits of each row (and what equals the k-th); (B, V) -> (B, V)."""
    return backend.where(logits < backend.kth_largest(logits, k), REMOVED, logits)


def keep_top_p(logits, p):
    """Remove the logits of each row above which there is a probability of at least p; (B, V) -> (B, V)."""
    masses = _masses(logits)
    total = backend.reduce_sum(masses, -1)[:, None]
    return backend.where(logits < backend.smallest_kept(logits, masses, p * total), REMOVED, logits)


def keep_min_p(logits, p):
    """Remove the logits of each row that are less than p times as probable as its largest; (B, V) -> (B, V)."""
    return backend.where(_masses(logits) < p, REMOVED, logits)


def draw(logits, noise):
    """Draw a token of each row from the softmax of its logits: the one at which the probabilities before reach `noise`.

    (B, V) and float32 (B,) in [0, 1) -> int32 (B,), V for a row whose softmax is no number.
    """
    masses = _masses(logits)
    sums = backend.cumsum(masses, -1)
    total = backend.reduce_max(sums, -1)
    is_number = sums[:, -1] == sums[:, -1]
    return backend.first_true(is_number[:, None] & (masses > 0) & (sums > (noise * total)[:, None]))


def _masses(logits):
    """Give what the softmax of each row is proportional to, 1 at its largest logit."""
    return backend.exp(logits - backend.reduce_max(logits, -1)[:, None])
