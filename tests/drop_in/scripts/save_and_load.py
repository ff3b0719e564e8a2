# ruff: noqa: F821
"""Save and load: presets, .keras files, weights files and configs."""

import keras
from keras_hub.models import Llama3CausalLM, LlamaBackbone, LlamaCausalLM, LlamaCausalLMPreprocessor, LlamaTokenizer

causal_lm = LlamaCausalLM.from_preset(PRESET)
causal_lm.compile(sampler="greedy", optimizer="sgd", loss="sparse_categorical_crossentropy")
ids = causal_lm.preprocessor.generate_preprocess(["the quick brown", "a girl"], sequence_length=8)
ids = {name: keras.ops.convert_to_numpy(array) for name, array in ids.items()}


def logits(model):
    return keras.ops.convert_to_numpy(model(ids)) * ids["padding_mask"][..., None]


results = {"logits": logits(causal_lm)}
causal_lm.save_to_preset(f"{SCRATCH}/preset")
results["preset"] = logits(LlamaCausalLM.from_preset(f"{SCRATCH}/preset"))
results["parts"] = [
    LlamaBackbone.from_preset(f"{SCRATCH}/preset").count_params(),
    LlamaTokenizer.from_preset(f"{SCRATCH}/preset").vocabulary_size(),
    LlamaCausalLMPreprocessor.from_preset(f"{SCRATCH}/preset").sequence_length,
]
causal_lm.save_to_preset(f"{SCRATCH}/shards", max_shard_size=0.00003)
results["shards"] = logits(LlamaCausalLM.from_preset(f"{SCRATCH}/shards"))

causal_lm.save(f"{SCRATCH}/model.keras")
loaded = keras.saving.load_model(f"{SCRATCH}/model.keras")
results["keras file"] = logits(loaded)
results["text of a keras file"] = loaded.preprocessor.tokenizer.detokenize([5, 300])
results["optimizer of a keras file"] = type(loaded.optimizer).__name__

causal_lm.save_weights(f"{SCRATCH}/model.weights.h5")
empty = LlamaCausalLM.from_preset(PRESET, load_weights=False)
empty.load_weights(f"{SCRATCH}/model.weights.h5")
results["weights file"] = logits(empty)

config = causal_lm.backbone.get_config()
twin = LlamaBackbone.from_config(config)
twin.set_weights(causal_lm.backbone.get_weights())
results["config"] = keras.ops.convert_to_numpy(twin(ids)) * ids["padding_mask"][..., None]
results["config keys"] = [config[key] for key in ("vocabulary_size", "num_layers", "hidden_dim", "layer_norm_epsilon")]
results["sequence_length"] = causal_lm.preprocessor.get_config()["sequence_length"]

llama3 = Llama3CausalLM.from_preset(LLAMA3_PRESET)
llama3.save(f"{SCRATCH}/llama3.keras")
ids = {"token_ids": ids["token_ids"] % 200, "padding_mask": ids["padding_mask"]}
results["Llama 3"] = logits(keras.saving.load_model(f"{SCRATCH}/llama3.keras"))
results["task config"] = type(LlamaCausalLM.from_config(causal_lm.get_config())).__name__
