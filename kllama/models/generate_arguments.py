"""The settings of `generate`, checked and settled before any model runs; the same words on every backend."""

import dataclasses
import math
import random
import warnings
from collections.abc import Mapping
from numbers import Integral

import keras
import keras_hub
import numpy as np

from kllama import backend
from kllama.arguments import check_flag, check_integer, check_number
from kllama.checkpoints.huggingface.config import GENERATION_KEYS
from kllama.checkpoints.presets.sampler import SAMPLER_NAMES
from kllama.generation.sampling import GREEDY, Sampling, sampling_of
from kllama.models.prompts import Prompts
from kllama.training.losses import IGNORED_ID

_SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p")

KERAS_HUB_DEFAULT = Sampling(top_k=5)
"""What `compile(sampler="top_k")` means."""


def fit_prompts(prompts: Prompts, max_length, max_new_tokens, preprocessor, max_sequence_length) -> Prompts:
    """Cut prompts that are too long, where the preprocessor's `truncate` asks for it.

    With `max_new_tokens` a prompt is too long only for the model's positions.

    Raises:
        TypeError, ValueError: as `resolve_limits`.
    """
    _check_asked(max_length, max_new_tokens)
    if prompts.cut is None:
        return prompts
    if max_new_tokens is None:
        room = _default_max_length(prompts, preprocessor, max_sequence_length) if max_length is None else max_length
    elif max_sequence_length is None:
        return prompts
    else:
        room = max_sequence_length - max_new_tokens + 1
    rows = [np.array(prompts.cut(row.tolist(), room), "int32") for row in prompts.rows]
    return dataclasses.replace(prompts, rows=rows)


def resolve_limits(prompts: Prompts, max_length, max_new_tokens, preprocessor, max_sequence_length) -> np.ndarray:
    """Settle the length, prompt included, at which each row ends: int32 (B,).

    Raises:
        TypeError: for a length that is no integer.
        ValueError: for a length below 1, for both kinds of length, and for one beyond the model's positions.
    """
    _check_asked(max_length, max_new_tokens)
    if max_new_tokens is not None:
        limits = prompts.lengths + max_new_tokens
    else:
        if max_length is None:
            max_length = _default_max_length(prompts, preprocessor, max_sequence_length)
        limits = np.full(len(prompts.rows), max_length)
    if limits.max() >= 2**31:
        raise ValueError(f"max_length ({limits.max()}, prompt included) must be less than 2 ** 31.")
    if max_sequence_length is not None and limits.max() > max_sequence_length:
        asked = f"max_length ({max_length})" if max_new_tokens is None else f"max_new_tokens ({max_new_tokens})"
        raise ValueError(
            f"{asked} asks for {limits.max()} positions, prompt included; the model has {max_sequence_length} "
            "(max_sequence_length)."
        )
    return limits.astype("int32")


def _check_asked(max_length, max_new_tokens) -> None:
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if value is not None:
            check_integer(name, value, minimum=1)
    if max_length is not None and max_new_tokens is not None:
        raise ValueError(
            f"max_length ({max_length}) and max_new_tokens ({max_new_tokens}) are both given; expected one."
        )


def check_lengths(prompts: Prompts, limits: np.ndarray) -> None:
    """Raise a ValueError for a prompt that is longer than its limit."""
    for index, (length, limit) in enumerate(zip(prompts.lengths, limits, strict=True)):
        if length > limit:
            raise ValueError(
                f"inputs row {index}: the prompt has {length} tokens, max_length is {limit}. Shorten the prompt, "
                "raise max_length (by default the preprocessor's sequence_length), or let the preprocessor cut it: "
                "truncate='left'."
            )


def resolve_stop_token_ids(
    stop_token_ids, prompts: Prompts, preprocessor, generation_config: Mapping, backbone
) -> list[int]:
    """Settle the ids that end a row; an empty list for none."""
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        ids = {*generation_config.get("stop_token_ids", ()), *prompts.stop_token_ids}
        if preprocessor is not None:
            # KerasHub's protocol: some of its tokenizers have a second end token, and an attribute for it only then.
            second = getattr(preprocessor.tokenizer, "end_token2_id", None)
            ids |= {preprocessor.tokenizer.end_token_id, second} - {None}
        return sorted(ids)
    if stop_token_ids is None:
        return []
    _check_token_ids("stop_token_ids", stop_token_ids, backbone.vocabulary_size)
    return sorted({int(i) for i in stop_token_ids})


def _check_token_ids(name: str, ids, vocabulary_size: int) -> None:
    is_list = isinstance(ids, list | tuple | set | np.ndarray)
    if not is_list or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids):
        raise TypeError(f"{name} ({ids!r}) must be a list of token ids.")
    wrong = [i for i in ids if not 0 <= i < vocabulary_size]
    if wrong:
        raise ValueError(f"{name} holds {wrong}; expected ids from 0 to {vocabulary_size - 1}.")


def refuse_call_settings(settings: Mapping, owner: str) -> None:
    """Raise a ValueError for settings of a call that a loop of somebody else's could not use.

    Args:
        settings: values by name, None for what the call does not say.
        owner: whose loop it is, for the message.
    """
    for name, value in settings.items():
        if value is not None:
            raise ValueError(f"{name} ({value!r}) must be None with {owner}, which draws for itself; set it there.")


