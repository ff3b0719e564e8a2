"""The attention mask of a forward pass, as a Keras layer without variables."""

import keras

from kllama.core.masks import cached_causal_mask, causal_mask


@keras.saving.register_keras_serializable(package="kllama")
class CausalMask(keras.layers.Layer):
    """Build the mask that all layers share, or None where a causal flag says it all.

    Call arguments:
        padding_mask: None, or (B, T) with 1 for real tokens.

    Returns:
        None, or bool (B, 1, T, T): True where query t may see key s; see `kllama.core.masks.causal_mask`.
    """

    def call(self, padding_mask):
        return causal_mask(padding_mask)

    def for_cache(self, token_ids, num_slots: int, start):
        """Build the mask of new tokens (B, T) at slots `start` and on of a cache of S slots: bool (1, 1, T, S)."""
        return cached_causal_mask(token_ids, num_slots, start)

    def compute_output_spec(self, padding_mask):
        batch_size, length = padding_mask.shape
        return keras.KerasTensor((batch_size, 1, length, length), dtype="bool")

    def get_config(self):
        return super().get_config()  # Keras cannot derive it where `dtype` is a policy map.
