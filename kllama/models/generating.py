"""`generate`, from what the caller passes to what he gets: read, settle, continue, finish.

It checks every argument before anything runs, and does not write tokens itself (`models/continuation.py` does). Called
by `LlamaCausalLM`.
"""

import dataclasses
import itertools

from kllama import backend
from kllama.generation.programs import Programs
from kllama.models.continuation import continue_prompts
from kllama.models.generate_arguments import (
    MAX_SEED,
    check_lengths,
    fit_prompts,
    refuse_equal_sequences,
    refuse_options,
    resolve_limits,
    resolve_sampler,
    resolve_sampling,
    resolve_seed,
    resolve_stop_token_ids,
    resolve_tokenizer,
)
from kllama.models.generate_options import GenerateOptions, SettledCall
from kllama.models.llama_backbone import LlamaBackbone
from kllama.models.memory import check_memory
from kllama.models.prompts import checked, read_prompts
from kllama.models.results import finish_call, join_results
from kllama.training.batches import is_tf_dataset


def generate(model, inputs, options: GenerateOptions):
    """Continue prompts; arguments, result and errors are those of `LlamaCausalLM.generate`."""
    if not is_tf_dataset(inputs):
        return _generate_batch(model, inputs, options)
    batches = zip(inputs, _batch_options(options), strict=False)
    return join_results([_generate_batch(model, batch, options) for batch, options in batches])


def _generate_batch(model, inputs, options):
    call = settle(model, inputs, options)
    return finish_call(call, continue_prompts(model, call))


def settle(model, inputs, options: GenerateOptions) -> SettledCall:
    """Read prompts and settle how a model is to continue them; nothing has run when this raises.

    Raises:
        TypeError, ValueError: as `LlamaCausalLM.generate`.
    """
    backend.synchronize(model)  # generating is allowed in the middle of `fit`
    prompts = read_prompts(inputs, model.preprocessor)
    if prompts.finish_text is not None:
        model._check_vocabulary()
    prompts = checked(prompts, model.backbone.vocabulary_size)
    lengths = options, model.preprocessor, model.backbone.max_sequence_length
    prompts = fit_prompts(prompts, *lengths)
    limits = resolve_limits(prompts, *lengths)
    check_lengths(prompts, limits, options.min_new_tokens)
    stop_token_ids = resolve_stop_token_ids(
        options.stop_token_ids, prompts, model.preprocessor, model.generation_config, model.backbone
    )
    tokenizer = resolve_tokenizer(model.preprocessor, options)
    # Drafts are for one sequence at a time, so that the caches of one are there at any time.
    check_memory(model.backbone, limits, options.num_return_sequences, options.prompt_lookup_num_tokens is not None)
    loop = _resolve_loop(model, options)
    return SettledCall(prompts, limits, tuple(stop_token_ids), *loop, tokenizer, options)


def _resolve_loop(model, options: GenerateOptions) -> tuple:
    """Settle how tokens are chosen, and which loop writes them: `(sampling, seed, function, loop)`."""
    function = model.make_generate_function()
    if not isinstance(function, Programs) or model._overrides("generate_step"):
        refuse_options(options, "a generate_step of your own")
        return None, None, function, "protocol"
    sampler = model._chosen_sampler if options.sampler is None else resolve_sampler(options.sampler)
    is_of_call = options.sampler is not None
    sampling = resolve_sampling(options.sampling, sampler, model.generation_config, is_of_call)
    if sampling is None:
        refuse_options(options, type(sampler).__name__)
        return None, None, function, "protocol"
    refuse_equal_sequences(options, sampling)
    if sampling.sampler is not None and options.prompt_lookup_num_tokens is not None:
        raise ValueError(
            f"prompt_lookup_num_tokens ({options.prompt_lookup_num_tokens}) must be None with "
            f"{type(sampler).__name__}, which draws for itself: drafts are checked by what the settings draw."
        )
    loop = "plain" if _has_own_forward_pass(model) else "engine"
    if loop == "plain" and options.prompt_lookup_num_tokens is not None:
        raise ValueError(
            f"prompt_lookup_num_tokens ({options.prompt_lookup_num_tokens}) must be None with a cached forward "
            "pass of your own: a draft is checked by the model's own forward pass."
        )
    return sampling, resolve_seed(options.seed, sampler, sampling), function, loop


def _has_own_forward_pass(model) -> bool:
    """Tell whether somebody's own code computes what comes next, of which the engine knows nothing."""
    backbone = model.backbone
    is_ours = type(backbone).run_layers_with_cache is LlamaBackbone.run_layers_with_cache
    return not is_ours or "run_layers_with_cache" in vars(backbone) or model._overrides("call_with_cache")


def _batch_options(options: GenerateOptions):
    """Give each batch of a dataset a seed of its own: the same prompt twice is not to give the same text twice."""
    yield options
    for i in itertools.count(1):
        seed = None if options.seed is None else (options.seed + i) % MAX_SEED
        yield dataclasses.replace(options, seed=seed)
