"""The loss and the metrics of a language model from its hidden states, without an array of all logits.

`TrainingModel` calls it where nobody but the loss and the metrics of this package looks at the logits.
"""

from keras import ops

from kllama import backend
from kllama.core.linear_cross_entropy import in_chunks, linear_cross_entropy, weighted_sums
from kllama.layers.token_embedding import TokenEmbedding
from kllama.training.losses import IGNORED_ID, TokenCrossentropy, token_losses, token_weights
from kllama.training.metrics import Perplexity, TokenAccuracy


def can_fuse(loss, compiled_metrics) -> bool:
    """Tell whether `sum_losses` and `update_metrics` do what a loss and metrics, those of a compiled model, do."""
    if compiled_metrics is not None and compiled_metrics._user_metrics:  # those have no weights
        return False
    metrics = _listed(compiled_metrics)
    kinds = (TokenAccuracy, Perplexity)
    is_known = type(loss) is TokenCrossentropy and all(type(metric) in kinds for metric in metrics)
    return is_known and all(part.ignored_id == IGNORED_ID for part in (loss, *metrics))


def sum_losses(embedding: TokenEmbedding, hidden_states, labels, sample_weight=None, *, training: bool) -> tuple:
    """Sum the losses and the hits of the tokens that count.

    Args:
        embedding: the layer with the head; to train, one whose `has_plain_head` is true.
        hidden_states: (B, T, D), as the backbone gives them.
        labels: int (B, T); -100 counts for nothing.
        sample_weight: weights (B, T) or (B,), or None for ones.
        training: whether gradients are wanted.

    Returns:
        `(float32 (2,): the weighted sum of the losses in nats and of the hits, sum of the weights)`. A hit is a label
        whose logit is the largest.
    """
    weights = ops.reshape(token_weights(labels, sample_weight), (-1,))
    labels = ops.reshape(
        ops.where(ops.equal(ops.cast(labels, "int32"), IGNORED_ID), 0, ops.cast(labels, "int32")), (-1,)
    )
    rows = ops.reshape(hidden_states, (-1, hidden_states.shape[-1]))
    if training:
        kernel = embedding.head_kernel(rows.dtype)
        head, tied = embedding.head_variable, embedding.tie_weights
        sums = linear_cross_entropy(rows, kernel, labels, weights, transpose=tied, trains_kernel=head.trainable)
    else:
        sums = _sum_through_head(embedding, rows, labels, weights)
    return sums, ops.sum(weights)


def update_metrics(compiled_metrics, sums, weight) -> None:
    """Add sums of losses and hits, float32 (2,), and of weights to the metrics of a compiled model."""
    for metric in _listed(compiled_metrics):
        metric.total.assign_add(sums[1] if type(metric) is TokenAccuracy else sums[0])
        metric.count.assign_add(weight)


def _listed(compiled_metrics) -> list:
    # Not `metrics`, which is empty until the first step is over.
    weighted = None if compiled_metrics is None else compiled_metrics._user_weighted_metrics
    return weighted if isinstance(weighted, list) else [weighted] if weighted else []


def _sum_through_head(embedding, hidden_states, labels, weights):
    """Sum as `linear_cross_entropy` does, for any head; a gradient would keep all logits."""

    def sums(hidden_states, labels, weights):
        logits = embedding(hidden_states[None], reverse=True)[0]
        losses = token_losses(labels, logits)
        return weighted_sums(losses, backend.argmax(logits) == labels, weights)

    def run(total, rows):
        return total + sums(*rows), total[:1]

    chunks = in_chunks((hidden_states, labels, weights), embedding.input_dim)
    return backend.scan(run, backend.full((2,), 0.0, "float32", weights), chunks)[0]
