"""How a language model continues prompts: which loop writes them, and what that loop is made of.

There are two. The plain loop (`kllama.generation.plain_loop`) is compiled here, over the model's cached forward pass. A
sampler with a loop of its own (beam search, say), or a `generate_step` of the user's, runs by KerasHub's protocol:
`generate_step` takes padded ids and fills them. Called by `LlamaCausalLM` on prompts whose arguments are settled.
"""

import functools

import numpy as np
from keras import ops

from kllama.generation import engine, plain_loop
from kllama.generation.decoding import Decoding, Request
from kllama.generation.network import Network
from kllama.generation.noise import uniform_numbers
from kllama.generation.programs import Programs
from kllama.generation.sampling import Sampling, choose
from kllama.models.generate_arguments import refuse_call_settings, resolve_sampling, resolve_seed


def continue_prompts(model, prompts, limits: np.ndarray, stop_token_ids: list[int], call: dict, seed: int | None):
    """Continue each row until a stop token or its limit, by the loop that is to do it.

    Args:
        model: a `LlamaCausalLM`.
        prompts: a `Prompts`.
        limits: int32 (B,), the length at which each row ends.
        stop_token_ids: ids that end a row.
        call: the call's `temperature`, `top_k`, `top_p` and `min_p`, None where it does not say.
        seed: the call's, or None.

    Returns:
        `(token ids int32 (B, S), lengths (B,))` in NumPy; what lies behind a row's length means nothing.

    Raises:
        ValueError: for settings of the call that another loop than the plain one cannot use.
    """
    function = model.make_generate_function()
    if not isinstance(function, Programs) or model._overrides("generate_step"):
        refuse_call_settings({**call, "seed": seed}, "a generate_step of your own")
        return _write_by_protocol(model, function, prompts, limits, stop_token_ids)
    sampling = resolve_sampling(call, model._chosen_sampler, model.generation_config)
    if sampling is None:
        refuse_call_settings({"seed": seed}, type(model.sampler).__name__)
        return _write_by_protocol(model, function, prompts, limits, stop_token_ids)
    seed = resolve_seed(seed, model._chosen_sampler)
    if model._overrides("call_with_cache"):
        return _write_plainly(model, function, prompts, limits, stop_token_ids, sampling, seed)
    return _write_fast(model, function, prompts, limits, stop_token_ids, sampling, seed)


def _write_fast(model, programs, prompts, limits, stop_token_ids, sampling: Sampling, seed: int):
    max_new = limits - prompts.lengths
    token_ids, lengths = prompts.padded(int(limits.max())), prompts.lengths
    going = np.flatnonzero(max_new > 0)
    if not going.size:
        return token_ids, lengths
    # A model may have more embedding rows than its tokenizer has tokens; text can be made of tokens only.
    num_tokens = prompts.num_tokens or model.backbone.vocabulary_size
    rows = [prompts.rows[row] for row in going]
    request = Request(rows, max_new[going], tuple(stop_token_ids), sampling, seed, num_tokens)
    for chunk in Decoding(functools.partial(_compiled, model, programs), request):
        for row, new in zip(going, chunk, strict=True):
            new = new[new >= 0]
            token_ids[row, lengths[row] : lengths[row] + len(new)] = new
            lengths[row] += len(new)
    return token_ids, lengths


def _compiled(model, programs, function, **settings):
    def run(*arrays):
        return function(Network(model.backbone), *arrays, **settings)

    options = {"is_eager": model.run_eagerly, "jit_compile": bool(model.jit_compile)}
    return programs.get((function, *settings.values()), run, donates=function is engine.decode, **options)


def _write_plainly(model, programs, prompts, limits, stop_token_ids, sampling: Sampling, seed: int):
    settings = {"plan": sampling.plan, "prompt_width": plain_loop.bucket(int(prompts.lengths.max()))}
    # A model may have more embedding rows than its tokenizer has tokens; text can be made of tokens only.
    settings["num_tokens"] = prompts.num_tokens or model.backbone.vocabulary_size
    options = {"is_eager": model.run_eagerly, "jit_compile": bool(model.jit_compile)}
    decoder = programs.get(tuple(settings.values()), functools.partial(decode, model, **settings), **options)
    token_ids = prompts.padded(plain_loop.bucket(int(limits.max())))
    arrays = token_ids, prompts.lengths, limits, np.asarray(stop_token_ids, "int32")
    arrays = [ops.convert_to_tensor(array, "int32") for array in arrays]
    floats = uniform_numbers(seed, range(len(prompts.rows)), 0, token_ids.shape[1]), sampling.values
    token_ids, lengths = decoder(*arrays, *(ops.convert_to_tensor(array, "float32") for array in floats))
    return ops.convert_to_numpy(token_ids), ops.convert_to_numpy(lengths)


