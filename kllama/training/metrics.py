"""What `fit` reports about a causal language model besides its loss."""

import keras
from keras import ops

from kllama.training.losses import IGNORED_ID, token_losses, token_weights


@keras.saving.register_keras_serializable(package="kllama")
class TokenAccuracy(keras.metrics.Mean):
    """Report the share of counted tokens whose label has the largest logit.

    Labels are compared as integers in every dtype policy: in bfloat16, where Keras' own metrics compare them, ids above
    256 are not told apart.

    Args:
        ignored_id: the label of positions that count for nothing. Defaults to -100.
        name: name of the metric.

    `update_state(y_true, y_pred, sample_weight)` takes labels (B, T), logits (B, T, V) and weights (B, T), (B,) or
    None.
    """

    def __init__(self, ignored_id: int = IGNORED_ID, name: str = "token_accuracy"):
        super().__init__(name=name, dtype="float32")
        self.ignored_id = ignored_id

    def update_state(self, y_true, y_pred, sample_weight=None):
        hits = ops.equal(ops.cast(y_true, "int32"), ops.cast(ops.argmax(y_pred, axis=-1), "int32"))
        weights = token_weights(y_true, sample_weight, self.ignored_id)
        super().update_state(ops.cast(hits, "float32"), sample_weight=weights)

    def get_config(self):
        return {"name": self.name, "ignored_id": self.ignored_id}


@keras.saving.register_keras_serializable(package="kllama")
class Perplexity(keras.metrics.Mean):
    """Report e to the mean cross-entropy of all counted tokens.

    Args:
        ignored_id: the label of positions that count for nothing. Defaults to -100.
        name: name of the metric.

    `update_state(y_true, y_pred, sample_weight)` takes labels (B, T), logits (B, T, V) and weights (B, T), (B,) or
    None.
    """

    def __init__(self, ignored_id: int = IGNORED_ID, name: str = "perplexity"):
        super().__init__(name=name, dtype="float32")
        self.ignored_id = ignored_id

    def update_state(self, y_true, y_pred, sample_weight=None):
        weights = token_weights(y_true, sample_weight, self.ignored_id)
        super().update_state(token_losses(y_true, y_pred, self.ignored_id), sample_weight=weights)

    def result(self):
        return ops.exp(super().result())

    def get_config(self):
        return {"name": self.name, "ignored_id": self.ignored_id}
