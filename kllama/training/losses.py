"""The loss of a causal language model."""

import keras
from keras import ops

IGNORED_ID = -100
"""The label that stands for "no label here", as in PyTorch and transformers."""


@keras.saving.register_keras_serializable(package="kllama")
class TokenCrossentropy(keras.losses.Loss):
    """Average the cross-entropy of the next token over the tokens that count.

    The sum of weighted losses is divided by the sum of weights, so padding neither adds to the loss nor dilutes it:
    the same text gives the same loss at every padded length. Computed in float32.

    Args:
        ignored_id: the label of positions that count for nothing. Defaults to -100.
        name: name of the loss.

    Call arguments:
        y_true: int labels (B, T).
        y_pred: logits (B, T, V).
        sample_weight: weights (B, T) or (B,), or None for ones.

    Returns:
        Scalar in nats per token; 0 where no token counts.
    """

    def __init__(self, ignored_id: int = IGNORED_ID, name: str = "token_crossentropy"):
        super().__init__(name=name, reduction="mean_with_sample_weight", dtype="float32")
        self.ignored_id = ignored_id

    def __call__(self, y_true, y_pred, sample_weight=None):
        weights = token_weights(y_true, sample_weight, self.ignored_id)
        losses = self.call(y_true, y_pred)
        return ops.divide_no_nan(ops.sum(losses * weights), ops.sum(weights))

    def call(self, y_true, y_pred):
        return token_losses(y_true, y_pred, self.ignored_id)

    def get_config(self):
        return {"name": self.name, "ignored_id": self.ignored_id}


def token_losses(labels, logits, ignored_id: int = IGNORED_ID):
    """Compute the cross-entropy of each label, in nats.

    Args:
        labels: ints (B, T).
        logits: (B, T, V).
        ignored_id: where a label is this, the loss given means nothing (but is finite).

    Returns:
        float32 (B, T).
    """
    labels = _valid_labels(labels, ignored_id)
    logits = ops.cast(logits, "float32")
    chosen = ops.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return ops.logsumexp(logits, axis=-1) - chosen


def token_weights(labels, sample_weight, ignored_id: int = IGNORED_ID):
    """Give the weight of each label: `sample_weight` where the label counts, 0 where it is ignored; float32 (B, T)."""
    counted = ops.cast(ops.not_equal(ops.cast(labels, "int32"), ignored_id), "float32")
    if sample_weight is None:
        return counted
    # (B,) becomes (B, 1); TensorFlow may not know the rank.
    rows = ops.reshape(ops.cast(sample_weight, "float32"), (ops.shape(labels)[0], -1))
    return counted * rows


def _valid_labels(labels, ignored_id):
    labels = ops.cast(labels, "int32")
    return ops.where(ops.equal(labels, ignored_id), 0, labels)
