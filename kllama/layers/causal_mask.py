"""The attention mask of a forward pass, as a Keras layer without variables."""

import keras

from kllama.core.masks import cached_causal_mask, causal_mask


@keras.saving.register_keras_serializable(package="kllama")
class CausalMask(keras.layers.Layer):
    """Build the mask that layers share, or None where a causal flag says it all.

    Args:
        window: None, or the number of keys that a query sees at most: a sliding window.
        **kwargs: base layer keywords, such as `name` and `dtype`.

    Call arguments:
        token_ids: (B, T); only its length is read.
        padding_mask: None, or (B, T) with 1 for real tokens.

    Returns:
        None, or bool (1 or B, 1, T, T): True where query t may see key s; see `kllama.core.masks.causal_mask`.
    """

    def __init__(self, window: int | None = None, **kwargs):
        super().__init__(**kwargs)
        self.window = window
        self.built = True

    def call(self, token_ids, padding_mask=None):
        return causal_mask(token_ids, padding_mask, self.window)

    def for_cache(self, token_ids, num_slots: int, start):
        """Build the mask of new tokens (B, T) at slots `start` and on of a cache of S slots: bool (1, 1, T, S)."""
        return cached_causal_mask(token_ids, num_slots, start, self.window)

    def compute_output_spec(self, token_ids, padding_mask=None):
        length = token_ids.shape[1]
        batch_size = 1 if padding_mask is None else token_ids.shape[0]
        return keras.KerasTensor((batch_size, 1, length, length), dtype="bool")

    def get_config(self):
        return {**super().get_config(), "window": self.window}
