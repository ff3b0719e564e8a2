"""The settings of `generate`, checked and settled before any model runs; the same words on every backend."""

import dataclasses
import random
from collections.abc import Mapping
from numbers import Integral

import keras
import keras_hub
import numpy as np

from kllama import backend
from kllama.arguments import check_flag, check_integer
from kllama.checkpoints.huggingface.config import GENERATION_KEYS
from kllama.checkpoints.presets.sampler import SAMPLER_NAMES
from kllama.generation.sampling import GREEDY, Sampling, sampling_of
from kllama.models.generate_options import SAMPLING_NAMES, GenerateOptions
from kllama.models.prompts import Prompts
from kllama.text.tokenizer import LlamaTokenizer
from kllama.training.losses import IGNORED_ID

MAX_SEED = 2**63
"""Seeds are below this."""

KERAS_HUB_DEFAULT = Sampling(top_k=5)
"""What `compile(sampler="top_k")` means."""


def is_auto(choice) -> bool:
    """Tell whether a choice is left open."""
    return isinstance(choice, str) and choice == "auto"


def fit_prompts(prompts: Prompts, options: GenerateOptions, preprocessor, max_sequence_length) -> Prompts:
    """Cut prompts that are too long, where the preprocessor's `truncate` asks for it.

    With `max_new_tokens` a prompt is too long only for the model's positions.
    """
    if prompts.cut is None:
        return prompts
    room = options.max_length
    if options.max_new_tokens is not None:
        if max_sequence_length is None:
            return prompts
        room = max_sequence_length - options.max_new_tokens + 1
    elif room is None:
        room = _default_max_length(prompts, preprocessor, max_sequence_length)
    rows = [np.array(prompts.cut(row.tolist(), room), "int32") for row in prompts.rows]
    return dataclasses.replace(prompts, rows=rows)


def resolve_limits(prompts: Prompts, options: GenerateOptions, preprocessor, max_sequence_length) -> np.ndarray:
    """Settle the length, prompt included, at which each row ends: int32 (B,).

    Raises:
        ValueError: for a length beyond the model's positions.
    """
    max_length, max_new_tokens = options.max_length, options.max_new_tokens
    if max_new_tokens is not None:
        limits = [len(row) + int(max_new_tokens) for row in prompts.rows]
    else:
        if max_length is None:
            max_length = _default_max_length(prompts, preprocessor, max_sequence_length)
        limits = [int(max_length)] * len(prompts.rows)
    longest = max(limits, default=0)
    if longest >= 2**31:
        raise ValueError(f"max_length ({longest}, prompt included) must be less than 2 ** 31.")
    if max_sequence_length is not None and longest > max_sequence_length:
        asked = f"max_length ({max_length})" if max_new_tokens is None else f"max_new_tokens ({max_new_tokens})"
        raise ValueError(
            f"{asked} asks for {longest} positions, prompt included; the model has {max_sequence_length} "
            "(max_sequence_length)."
        )
    return np.array(limits, "int32")


def check_lengths(prompts: Prompts, limits: np.ndarray, min_new_tokens: int) -> None:
    """Raise a ValueError for a prompt that is longer than its limit, or leaves no room for `min_new_tokens`."""
    for index in np.flatnonzero(prompts.lengths + min_new_tokens > limits)[:1]:
        length, limit = prompts.lengths[index], limits[index]
        if length > limit:
            raise ValueError(
                f"inputs row {index}: the prompt has {length} tokens, max_length is {limit}. Shorten the prompt, "
                "raise max_length (by default the preprocessor's sequence_length), or let the preprocessor cut it: "
                "truncate='left'."
            )
        raise ValueError(
            f"min_new_tokens ({min_new_tokens}) is more than max_length ({limit}) leaves beside the {length} tokens of "
            f"inputs row {index}."
        )


def resolve_stop_token_ids(
    stop_token_ids, prompts: Prompts, preprocessor, generation_config: Mapping, backbone
) -> list[int]:
    """Settle the ids that end a row; an empty list for none."""
    if is_auto(stop_token_ids):
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


def resolve_tokenizer(preprocessor, options: GenerateOptions):
    """Give the tokenizer that makes text of ids, or None without a preprocessor.

    Raises:
        ValueError: for stop strings without a preprocessor.
        TypeError: for stop strings with somebody else's tokenizer, which gives no text of single ids.
    """
    tokenizer = None if preprocessor is None else preprocessor.tokenizer
    if options.stop_strings and tokenizer is None:
        raise ValueError(
            f"stop_strings ({list(options.stop_strings)}) need the text of the ids, but the model has no preprocessor; "
            "expected stop_token_ids."
        )
    if options.stop_strings and not isinstance(tokenizer, LlamaTokenizer):
        raise TypeError(f"stop_strings ({list(options.stop_strings)}) need a LlamaTokenizer; it is {tokenizer!r}.")
    return tokenizer


def _check_token_ids(name: str, ids, vocabulary_size: int) -> None:
    is_list = isinstance(ids, list | tuple | set | np.ndarray)
    if not is_list or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids):
        raise TypeError(f"{name} ({ids!r}) must be a list of token ids.")
    wrong = [i for i in ids if not 0 <= i < vocabulary_size]
    if wrong:
        raise ValueError(f"{name} holds {wrong}; expected ids from 0 to {vocabulary_size - 1}.")


