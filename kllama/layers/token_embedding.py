"""Token embedding and language model head."""

import keras

from kllama import backend


@keras.saving.register_keras_serializable(package="kllama")
class TokenEmbedding(keras.layers.ReversibleEmbedding):
    """Turn token ids into hidden states, and hidden states into float32 logits.

    A `keras.layers.ReversibleEmbedding` whose reverse direction, the head, accumulates and answers in float32 in every
    dtype policy, without a float32 copy of the head.

    Args:
        input_dim: V, the vocabulary size.
        output_dim: D, the hidden dim.
        tie_weights: whether the head is the transposed embedding table or a matrix of its own.
        **kwargs: those of `keras.layers.ReversibleEmbedding`, but for `reverse_dtype` and `logit_soft_cap`, which stay
            None.

    Raises:
        ValueError: for a `reverse_dtype` or a `logit_soft_cap`.

    Call arguments:
        inputs: token ids (B, T), or hidden states (..., D) with `reverse=True`.
        reverse: whether to compute logits.

    Returns:
        Hidden states (B, T, D) in the compute dtype, or logits (..., V) in float32.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, value in {"reverse_dtype": self.reverse_dtype, "logit_soft_cap": self.logit_soft_cap}.items():
            if value is not None:
                raise ValueError(f"{name} ({value!r}) must be None: a Llama's logits are float32 and have no cap.")

    def call(self, inputs, reverse=False):
        if not reverse:
            return super().call(inputs)
        head = keras.ops.transpose(self.embeddings) if self.tie_weights else self.reverse_embeddings.value
        # Keras' embedding layers switch off the automatic cast of their weights.
        return backend.matmul_float32(inputs, backend.cast(head, inputs.dtype))

    def quantized_call(self, inputs, reverse=False):
        outputs = super().quantized_call(inputs, reverse=reverse)
        return backend.cast(outputs, "float32") if reverse else outputs

    def compute_output_spec(self, inputs, reverse=False):
        spec = super().compute_output_spec(inputs, reverse=reverse)
        return keras.KerasTensor(spec.shape, dtype="float32") if reverse else spec
