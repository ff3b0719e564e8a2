"""Grouped-query self-attention as a Keras layer."""

import functools

import keras

from kllama.core.attention import attention, scaled_dot_product


@keras.saving.register_keras_serializable(package="kllama")
class LlamaAttention(keras.layers.Layer):
    """Let each position attend to those before it, with fewer key/value heads than query heads.

    Args:
        num_query_heads: N.
        num_key_value_heads: K, a divisor of N.
        head_dim: H, even.
        use_bias: whether query, key, value and output projections have a bias.
        dropout: rate of dropout on the attention probabilities (Hugging Face's `attention_dropout`).
        kernel_initializer: of the four projections.
        **kwargs: base layer keywords, such as `name` and `dtype`.

    Call arguments:
        hidden_states: normalized, (B, T, D).
        cos: cosines of the positions, (1 or B, T, 1, H / 2), from `RotaryEmbedding`.
        sin: sines, the same shape.
        attention_mask: bool (1 or B, 1, T, S), True where query t may see key s; without a cache also None, for plain
            causal attention.
        cache: None, or (B, 2, S, K, H): the keys and values of earlier positions.
        cache_update_index: int or int32 scalar, the slot where this call's keys and values go.

    Returns:
        Tensor (B, T, D); with a cache `(tensor, updated cache)`.

    Reference: Ainslie et al., "GQA" (arXiv:2305.13245), section 2.2.
    """

    def __init__(
        self,
        num_query_heads,
        num_key_value_heads,
        head_dim,
        use_bias=False,
        dropout=0,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.use_bias = use_bias
        self.dropout = dropout
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, hidden_states_shape):
        heads = (None, self.num_query_heads, self.head_dim)
        groups = (None, self.num_key_value_heads, self.head_dim)
        hidden_dim = hidden_states_shape[-1]
        self.query = self._projection("btd,dnh->btnh", heads, "nh", "query")
        self.key = self._projection("btd,dkh->btkh", groups, "kh", "key")
        self.value = self._projection("btd,dkh->btkh", groups, "kh", "value")
        self.attention_output = self._projection("btnh,nhd->btd", (None, hidden_dim), "d", "attention_output")
        for projection in (self.query, self.key, self.value):
            projection.build(hidden_states_shape)
        self.attention_output.build((*hidden_states_shape[:2], *heads[1:]))
        self.probability_dropout = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name="probability_dropout"
        )
        self.built = True

    def _projection(self, equation, output_shape, bias_axes, name):
        return keras.layers.EinsumDense(
            equation,
            output_shape=output_shape,
            bias_axes=bias_axes if self.use_bias else None,
            kernel_initializer=self.kernel_initializer.clone(),
            dtype=self.dtype_policy,
            name=name,
        )

    def call(self, hidden_states, cos, sin, attention_mask=None, cache=None, cache_update_index=None, training=None):
        if cache is None:
            attend = functools.partial(self._attend, attention_mask=attention_mask, training=training)
        else:
            attend = functools.partial(
                self._attend_with_cache, attention_mask=attention_mask, cache=cache, start=cache_update_index
            )
        output, cache = attention(
            hidden_states, self.query, self.key, self.value, self.attention_output, (cos, sin), attend
        )
        return output if cache is None else (output, cache)

    def _attend(self, query, key, value, *, attention_mask, training):
        dropout = functools.partial(self.probability_dropout, training=True) if training and self.dropout else None
        return scaled_dot_product(query, key, value, attention_mask, is_causal=True, dropout=dropout), None

    def _attend_with_cache(self, query, key, value, *, attention_mask, cache, start):
        keys = keras.ops.slice_update(cache[:, 0], (0, start, 0, 0), key)
        values = keras.ops.slice_update(cache[:, 1], (0, start, 0, 0), value)
        return scaled_dot_product(query, keys, values, attention_mask), keras.ops.stack([keys, values], axis=1)

    def compute_output_shape(self, hidden_states_shape):
        return hidden_states_shape

    def get_config(self):
        return {
            **super().get_config(),
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "use_bias": self.use_bias,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }
