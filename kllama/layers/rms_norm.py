"""Root mean square normalization as a Keras layer."""

import keras

from kllama.core.normalization import rms_norm


@keras.saving.register_keras_serializable(package="kllama")
class RMSNorm(keras.layers.Layer):
    """Normalize hidden states by their root mean square and scale them.

    Computed in float32, cast back, then scaled; see `kllama.core.normalization.rms_norm`.

    Args:
        epsilon: positive float, added to the mean square.
        **kwargs: base layer keywords, such as `name` and `dtype`.

    Call arguments:
        hidden_states: (..., D).

    Returns:
        Tensor of the input's shape in the compute dtype.
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, hidden_states_shape):
        self.scale = self.add_weight(name="scale", shape=(hidden_states_shape[-1],), initializer="ones")
        self.built = True

    def call(self, hidden_states):
        return rms_norm(hidden_states, self.scale.value, self.epsilon)

    def compute_output_shape(self, hidden_states_shape):
        return hidden_states_shape

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}
