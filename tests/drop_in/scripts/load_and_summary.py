# ruff: noqa: F821
"""Load models in the ways that guides show, look at them, and call them on ids."""

import keras
import numpy as np
from keras_hub.models import Llama3CausalLM, LlamaBackbone, LlamaCausalLM, LlamaCausalLMPreprocessor, LlamaTokenizer

model = LlamaCausalLM.from_preset(PRESET)
lines = []
model.summary(print_fn=lambda line, *args: lines.append(line))
summary = "\n".join(lines)

backbone = LlamaBackbone.from_preset(PRESET)
tokenizer = LlamaTokenizer.from_preset(PRESET)
preprocessor = LlamaCausalLMPreprocessor.from_preset(PRESET, sequence_length=12)
built = LlamaCausalLM(backbone=backbone, preprocessor=preprocessor)
random = LlamaCausalLM.from_preset(PRESET, load_weights=False)
llama3 = Llama3CausalLM.from_preset(LLAMA3_PRESET)
half = LlamaCausalLM.from_preset(PRESET, dtype="bfloat16")

batch = preprocessor.generate_preprocess(["the quick brown", "a fox"])
x, y, sample_weight = preprocessor(["the quick brown", "a fox"])
ids3 = {"token_ids": np.arange(24).reshape(2, 12), "padding_mask": np.ones((2, 12), "int32")}
mask = keras.ops.convert_to_numpy(batch["padding_mask"])[..., None]
logits = keras.ops.convert_to_numpy(built(batch))
results = {
    "summary names the parts": [name in summary for name in ("token_embedding", "transformer_layer_0", "Total params")],
    "num_params": model.count_params(),
    "weight_paths": [weight.path for weight in llama3.backbone.weights],
    "weight_shapes": [tuple(weight.shape) for weight in llama3.backbone.weights],
    "layer_names": [layer.name for layer in llama3.backbone.layers if layer.weights],
    "num_layers": backbone.num_layers,
    "vocabulary_size": tokenizer.vocabulary_size(),
    "tokens": [tokenizer.id_to_token(i) for i in range(5)],
    "ids": np.asarray(tokenizer("the quick brown fox")),
    "text": tokenizer.detokenize(tokenizer("the quick brown fox")),
    "special ids": [tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id],
    "prompt ids": keras.ops.convert_to_numpy(batch["token_ids"]),
    "prompt mask": mask[..., 0],
    "labels": keras.ops.convert_to_numpy(y),
    "weights of labels": keras.ops.convert_to_numpy(sample_weight),
    "hidden states": keras.ops.convert_to_numpy(backbone(batch)) * mask,
    "logits": logits * mask,
    "logits at padding": logits * ~mask,
    "logits of Llama 3": keras.ops.convert_to_numpy(llama3(ids3)),
    "random logits": tuple(random(batch).shape),
    "dtypes": [half.backbone.token_embedding.embeddings.dtype, half.compute_dtype, model.compute_dtype],
}