def refuse_options(options: GenerateOptions, owner: str) -> None:
    """Raise a ValueError for options that a loop of somebody else's could not use.

    Args:
        options: of the call.
        owner: whose loop it is, for the message.
    """
    settings = {**options.sampling, "seed": options.seed, "logits_processors": options.logits_processors or None}
    settings["prompt_lookup_num_tokens"] = options.prompt_lookup_num_tokens
    for name, value in settings.items():
        if value is not None:
            raise ValueError(f"{name} ({value!r}) must be None with {owner}, which draws for itself; set it there.")
    if options.sampler is not None:
        raise ValueError(
            f"sampler ({options.sampler!r}) must be None with {owner}, whose loop is compiled with the model; give the "
            "sampler to compile(sampler=...)."
        )
    for name, value, neutral in (
        ("min_new_tokens", options.min_new_tokens, 0),
        ("num_return_sequences", options.num_return_sequences, 1),
    ):
        if value != neutral:
            raise ValueError(f"{name} ({value}) must be {neutral} with {owner}, which decides that for itself.")


def refuse_equal_sequences(options: GenerateOptions, sampling: Sampling) -> None:
    """Raise a ValueError for several sequences of a prompt that could only be equal."""
    if options.num_return_sequences > 1 and sampling.is_greedy:
        raise ValueError(
            f"num_return_sequences ({options.num_return_sequences}) must be 1 without sampling: all sequences of a "
            "prompt would be equal."
        )


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


def resolve_sampling(
    call: Mapping, sampler, generation_config: Mapping, is_sampler_of_call: bool = False
) -> Sampling | None:
    """Settle how to sample: what the call says, over `compile`, over the checkpoint, over KerasHub's default.

    Args:
        call: `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty` of the call, None where it does not say.
        sampler: the sampler that the call or `compile` was given, or None for "auto".
        generation_config: the checkpoint's.
        is_sampler_of_call: whether the sampler is the call's, which may say no more beside one that draws for itself.

    Returns:
        How to sample; None if the sampler has to run its own loop.

    Raises:
        TypeError, ValueError: for a value of the wrong type or out of range, and for a sampler of the call that draws
            for itself beside settings that it could not use.
    """
    said = {name: value for name, value in call.items() if value is not None}
    is_asked = bool(said.keys() - {"repetition_penalty"})
    base = sampling_of(sampler) if sampler is not None else _sampling_of_checkpoint(generation_config, is_asked)
    draws_for_itself = base is None or base.sampler is not None
    if is_asked and draws_for_itself and is_sampler_of_call:
        raise ValueError(
            f"{next(iter(said))} and sampler ({type(sampler).__name__}) are both given, and that sampler draws for "
            "itself; expected one of the two."
        )
    # Asking for anything is asking to sample: what made a base greedy goes.
    if is_asked and (draws_for_itself or base.is_greedy):
        base = Sampling(repetition_penalty=1.0 if base is None else base.repetition_penalty)
    return None if base is None else dataclasses.replace(base, **said)


def _sampling_of_checkpoint(generation_config: Mapping, is_asked: bool) -> Sampling:
    wanted = _sampling_settings(generation_config)
    penalty = wanted.pop("repetition_penalty", 1.0)
    if generation_config.get("do_sample") is False and not is_asked:
        base = GREEDY
    else:
        base = Sampling(**wanted) if wanted or is_asked else KERAS_HUB_DEFAULT
    return dataclasses.replace(base, repetition_penalty=penalty)


def _sampling_settings(generation_config: Mapping) -> dict:
    settings = {name: generation_config[name] for name in SAMPLING_NAMES if name in generation_config}
    if settings.get("top_k") == 0:  # how transformers' files say that all tokens are kept
        del settings["top_k"]
    return settings


def resolve_seed(seed, sampler, sampling: Sampling) -> int:
    """Settle the seed: the call's, else the next of the sampler that `compile` was given with a seed, else a new one.

    New ones come from Python's generator, as Keras' do, so `keras.utils.set_random_seed` makes them repeat.

    Args:
        seed: the call's, or None.
        sampler: the one that the call or `compile` was given, or None.
        sampling: what came of it.

    Raises:
        TypeError: for a seed that is no integer.
        ValueError: for one out of range, and for one beside a sampler that draws for itself.
    """
    if sampling.sampler is not None:
        if seed is not None:
            name = type(sampling.sampler).__name__
            raise ValueError(f"seed ({seed!r}) must be None with {name}, which draws for itself; set it there.")
        return 0
    if seed is not None:
        check_integer("seed", seed, minimum=0)
        if seed >= MAX_SEED:
            raise ValueError(f"seed ({seed}) must be less than 2 ** 63.")
        return int(seed)
    if sampler is None or vars(sampler).get("seed") is None:
        return random.randrange(2**31)
    state = keras.ops.convert_to_numpy(sampler.seed_generator.next()).astype("int64")
    return int((state[0] * 1_000_003 + state[1]) % 2**31)


def _default_max_length(prompts, preprocessor, max_sequence_length):
    if prompts.width is not None:
        return prompts.width
    return min(preprocessor.sequence_length, max_sequence_length or preprocessor.sequence_length)
