# ruff: noqa: F821
"""Quantise to int8, generate, save and load."""

import keras
from keras_hub.models import LlamaCausalLM

prompts = ["the quick brown", "a girl"]
causal_lm = LlamaCausalLM.from_preset(PRESET)
ids = causal_lm.preprocessor.generate_preprocess(prompts, sequence_length=8)
mask = keras.ops.convert_to_numpy(ids["padding_mask"])[..., None]
before = keras.ops.convert_to_numpy(causal_lm(ids)) * mask

causal_lm.quantize("int8")
causal_lm.compile(sampler="greedy")
after = keras.ops.convert_to_numpy(causal_lm(ids)) * mask
weights = {weight.path: weight for weight in causal_lm.backbone.weights}
results = {
    "int8 kernels": sorted(
        path for path, weight in weights.items() if keras.backend.standardize_dtype(weight.dtype) == "int8"
    ),
    "weights": sorted(weights),
    "logits": after,
    "close to what they were": bool(abs(after - before).mean() < 0.1 * abs(before).mean()),
    "generate": causal_lm.generate(prompts, max_length=10),
}

causal_lm.save_to_preset(f"{SCRATCH}/int8")
loaded = LlamaCausalLM.from_preset(f"{SCRATCH}/int8")
results["loaded logits"] = keras.ops.convert_to_numpy(loaded(ids)) * mask
results["mode"] = loaded.backbone.token_embedding.quantization_mode