def decode(model, token_ids, lengths, limits, stop_token_ids, noise, values, *, plan, prompt_width, num_tokens):
    """Run the plain loop over a model; a pure function of arrays, traced once for each bucket of lengths.

    Args:
        model: a `LlamaCausalLM`.
        token_ids: int32 (B, S), the prompts, padded on the right.
        lengths: int32 (B,), the prompts' lengths.
        limits: int32 (B,), the length at which each row ends.
        stop_token_ids: int32 (any number,).
        noise: float32 (B, S), one number for each token after a prompt.
        values: float32 (3,), `Sampling.values`.
        plan: `Sampling.plan`.
        prompt_width: how many positions the prompts take at most.
        num_tokens: ids from here on are never drawn.

    Returns:
        `(token_ids (B, S), lengths (B,))`.
    """
    rope_length = _rope_length(model, lengths)
    num_slots = token_ids.shape[1]
    _, cache = model._build_cache(token_ids[:, : min(prompt_width, num_slots)], num_slots, **rope_length)

    def step(token, cache, index):
        logits, _, cache = model.call_with_cache(token, cache, index, **rope_length)
        return logits[:, -1, :num_tokens], cache

    def choose_one(logits, index):
        column = ops.maximum(index - lengths, 0)[:, None]
        return choose(logits, plan, values, ops.take_along_axis(noise, column, axis=1)[:, 0])

    return plain_loop.decode(step, choose_one, token_ids, cache, lengths, limits, stop_token_ids)


def _rope_length(model, lengths) -> dict:
    """Give the keyword by which cached calls keep the frequencies of the prompts; none where they never change.

    Types of rotary embedding that depend on the length keep the prompts' from prefill on, as their cached keys do.
    """
    return {"rope_length": ops.max(lengths)} if model.backbone.rotary_embedding.depends_on_length else {}


def _write_by_protocol(model, function, prompts, limits, stop_token_ids):
    """Let a loop that is not ours write up to one common length."""
    if limits.min() != limits.max():
        raise ValueError(
            f"max_new_tokens with prompts of different lengths asks for different lengths {sorted(set(limits))}, which "
            f"{type(model.sampler).__name__} cannot do; expected max_length."
        )
    width = int(limits[0])
    inputs = {"token_ids": prompts.padded(width), "padding_mask": prompts.mask(width)}
    outputs = function(inputs, stop_token_ids=tuple(stop_token_ids) or None)
    lengths = ops.convert_to_numpy(outputs["padding_mask"]).astype("int32").sum(-1)
    return ops.convert_to_numpy(outputs["token_ids"]), lengths


def run_sampler(model, inputs: dict, stop_token_ids=None) -> dict:
    """Fill padded ids with a model's sampler; arguments and result are those of `LlamaCausalLM.generate_step`."""
    token_ids, padding_mask = inputs["token_ids"], ops.cast(inputs["padding_mask"], "bool")
    lengths = ops.sum(ops.cast(padding_mask, "int32"), axis=-1)
    rope_length = _rope_length(model, lengths)
    hidden_states, cache = model._build_cache(token_ids, **rope_length)

    def next(prompt, cache, index):
        token = ops.slice(prompt, (0, index - 1), (prompt.shape[0], 1))
        logits, hidden_states, cache = model.call_with_cache(token, cache, index - 1, **rope_length)
        return ops.squeeze(logits, axis=1), ops.squeeze(hidden_states, axis=1), cache

    token_ids = model.sampler(
        next=next,
        prompt=token_ids,
        cache=cache,
        index=ops.min(lengths),
        mask=padding_mask,
        stop_token_ids=stop_token_ids,
        hidden_states=hidden_states,
        model=model,
    )
    if isinstance(token_ids, tuple):
        raise ValueError(
            f"{type(model.sampler).__name__} gave more than token ids; expected them alone. (A BeamSampler gives more "
            "with return_all_beams=True.)"
        )
    if stop_token_ids is None:
        return {"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids, dtype="bool")}
    stops = ops.any(ops.equal(token_ids[..., None], ops.convert_to_tensor(stop_token_ids)), axis=-1)
    stops = ops.cast(stops & ~padding_mask, "int32")
    return {"token_ids": token_ids, "padding_mask": ops.equal(ops.cumsum(stops, axis=-1) - stops, 0)}
