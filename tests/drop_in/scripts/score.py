# ruff: noqa: F821
"""Score what was generated: logits, losses, and a function that changes what flows between the layers."""

import keras
from keras_hub.models import Llama3CausalLM

llama_lm = Llama3CausalLM.from_preset(LLAMA3_PRESET)
llama_lm.compile(sampler="greedy")
generations = llama_lm.generate(["the fox", "a dog"], max_length=10)
preprocessed = llama_lm.preprocessor.generate_preprocess(generations, sequence_length=40)
generation_ids = preprocessed["token_ids"]
padding_mask = preprocessed["padding_mask"]
target_ids = keras.ops.roll(generation_ids, shift=-1, axis=1)

lengths = [int(length) for length in keras.ops.sum(keras.ops.cast(padding_mask, "int32"), axis=1)]
seen = []


def layer_intercept_fn(x, i):
    seen.append((i, tuple(x.shape)))
    return x if i else x * 0.5


def score(**arguments):
    scores = keras.ops.convert_to_numpy(llama_lm.score(token_ids=generation_ids, **arguments))
    return [row[:length] for row, length in zip(scores, lengths, strict=True)]


results = {
    "logits": score(padding_mask=padding_mask),
    "logits without a mask": score(),
    "loss": score(padding_mask=padding_mask, scoring_mode="loss", target_ids=target_ids),
    "changed": score(padding_mask=padding_mask, layer_intercept_fn=layer_intercept_fn),
    "changed loss": score(scoring_mode="loss", layer_intercept_fn=layer_intercept_fn, target_ids=target_ids),
    "calls": [list(shape) + [i] for i, shape in seen],
    "positional": keras.ops.convert_to_numpy(llama_lm.score(generation_ids, None, "logits")),
}

for arguments in ({"scoring_mode": "perplexity"}, {"scoring_mode": "loss"}):
    try:
        score(**arguments)
    except ValueError:
        results[f"refused {arguments}"] = True
