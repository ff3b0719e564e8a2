# ruff: noqa: F821
"""A sampler, and models that override parts of generation."""

import keras
import keras_hub
from keras import ops


class ForbiddingSampler(keras_hub.samplers.Sampler):
    """Take the likeliest token that is not forbidden."""

    def __init__(self, forbidden_tokens, **kwargs):
        super().__init__(**kwargs)
        self.forbidden_tokens = forbidden_tokens

    def get_next_token(self, probs):
        batch_size, vocab_size = ops.shape(probs)
        for id in self.forbidden_tokens:
            update = ops.zeros((batch_size, 1))
            probs = ops.slice_update(probs, (0, id), update)
        return ops.argmax(probs, axis=-1)


class BiasedCausalLM(keras_hub.models.LlamaCausalLM):
    """Make the first half of the vocabulary unlikely."""

    def call_with_cache(self, token_ids, cache, cache_update_index):
        logits, hidden_states, cache = super().call_with_cache(token_ids, cache, cache_update_index)
        bias = ops.cast(ops.arange(logits.shape[-1]) < logits.shape[-1] // 2, logits.dtype)
        return logits - 100 * bias, hidden_states, cache


class CountingCausalLM(keras_hub.models.Llama3CausalLM):
    """Note the shape of what is generated."""

    shapes = []

    def generate_step(self, inputs, stop_token_ids=None):
        self.shapes.append([*inputs["token_ids"].shape])
        outputs = super().generate_step(inputs, stop_token_ids=stop_token_ids)
        return {**outputs, "token_ids": ops.where(outputs["token_ids"] == 300, 1, outputs["token_ids"])}


prompts = ["the quick", "a girl"]
causal_lm = keras_hub.models.LlamaCausalLM.from_preset(PRESET)
causal_lm.compile(sampler="greedy")
results = {"greedy": causal_lm.generate(prompts, max_length=10)}
first = causal_lm.preprocessor.tokenizer(results["greedy"][0])[2]
causal_lm.compile(sampler=ForbiddingSampler(forbidden_tokens=[int(first), 2]))
results["forbidden"] = causal_lm.generate(prompts, max_length=10)

biased = BiasedCausalLM(causal_lm.backbone, causal_lm.preprocessor)
biased.compile(sampler=keras_hub.samplers.TopKSampler(k=1))
results["biased"] = biased.generate(prompts, max_length=10, stop_token_ids=None)

counting = CountingCausalLM.from_preset(LLAMA3_PRESET)
counting.compile(sampler="greedy")
results["class"] = type(counting).__name__
results["generate_step"] = counting.generate(prompts, max_length=12)
results["shapes"] = counting.shapes[:1]

# Stop early: every logit says "end" from the first step on.
patched = keras_hub.models.LlamaCausalLM.from_preset(PRESET)
patched.compile(sampler="greedy")
call_with_cache = patched.call_with_cache


def ending(*args, **kwargs):
    logits, hidden_states, cache = call_with_cache(*args, **kwargs)
    end = keras.ops.one_hot(patched.preprocessor.tokenizer.end_token_id, logits.shape[-1])
    return logits * 0 + 1e6 * ops.cast(end, logits.dtype), hidden_states, cache


patched.call_with_cache = ending
results["stopped at once"] = patched.generate(prompts, max_length=10)
