"""Grouped-query self-attention as a Keras layer."""

import functools

import keras

from kllama.core.attention import attention, scaled_dot_product
from kllama.layers.rms_norm import RMSNorm


@keras.saving.register_keras_serializable(package="kllama")
class LlamaAttention(keras.layers.Layer):
    """Let each position attend to those before it, with fewer key/value heads than query heads.

    Args:
        num_query_heads: N.
        num_key_value_heads: K, a divisor of N.
        head_dim: H, even.
        use_bias: whether query, key and value projections have a bias.
        use_output_bias: whether the output projection has one; None means as the others.
        qk_norm_epsilon: None, or the epsilon by which the queries and keys of each head are normalized (RMS) before
            they are rotated (Qwen3).
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
        use_output_bias=None,
        qk_norm_epsilon=None,
        dropout=0,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.use_bias = use_bias
        self.use_output_bias = use_bias if use_output_bias is None else use_output_bias
        self.qk_norm_epsilon = qk_norm_epsilon
        self.dropout = dropout
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, hidden_states_shape):
        heads = (None, self.num_query_heads, self.head_dim)
        groups = (None, self.num_key_value_heads, self.head_dim)
        hidden_dim = hidden_states_shape[-1]
        bias = self.use_bias
        self.query = self._projection("btd,dnh->btnh", heads, "nh" if bias else None, "query")
        self.key = self._projection("btd,dkh->btkh", groups, "kh" if bias else None, "key")
        self.value = self._projection("btd,dkh->btkh", groups, "kh" if bias else None, "value")
        self.attention_output = self._projection(
            "btnh,nhd->btd", (None, hidden_dim), "d" if self.use_output_bias else None, "attention_output"
        )
        for projection in (self.query, self.key, self.value):
            projection.build(hidden_states_shape)
        self.attention_output.build((*hidden_states_shape[:2], *heads[1:]))
        if self.qk_norm_epsilon is not None:
            self.query_norm = self._norm("query_norm")
            self.key_norm = self._norm("key_norm")
        self.probability_dropout = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name="probability_dropout"
        )
        self.built = True

    def _projection(self, equation, output_shape, bias_axes, name):
        return keras.layers.EinsumDense(
            equation,
            output_shape=output_shape,
            bias_axes=bias_axes,
            kernel_initializer=self.kernel_initializer.clone(),
            dtype=self.dtype_policy,
            name=name,
        )

    def _norm(self, name):
        norm = RMSNorm(self.qk_norm_epsilon, dtype=self.dtype_policy, name=name)
        norm.build((None, None, None, self.head_dim))
        return norm

    def _normalized_query(self, hidden_states):
        return self.query_norm(self.query(hidden_states))

    def _normalized_key(self, hidden_states):
        return self.key_norm(self.key(hidden_states))

    def call(self, hidden_states, cos, sin, attention_mask=None, cache=None, cache_update_index=None, training=None):
        if cache is None:
            attend = functools.partial(self._attend, attention_mask=attention_mask, training=training)
        else:
            attend = functools.partial(
                self._attend_with_cache, attention_mask=attention_mask, cache=cache, start=cache_update_index
            )
        query, key = self.query, self.key
        if self.qk_norm_epsilon is not None:
            query, key = self._normalized_query, self._normalized_key
        output, cache = attention(hidden_states, query, key, self.value, self.attention_output, (cos, sin), attend)
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
            "use_output_bias": self.use_output_bias,
            "qk_norm_epsilon": self.qk_norm_epsilon,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }
