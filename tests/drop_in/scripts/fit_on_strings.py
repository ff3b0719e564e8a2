# ruff: noqa: F821
"""Train on strings, in a list and in a dataset; evaluate and predict."""

import keras
import tensorflow as tf
from keras_hub.models import LlamaCausalLM

features = ["the quick brown fox jumped over the lazy dog", "once upon a time", "a girl", "the fox saw the dog"]
results = {}

# With the defaults, of which the loss is a listed difference.
keras.utils.set_random_seed(1)
causal_lm = LlamaCausalLM.from_preset(PRESET)
history = causal_lm.fit(x=features, batch_size=2, shuffle=False, verbose=0)
results["epochs"] = history.epoch
results["default loss"] = history.history["loss"]

# With a loss and a metric of Keras. The first text fills a row, so no row is shorter than `sequence_length`.
causal_lm = LlamaCausalLM.from_preset(PRESET)
causal_lm.preprocessor.sequence_length = 10
causal_lm.compile(
    optimizer=keras.optimizers.Adam(1e-2),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
)
history = causal_lm.fit(features, batch_size=2, epochs=2, shuffle=False, verbose=0, validation_data=(features[:2],))
results["history keys"] = sorted(history.history)
results["history"] = [history.history[key] for key in sorted(history.history)]

dataset = tf.data.Dataset.from_tensor_slices(features).batch(2)
history = causal_lm.fit(dataset, verbose=0)
results["loss of a dataset"] = history.history["loss"]
results["evaluate"] = causal_lm.evaluate(features, batch_size=2, verbose=0)
results["evaluate, as a dict"] = causal_lm.evaluate(dataset, verbose=0, return_dict=True)["loss"]
results["predict"] = causal_lm.predict(features, batch_size=2, verbose=0)[:, :4]
results["predict on a dataset"] = causal_lm.predict(dataset, verbose=0)[:, :4]
