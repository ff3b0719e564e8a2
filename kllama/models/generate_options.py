"""What a call of `generate`, `stream` or `chat` asks for: read once, checked once, and passed on whole.

`GenerateOptions` is what the caller said, `SettledCall` what comes of it for a model and its prompts. Neither runs
anything. Made by `models/generating.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from kllama.arguments import check_flag, check_integer
from kllama.generation.programs import Programs
from kllama.generation.sampling import Sampling
from kllama.models.prompts import Prompts

MAX_STOP_STRINGS = 256
"""How many stop strings a call may have; more are a mistake, such as a text given as the list of its words."""

SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of a call; names and meaning are those of `LlamaCausalLM.generate`.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range, and for two that exclude each other.
    """

    max_length: int | None = None
    stop_token_ids: Any = "auto"
    strip_prompt: bool | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    sampler: Any = None
    stop_strings: Any = None
    logits_processors: Any = None
    seed: int | None = None
    num_return_sequences: int = 1
    prompt_lookup_num_tokens: int | None = None
    return_dict: bool = False

    def __post_init__(self):
        for name in ("max_length", "max_new_tokens", "prompt_lookup_num_tokens"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum=1)
        check_integer("min_new_tokens", self.min_new_tokens, minimum=0)
        check_integer("num_return_sequences", self.num_return_sequences, minimum=1)
        check_flag("return_dict", self.return_dict)
        if self.strip_prompt is not None:
            check_flag("strip_prompt", self.strip_prompt)
        self._check_lengths()
        object.__setattr__(self, "stop_strings", _stop_strings(self.stop_strings))
        object.__setattr__(self, "logits_processors", _logits_processors(self.logits_processors))

    def _check_lengths(self):
        if self.max_length is not None and self.max_new_tokens is not None:
            raise ValueError(
                f"max_length ({self.max_length}) and max_new_tokens ({self.max_new_tokens}) are both given; expected "
                "one."
            )
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) must be at most max_new_tokens ({self.max_new_tokens})."
            )

    @property
    def sampling(self) -> dict:
        """What the call says of sampling, by name; None where it does not say."""
        return {name: getattr(self, name) for name in SAMPLING_NAMES}


@dataclasses.dataclass(frozen=True)
class SettledCall:
    """A call whose arguments are settled for a model: what a loop needs.

    Attributes:
        prompts: what the caller passed, one row for each prompt.
        limits: int32 (B,), the length, prompt included, at which each row ends.
        stop_token_ids: ids that end a row.
        sampling: how tokens are chosen, or None where the sampler runs a loop of its own.
        seed: of the random numbers; None where the sampler draws for itself.
        function: what the model's `make_generate_function` gave.
        loop: `"engine"`, `"plain"` (an overridden `call_with_cache` or `run_layers_with_cache`) or `"protocol"` (a
            `generate_step` or a sampler with a loop of its own).
        tokenizer: what makes text of ids, or None without a preprocessor.
        options: what the caller said.
    """

    prompts: Prompts
    limits: np.ndarray
    stop_token_ids: tuple[int, ...]
    sampling: Sampling | None
    seed: int | None
    function: Programs | Callable
    loop: str
    tokenizer: Any
    options: GenerateOptions

    @property
    def rows(self) -> list[np.ndarray]:
        """The prompts of what is written, one for each sequence: b0s0, b0s1, b1s0, ..."""
        return [row for row in self.prompts.rows for _ in range(self.options.num_return_sequences)]

    @property
    def max_new(self) -> np.ndarray:
        """How many tokens each of `rows` gets at most: int32."""
        return np.repeat(self.limits - self.prompts.lengths, self.options.num_return_sequences)


def _stop_strings(strings) -> tuple[str, ...]:
    if strings is None:
        return ()
    strings = (strings,) if isinstance(strings, str) else strings
    if not isinstance(strings, list | tuple) or not all(isinstance(string, str) for string in strings):
        raise TypeError(f"stop_strings ({strings!r}) must be a string or a list of strings.")
    if "" in strings:
        raise ValueError(f"stop_strings ({list(strings)!r}) must not be empty: every text has the empty string in it.")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"stop_strings has {len(strings)} strings; expected at most {MAX_STOP_STRINGS}.")
    return tuple(dict.fromkeys(strings))


def _logits_processors(processors) -> tuple[Callable, ...]:
    if processors is None:
        return ()
    if not isinstance(processors, list | tuple):
        raise TypeError(f"logits_processors ({processors!r}) must be a list of functions.")
    wrong = [processor for processor in processors if not callable(processor)]
    if wrong:
        raise TypeError(f"logits_processors holds {wrong[0]!r}; expected functions.")
    return tuple(processors)
