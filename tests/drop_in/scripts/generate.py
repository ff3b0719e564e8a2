# ruff: noqa: F821
"""Generate from a string, from lists, from a dataset and from ids; with lengths, stop tokens and a stripped prompt."""

import tensorflow as tf
from keras_hub.models import Llama3CausalLM, LlamaCausalLM

causal_lm = LlamaCausalLM.from_preset(PRESET)
causal_lm.compile(sampler="greedy")
prompts = ["the quick", "a little girl who had"]
dataset = tf.data.Dataset.from_tensor_slices(["the", "the fox", "a dog", "once"]).batch(2)
without = causal_lm.generate(prompts, max_length=14, stop_token_ids=None)
stop = int(causal_lm.preprocessor.tokenizer(without[0])[5])

results = {
    "string": causal_lm.generate("the quick"),
    "list": causal_lm.generate(prompts, max_length=14),
    "stripped": causal_lm.generate(prompts, max_length=14, strip_prompt=True),
    "dataset": causal_lm.generate(dataset, max_length=14),
    "without a stop": without,
    "with two stops": causal_lm.generate(prompts, max_length=14, stop_token_ids=[2, stop]),
}

preprocessor = causal_lm.preprocessor
ids = preprocessor.generate_preprocess(prompts, sequence_length=14)
causal_lm.preprocessor = None
output = causal_lm.generate(ids, stop_token_ids=None)
stopped = causal_lm.generate(ids, stop_token_ids=(2, stop))
results |= {
    "ids": output["token_ids"],
    "mask": output["padding_mask"],
    "ids with stops": stopped["token_ids"] * stopped["padding_mask"],
    "mask with stops": stopped["padding_mask"],
    "text of ids": preprocessor.generate_postprocess(output),
}

llama3 = Llama3CausalLM.from_preset(LLAMA3_PRESET)
llama3.compile(sampler="greedy")
results["Llama 3"] = llama3.generate(["the dog", "the fox"], max_length=12)
