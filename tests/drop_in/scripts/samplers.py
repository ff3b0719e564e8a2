# ruff: noqa: F821
"""Compile with each sampler, by name and as an object."""

import keras
import keras_hub

keras.utils.set_random_seed(1)
causal_lm = keras_hub.models.LlamaCausalLM.from_preset(PRESET)
prompts = ["the quick", "the dog"]
results = {"default": type(causal_lm.sampler).__name__}

for name in ["greedy", "beam", "contrastive", "random", "top_k", "top_p"]:
    causal_lm.compile(sampler=name)
    results[name] = causal_lm.generate(prompts, max_length=8)

samplers = {
    "BeamSampler": keras_hub.samplers.BeamSampler(num_beams=3),
    "ContrastiveSampler": keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.2),
    "TopKSampler": keras_hub.samplers.TopKSampler(k=1),
    "TopPSampler": keras_hub.samplers.TopPSampler(p=0.5, k=10, seed=2),
}
for name, sampler in samplers.items():
    causal_lm.compile(sampler=sampler)
    results[name] = causal_lm.generate(prompts, max_length=8)

results["sampler"] = type(causal_lm.sampler).__name__
