"""The rotary position tables of a forward pass, as a Keras layer without variables."""

import keras

from kllama import backend
from kllama.core.rope import RotaryFrequencies, rotary_tables
from kllama.core.rope_scaling import check_rope_scaling


@keras.saving.register_keras_serializable(package="kllama")
class RotaryEmbedding(keras.layers.Layer):
    """Compute the cosines and sines by which attention turns queries and keys, once for all layers.

    Args:
        head_dim: H, even.
        max_wavelength: theta, the base of the geometric series of frequencies.
        rope_scaling: None or a mapping with Hugging Face's keys; see `kllama.core.rope_scaling`.
        max_sequence_length: the model's longest sequence, or None; some types of `rope_scaling` need it.
        **kwargs: base layer keywords, such as `name` and `dtype`.

    Call arguments:
        token_ids: (B, T); only its length is read.
        padding_mask: None, or (B, T) with 1 for real tokens. The types whose frequencies change with the length
            (dynamic, longrope) take it from the last real position, never from padding.
        start_index: int or int32 scalar, the absolute position of the first token.
        length: int32 scalar, the number of positions for those types; None takes it from this call.

    Returns:
        `(cos, sin)`, each (1, T, 1, H / 2) in the compute dtype.
    """

    def __init__(self, head_dim, max_wavelength=10000, rope_scaling=None, max_sequence_length=None, **kwargs):
        super().__init__(**kwargs)
        if rope_scaling is not None:
            rope_scaling = check_rope_scaling(rope_scaling, head_dim, max_sequence_length)
        self.head_dim = head_dim
        self.max_wavelength = max_wavelength
        self.rope_scaling = rope_scaling
        self.max_sequence_length = max_sequence_length
        self._frequencies = RotaryFrequencies(head_dim, max_wavelength, rope_scaling, max_sequence_length)
        self.built = True

    @property
    def depends_on_length(self) -> bool:
        """Whether the tables change with the number of positions of a call (dynamic, longrope)."""
        return self._frequencies.depends_on_length

    def call(self, token_ids, padding_mask=None, start_index=0, length=None):
        positions = backend.arange(backend.shape(token_ids)[1], token_ids)
        if length is None and self._frequencies.depends_on_length:
            length = self._num_real_positions(positions, padding_mask) + start_index
        return self.tables(positions + start_index, self.frequencies(length, token_ids))

    def frequencies(self, length, like):
        """Give the inverse frequencies, float32 (H / 2,), for those types that depend on it of `length` positions."""
        return self._frequencies.at(length, like)

    def tables(self, positions, frequencies) -> tuple:
        """Give `(cos, sin)` of absolute positions (T,) or (B, T), each (1 or B, T, 1, H / 2) in the compute dtype."""
        return rotary_tables(positions, frequencies, self._frequencies.attention_factor, self.compute_dtype)

    def _num_real_positions(self, positions, padding_mask):
        if padding_mask is None:
            return backend.shape(positions)[0]
        return backend.reduce_max(backend.where(backend.cast(padding_mask, "bool"), positions + 1, 0))

    def compute_output_spec(self, token_ids, padding_mask=None, start_index=0, length=None):
        shape = (1, token_ids.shape[1], 1, self.head_dim // 2)
        # Two objects: Keras tells the outputs of a layer apart by identity.
        return tuple(keras.KerasTensor(shape, dtype=self.compute_dtype) for _ in ("cos", "sin"))

    def get_config(self):
        return {
            **super().get_config(),
            "head_dim": self.head_dim,
            "max_wavelength": self.max_wavelength,
            "rope_scaling": self.rope_scaling,
            "max_sequence_length": self.max_sequence_length,
        }