def check_score_ids(token_ids, target_ids, vocabulary_size: int) -> None:
    """Check the ids of `score`, where they are there and not only being traced.

    Raises:
        TypeError: for ids that are no integers.
        ValueError: for ids out of range, and for targets of another shape.
    """
    if target_ids is not None and tuple(target_ids.shape) != tuple(token_ids.shape):
        raise ValueError(
            f"target_ids has shape {tuple(target_ids.shape)}; expected that of token_ids, {tuple(token_ids.shape)}."
        )
    for name, ids, ignored in (("token_ids", token_ids, ()), ("target_ids", target_ids, (IGNORED_ID,))):
        values = None if ids is None else backend.concrete(ids)
        if values is None:
            continue
        if values.dtype.kind not in "iu":
            raise TypeError(f"{name} has dtype {values.dtype}; expected integers.")
        wrong = values[((values < 0) | (values >= vocabulary_size)) & ~np.isin(values, ignored)]
        if wrong.size:
            raise ValueError(f"{name} holds {wrong[0]}; expected ids from 0 to {vocabulary_size - 1}.")


def check_generation_config(config: Mapping, vocabulary_size: int) -> dict:
    """Check a `generation_config` and return a copy of it.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for an unknown key or a value out of range.
    """
    unknown = sorted(config.keys() - set(GENERATION_KEYS))
    if unknown:
        raise ValueError(f"generation_config has unknown keys {unknown}; expected some of {list(GENERATION_KEYS)}.")
    if "do_sample" in config:
        check_flag("generation_config['do_sample']", config["do_sample"])
    if "stop_token_ids" in config:
        _check_token_ids("generation_config['stop_token_ids']", config["stop_token_ids"], vocabulary_size)
    if "repetition_penalty" in config:
        penalty = config["repetition_penalty"]
        check_number("repetition_penalty", penalty, lambda x: 0 < x < math.inf, "a positive number")
    Sampling(**_sampling_settings(config))
    return dict(config)


def resolve_sampler(sampler) -> keras_hub.samplers.Sampler:
    """Give the sampler that a name, a serialized one, a class or an object stands for.

    Raises:
        TypeError: for anything else.
        ValueError: for a name that KerasHub does not have.
    """
    if isinstance(sampler, str) and sampler not in SAMPLER_NAMES:
        raise ValueError(f"sampler ({sampler!r}) must be one of {', '.join(SAMPLER_NAMES)}, or a sampler.")
    if isinstance(sampler, type):
        return sampler()
    resolved = keras_hub.samplers.get(sampler) if isinstance(sampler, str | dict) else sampler
    if not callable(resolved):
        raise TypeError(f"sampler ({sampler!r}) must be a keras_hub.samplers.Sampler or its name.")
    return resolved


def resolve_sampling(call: Mapping, compiled_sampler, generation_config: Mapping) -> Sampling | None:
    """Settle how to sample: what the call says, over `compile`, over the checkpoint, over KerasHub's default.

    Args:
        call: `temperature`, `top_k`, `top_p` and `min_p` of the call, None where it does not say.
        compiled_sampler: the sampler that `compile` was given, or None for "auto".
        generation_config: the checkpoint's.

    Returns:
        How to sample; None if the compiled sampler has to run its own loop.
    """
    penalty = generation_config.get("repetition_penalty", 1)
    if compiled_sampler is None and penalty != 1:
        warnings.warn(
            f"generation_config asks for repetition_penalty={penalty}; generate does not apply it.", stacklevel=3
        )
    said = {name: value for name, value in call.items() if value is not None}
    wanted = _sampling_settings(generation_config)
    if said:
        base = sampling_of(compiled_sampler) if compiled_sampler is not None else Sampling(**wanted)
        # Asking for anything is asking to sample: what made a base greedy goes.
        base = Sampling() if base is None or base.is_greedy else base
        return dataclasses.replace(base, **said)
    if compiled_sampler is not None:
        return sampling_of(compiled_sampler)
    if generation_config.get("do_sample") is False:
        return GREEDY
    return Sampling(**wanted) if wanted else KERAS_HUB_DEFAULT


def _sampling_settings(generation_config: Mapping) -> dict:
    settings = {name: generation_config[name] for name in _SAMPLING_NAMES if name in generation_config}
    if settings.get("top_k") == 0:  # how transformers' files say that all tokens are kept
        del settings["top_k"]
    return settings


def resolve_seed(seed, sampler) -> int:
    """Settle the seed: the call's, else the next of the sampler that `compile` was given with a seed, else a new one.

    New ones come from Python's generator, as Keras' do, so `keras.utils.set_random_seed` makes them repeat.
    """
    if seed is not None:
        check_integer("seed", seed, minimum=0)
        if seed >= 2**31:
            raise ValueError(f"seed ({seed}) must be less than 2 ** 31.")
        return int(seed)
    if sampler is None or vars(sampler).get("seed") is None:
        return random.randrange(2**31)
    state = keras.ops.convert_to_numpy(sampler.seed_generator.next()).astype("int64")
    return int((state[0] * 1_000_003 + state[1]) % 2**31)


def _default_max_length(prompts, preprocessor, max_sequence_length):
    if prompts.width is not None:
        return prompts.width
    return min(preprocessor.sequence_length, max_sequence_length or preprocessor.sequence_length)
