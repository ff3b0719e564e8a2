# ruff: noqa: F821
"""Fine-tune with LoRA, save what was trained, and load it into a fresh model."""

import keras
import numpy as np
from keras_hub.models import LlamaCausalLM

features = ["the quick brown fox jumped", "once upon a time there was"]


def count(weights):
    return sum(int(np.prod(weight.shape)) for weight in weights)


keras.utils.set_random_seed(1)
causal_lm = LlamaCausalLM.from_preset(PRESET)
before = count(causal_lm.trainable_weights)
causal_lm.backbone.enable_lora(rank=4)
results = {
    "trainable before": before,
    "trainable after": count(causal_lm.trainable_weights),
    "all after": count(causal_lm.weights),
    "number of trained weights": len(causal_lm.trainable_weights),
    "names of trained weights": sorted({weight.name for weight in causal_lm.trainable_weights}),
}
causal_lm.preprocessor.sequence_length = 7
causal_lm.compile(
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    optimizer=keras.optimizers.AdamW(learning_rate=5e-2, weight_decay=0.01),
    weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
)
causal_lm.backbone.load_lora_weights(LORA)
ids = causal_lm.preprocessor.generate_preprocess(features)
results["logits with the adapter"] = keras.ops.convert_to_numpy(causal_lm(ids))[:, :6]
history = causal_lm.fit(features, epochs=3, batch_size=2, verbose=0)
results["loss"] = history.history["loss"]
trained = keras.ops.convert_to_numpy(causal_lm(ids))[:, :6]
results["logits after training"] = trained

causal_lm.backbone.save_lora_weights(f"{SCRATCH}/model.lora.h5")
fresh = LlamaCausalLM.from_preset(PRESET)
fresh.backbone.load_lora_weights(f"{SCRATCH}/model.lora.h5")
loaded = keras.ops.convert_to_numpy(fresh(ids))[:, :6]
results["loaded equals trained"] = bool(np.allclose(loaded, trained, atol=1e-5))
