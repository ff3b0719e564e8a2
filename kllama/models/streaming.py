"""`stream` and `chat`: one prompt is continued, and what is written is given as it becomes final.

A conversation does not begin anew at each turn: the model keeps the caches of the last ones, and they are found again
by the ids that they hold (`kllama.generation.prefix_cache`). Tokens are written by the loops that `generate` uses, to
the same text. Called by `LlamaCausalLM`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping

from kllama import backend
from kllama.generation import engine
from kllama.generation.decoding import Decoding
from kllama.models.continuation import continue_prompts, start
from kllama.models.generate_options import GenerateOptions, SettledCall
from kllama.models.generating import settle
from kllama.models.results import finish_call
from kllama.models.stop_text import StopText
from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.tokenizer import LlamaTokenizer
from kllama.training.batches import is_tf_dataset

_PIECE_SECONDS = 0.05
"""How much time is to pass between two looks at what was written."""

_OPTIONS = {field.name for field in dataclasses.fields(GenerateOptions)}
_OPTIONS -= {"num_return_sequences", "return_dict"}


def stream(model, inputs, options: Mapping) -> Iterator[str] | Iterator[int]:
    """Continue a prompt; arguments, result and errors are those of `LlamaCausalLM.stream`."""
    _check_options("stream", options, _OPTIONS)
    if is_tf_dataset(inputs):
        raise ValueError("inputs are a dataset; stream and chat take one prompt. generate takes several.")
    call = settle(model, inputs, GenerateOptions(**{"strip_prompt": True, **options}))
    _check_single(call)
    if call.loop != "engine" or not _makes_text_of_tokens(model, call):
        return _write_whole(model, call)
    strips = call.prompts.is_chat if call.options.strip_prompt is None else call.options.strip_prompt
    before = [] if strips else call.prompts.rows[0].tolist()
    ids = _write(model, call)
    return _ended(call, before, ids) if call.prompts.finish_text is None else _read(call, before, ids)


def chat(model, messages, options: Mapping) -> str:
    """Answer a conversation; arguments, result and errors are those of `LlamaCausalLM.chat`."""
    if not isinstance(messages, Mapping | list | tuple) or not messages:
        raise TypeError(f"messages ({messages!r}) must be a conversation: a list of dicts of 'role' and 'content'.")
    is_chat = "messages" in messages if isinstance(messages, Mapping) else isinstance(messages[0], Mapping)
    if not is_chat:
        raise ValueError("messages must be one conversation: a list of dicts of 'role' and 'content'.")
    _check_options("chat", options, _OPTIONS - {"strip_prompt"})
    return "".join(stream(model, messages, options))


def _check_options(caller: str, options: Mapping, allowed: set[str]) -> None:
    unknown = sorted(options.keys() - allowed)
    if unknown:
        raise TypeError(f"{caller} got unknown options {unknown}; it takes {sorted(allowed)}.")


def _check_single(call: SettledCall) -> None:
    prompts = call.prompts
    if len(prompts.rows) != 1 or not (prompts.is_single or prompts.finish_text is None):
        raise ValueError(
            f"inputs are a list of {len(prompts.rows)} prompts; stream and chat take one: a string, a conversation or "
            "the token ids of one row. generate takes several."
        )


def _makes_text_of_tokens(model, call: SettledCall) -> bool:
    """Tell whether the text is that of the tokens, one after another, and not what a class of the user's makes."""
    preprocessor = model.preprocessor
    return call.prompts.finish_text is None or (
        isinstance(preprocessor.tokenizer, LlamaTokenizer)
        and type(preprocessor).generate_postprocess is LlamaCausalLMPreprocessor.generate_postprocess
        and type(preprocessor.tokenizer).detokenize is LlamaTokenizer.detokenize
    )


def _write_whole(model, call: SettledCall) -> Iterator:
    """Give in one piece what a loop writes that cannot be looked at before it ends."""
    result = finish_call(call, continue_prompts(model, call))
    if not isinstance(result, str):
        yield from result["token_ids"][result["padding_mask"]].tolist()
    elif result:
        yield result


def _write(model, call: SettledCall) -> Iterator[int]:
    """Give the ids that the engine writes."""
    if call.max_new[0] < 1:
        return
    # Frequencies that depend on the length are other ones in each turn.
    if not call.prompts.is_chat or model.backbone.rotary_embedding.depends_on_length or not model.kept_conversations:
        yield from _paced(start(model, call, chunk=1))
        return
    backend.synchronize(model)
    weights = backend.variables_state(model.backbone.variables)
    kept = model._prefix_caches.take(call.prompts.rows[0], weights)
    decoding = start(model, call, chunk=1, is_kept=True, kept=kept)
    new, is_whole = [], True
    try:
        for token_id in _paced(decoding):
            new.append(token_id)
            yield token_id
    except Exception:
        is_whole = False  # who knows what a program that failed has left
        raise
    finally:
        left = decoding.keep(new, weights) if is_whole else None
        if left is not None:
            model._prefix_caches.put(left)


def _paced(decoding: Decoding) -> Iterator[int]:
    """Give the ids of a decoding, with chunks of as many steps as take `_PIECE_SECONDS`."""
    chunks = iter(decoding)
    while True:
        before = time.perf_counter()
        chunk = next(chunks, None)
        if chunk is None:
            return
        new = chunk.tokens[0]
        new = new[new >= 0].tolist()
        decoding.chunk = next_chunk(len(new), time.perf_counter() - before)
        yield from new


def next_chunk(num_steps: int, seconds: float) -> int:
    """Give how many steps to make after so many took so long: at most twice as many, as the first are no measure."""
    wanted = int(_PIECE_SECONDS * num_steps / max(seconds, 1e-9))
    return max(1, min(wanted, 2 * num_steps, engine.CHUNK))


def _ended(call: SettledCall, before: list[int], ids: Iterator[int]) -> Iterator[int]:
    """Give ids, up to the one that makes a stop string whole."""
    yield from before
    stops = StopText(call.options.stop_strings, call.rows, call.tokenizer) if call.options.stop_strings else None
    with contextlib.closing(ids):
        for token_id in ids:
            yield token_id
            if stops is not None and stops.add(0, [token_id]) and stops.is_found[0]:
                return


def _read(call: SettledCall, before: list[int], ids: Iterator[int]) -> Iterator[str]:
    """Give the text of ids, each piece as soon as neither a later id nor a stop string can change it.

    Args:
        call: the call.
        before: ids of the prompt, where its text is wanted, too.
        ids: what is written.
    """
    tokenizer, strings = call.tokenizer, call.options.stop_strings
    detokenizer, hidden = tokenizer.streaming_detokenizer(), set(tokenizer.special_token_ids)
    stops = StopText(strings, call.prompts.rows, tokenizer) if strings else None
    held = "".join(detokenizer.add(token_id) for token_id in before if token_id not in hidden)
    if held:
        yield held
    held = ""  # the end of the text so far, of which a stop string may yet take something away
    with contextlib.closing(ids):
        for token_id in ids:
            held += "" if token_id in hidden else detokenizer.add(token_id)
            if stops is not None:
                stops.add(0, [token_id])
                if stops.is_found[0]:
                    break
            num_final = len(held) - (0 if stops is None else stops.num_held[0])
            if num_final > 0:
                yield held[:num_final]
                held = held[num_final:]
    held += detokenizer.finish()
    if stops is not None:
        stops.finish(0)
        held = held[: max(0, len(held) - stops.num_dropped[0])]
    if held:
        yield held
