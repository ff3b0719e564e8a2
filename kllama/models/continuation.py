"""How a language model continues prompts: which loop writes them, and what that loop is made of.

There are three. The engine (`kllama.generation`) is the one that is fast. The plain loop
(`kllama.generation.plain_loop`) runs over the model's cached forward pass, where a subclass has one of its own. A
sampler with a loop of its own (beam search, say), or a `generate_step` of the user's, runs by KerasHub's protocol:
`generate_step` takes padded ids and fills them. Called on prompts whose arguments are settled.
"""

import functools

import numpy as np
from keras import ops

from kllama.generation import engine, plain_loop
from kllama.generation.choosing import Memory, choose_next, give_back, only_for, remember
from kllama.generation.decoding import Decoding, Request, check_tokens
from kllama.generation.network import Network
from kllama.generation.noise import uniform_numbers
from kllama.generation.prefix_cache import Kept, ResumedDecoding, ResumedLookup
from kllama.generation.programs import Programs
from kllama.generation.speculation import PromptLookup, PromptsInTurn
from kllama.models.generate_options import SettledCall
from kllama.models.prompts import Prompts
from kllama.models.results import Continued
from kllama.models.written_rows import WrittenRows

_STOP_STRING_CHUNK = 16
"""How many steps are made between two looks for stop strings; what is written behind one is thrown away."""


def continue_prompts(model, call: SettledCall) -> Continued:
    """Continue each row until a stop token, a stop string or its limit, by the loop that is to do it."""
    if not call.rows:
        log_probs = np.zeros((0, 0), "float32") if call.options.return_dict else None
        return Continued(np.zeros((0, 0), "int32"), np.zeros(0, "int32"), log_probs, [], [])
    written = WrittenRows(call)
    if call.loop == "protocol":
        written.take_whole(*_write_by_protocol(model, call))
    elif call.max_new.any():
        write = _write_fast if call.loop == "engine" else _write_plainly
        write(model, call, written)
    return written.finish()


def _write_fast(model, call: SettledCall, written: WrittenRows) -> None:
    going = np.flatnonzero(call.max_new > 0)
    decoding = start(model, call, _STOP_STRING_CHUNK if call.options.stop_strings else engine.CHUNK)
    for tokens, log_probs in decoding:
        for index, row in enumerate(going):
            new = tokens[index] >= 0
            if not written.take(row, tokens[index][new], None if log_probs is None else log_probs[index][new]):
                decoding.end(index)
    if call.options.prompt_lookup_num_tokens is not None:
        written.acceptance_rate = decoding.acceptance_rate


def start(
    model, call: SettledCall, chunk: int = engine.CHUNK, *, is_kept: bool = False, kept: Kept | None = None
) -> Decoding | PromptsInTurn:
    """Begin to continue the rows of a call that may grow, by the engine.

    Args:
        model: a `LlamaCausalLM`.
        call: whose `loop` is "engine".
        chunk: how many steps are made between two looks at the result.
        is_kept: whether the caches of the only row are to be kept afterwards.
        kept: caches that hold the beginning of that row, which are used up, or None.

    Returns:
        A `Decoding`, or what is iterated like one; its rows are those of `call.rows` with room for a token.
    """
    compiled, request = functools.partial(_compiled, model, call.function), _request(model, call)
    num_draft = call.options.prompt_lookup_num_tokens
    if num_draft is None:
        return ResumedDecoding(compiled, request, chunk, kept=kept) if is_kept else Decoding(compiled, request, chunk)
    if is_kept:
        return ResumedLookup(compiled, request, num_draft, chunk, kept=kept)
    return (PromptLookup if len(request.rows) == 1 else PromptsInTurn)(compiled, request, num_draft, chunk)


def _request(model, call: SettledCall) -> Request:
    """Say what is to be written to the rows that may grow."""
    going, options = np.flatnonzero(call.max_new > 0), call.options
    return Request(
        [call.rows[row] for row in going],
        call.max_new[going],
        call.stop_token_ids,
        call.sampling,
        call.seed,
        # A model may have more embedding rows than its tokenizer has tokens; text can be made of tokens only.
        call.prompts.num_tokens or model.backbone.vocabulary_size,
        min_new_tokens=options.min_new_tokens,
        logits_processors=options.logits_processors,
        log_probs=options.return_dict,
        num_sequences=options.num_return_sequences,
    )


def _compiled(model, programs, function, **settings):
    def run(*arrays):
        return function(Network(model.backbone), *arrays, **settings)

    options = {"is_eager": model.run_eagerly, "jit_compile": model._asked_jit_compile}
    return programs.get((function, *settings.values()), run, donates=function is not engine.prefill, **options)


def _write_plainly(model, call: SettledCall, written: WrittenRows) -> None:
    results = run_plainly(model, call.function, _request(model, call))
    for row, new, log_probs in zip(np.flatnonzero(call.max_new > 0), *results, strict=True):
        written.take(row, new, log_probs)


def run_plainly(model, programs: Programs, request: Request) -> tuple[list, list]:
    """Continue rows by the plain loop: `(new ids of each row, their log-probabilities, or None for each row)`."""
    starts, plan = np.array([len(row) for row in request.rows], "int32"), request.plan
    limits = starts + request.max_new
    settings = {"plan": plan, "prompt_width": plain_loop.bucket(int(starts.max())), "num_tokens": request.num_tokens}
    options = {"is_eager": model.run_eagerly, "jit_compile": bool(model.jit_compile)}
    decoder = programs.get(tuple(settings.values()), functools.partial(decode, model, **settings), **options)
    token_ids = Prompts(request.rows).padded(plain_loop.bucket(int(limits.max())))
    inputs = engine.Inputs(
        ops.convert_to_tensor(starts, "int32"),
        ops.convert_to_tensor(limits, "int32"),
        ops.convert_to_tensor([*request.stop_token_ids, request.num_tokens], "int32"),
        ops.convert_to_tensor(request.sampling.values, "float32"),
        ops.convert_to_tensor(request.min_new_tokens, "int32"),
    )
    memory = remember(plan, request.rows, request.num_tokens, token_ids.shape[1])
    noise = uniform_numbers(request.seed, range(len(starts)), 0, token_ids.shape[1])
    arrays = ops.convert_to_tensor(token_ids, "int32"), inputs, memory, ops.convert_to_tensor(noise)
    *arrays, memory = decoder(*arrays)
    give_back(plan, memory)
    token_ids, ends, log_probs = (ops.convert_to_numpy(array) for array in arrays)
    slices = [slice(*ends) for ends in zip(starts, ends, strict=True)]
    new = [row[part] for row, part in zip(token_ids, slices, strict=True)]
    for index, tokens in enumerate(new):
        check_tokens(tokens[None], request.num_tokens, index, 0)
    return new, [row[part] if request.log_probs else None for row, part in zip(log_probs, slices, strict=True)]


def decode(model, token_ids, inputs: engine.Inputs, memory: Memory, noise, *, plan, prompt_width, num_tokens):
    """Run the plain loop over a model; a pure function of arrays, traced once for each bucket of lengths.

    Args:
        model: a `LlamaCausalLM`.
        token_ids: int32 (B, S), the prompts, padded on the right.
        inputs: `max_new` are the lengths at which the rows end, prompts included.
        memory: of the rows.
        noise: float32 (B, S), one number for each token after a prompt.
        plan: how tokens are chosen.
        prompt_width: how many positions the prompts take at most.
        num_tokens: ids from here on are never chosen.

    Returns:
        `(token_ids (B, S), lengths (B,), log-probabilities (B, S), memory)`; the third means nothing if the plan does
        not ask for it.
    """
    rope_length = _rope_length(model, inputs.lengths)
    num_slots = token_ids.shape[1]
    _, cache = model._build_cache(token_ids[:, : min(prompt_width, num_slots)], num_slots, **rope_length)

    def step(token, cache, index):
        token = ops.minimum(token, model.backbone.vocabulary_size - 1)  # the id that stands for no token has no row
        logits, _, cache = model.call_with_cache(token, cache, index, **rope_length)
        return ops.cast(logits[:, -1], "float32"), cache

    def choose(logits, index, memory):
        num_new = index - inputs.lengths  # negative where a row still reads its prompt
        now = ops.take_along_axis(noise, ops.maximum(num_new, 0)[:, None], axis=1)[:, 0]
        token, log_prob, after = choose_next(logits, plan, inputs, memory, now, num_new, num_tokens)
        return token, log_prob if plan.gives_log_probs else now, only_for(num_new >= 0, after, memory)

    arrays = token_ids, cache, inputs.lengths, inputs.max_new, inputs.stop_token_ids
    return plain_loop.decode(step, choose, *arrays, memory)


def _rope_length(model, lengths) -> dict:
    """Give the keyword by which cached calls keep the frequencies of the prompts; none where they never change.

    Types of rotary embedding that depend on the length keep the prompts' from prefill on, as their cached keys do.
    """
    return {"rope_length": ops.max(lengths)} if model.backbone.rotary_embedding.depends_on_length else {}


def _write_by_protocol(model, call: SettledCall) -> tuple:
    """Let a loop that is not ours write up to one common length."""
    limits, prompts = call.limits, call.prompts
    if limits.min() != limits.max():
        lengths = sorted(set(limits.tolist()))
        raise ValueError(
            f"max_new_tokens with prompts of different lengths asks for different lengths {lengths}, which "
            f"{type(model.sampler).__name__} cannot do; expected max_length."
        )
    width = int(limits[0])
    inputs = {"token_ids": prompts.padded(width), "padding_mask": prompts.mask(width)}
    outputs = call.function(inputs, stop_token_ids=call.stop_token_ids or None)
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
