# ruff: noqa: F821
"""Train without a preprocessor, on ids with explicit labels and weights; and what KerasHub gives by default."""

import keras
import numpy as np
from keras_hub.models import LlamaBackbone, LlamaCausalLM

x = {
    "token_ids": np.array([[1, 300, 12, 13, 14, 15, 300, 2], [1, 40, 41, 42, 43, 44, 45, 46]]),
    "padding_mask": np.array([[1, 1, 1, 1, 1, 1, 1, 1]] * 2),
}
y = np.roll(x["token_ids"], -1, axis=1)
sample_weight = np.array([[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]], "float32")

causal_lm = LlamaCausalLM.from_preset(PRESET, preprocessor=None)
causal_lm.compile(
    optimizer=keras.optimizers.SGD(0.1, momentum=0.9),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="weighted")],
    sampler="greedy",
)
history = causal_lm.fit(x=x, y=y, sample_weight=sample_weight, batch_size=2, epochs=2, verbose=0)
results = {
    "history keys": list(history.history),
    "history": list(history.history.values()),
    "one batch": causal_lm.train_on_batch(x, y, sample_weight=sample_weight),
    "predict": causal_lm.predict(x, verbose=0),
    "test batch": causal_lm.test_on_batch(x, y, sample_weight=sample_weight, return_dict=True)["loss"],
    "head": keras.ops.convert_to_numpy(causal_lm.backbone.token_embedding.reverse_embeddings),
}

# With the defaults, on rows without padding: there is nothing for padding to dilute.
backbone = LlamaBackbone.from_preset(PRESET)
causal_lm = LlamaCausalLM(backbone, None)
history = causal_lm.fit(x, y, sample_weight=np.ones((2, 8)), epochs=2, verbose=0)
results["loss without padding"] = history.history["loss"]
results["the accuracy is there"] = "sparse_categorical_accuracy" in history.history
