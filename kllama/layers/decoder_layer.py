"""One decoder layer of a Llama as a Keras layer."""

import functools

import keras

from kllama.core.activations import get_activation
from kllama.core.decoder_block import decoder_block
from kllama.core.feed_forward import feed_forward
from kllama.layers.attention import LlamaAttention
from kllama.layers.rms_norm import RMSNorm


@keras.saving.register_keras_serializable(package="kllama")
class LlamaDecoderLayer(keras.layers.Layer):
    """Attention and a gated feed-forward network, each on normalized input, each added to its input.

    Args:
        num_query_heads: N.
        num_key_value_heads: K, a divisor of N.
        head_dim: H, even.
        intermediate_dim: F, the width of the feed-forward network.
        activation: name of the activation on the gate; see `kllama.core.activations`.
        layer_norm_epsilon: epsilon of both normalizations.
        dropout: rate of dropout on the attention output.
        attention_dropout: rate of dropout on the attention probabilities.
        attention_bias: whether query, key and value projections have a bias.
        attention_output_bias: whether the attention output projection has one; None means as those.
        qk_norm: whether queries and keys are normalized, with the same epsilon.
        mlp_bias: whether gate, intermediate and output projections have a bias.
        kernel_initializer: of all projections.
        **kwargs: base layer keywords, such as `name` and `dtype`.

    Call arguments:
        hidden_states: (B, T, D).
        cos, sin, attention_mask, cache, cache_update_index: those of `LlamaAttention`.

    Returns:
        Hidden states (B, T, D); with a cache `(hidden states, updated cache)`.

    Reference: Touvron et al., "LLaMA" (arXiv:2302.13971), section 2.2.
    """

    def __init__(
        self,
        num_query_heads,
        num_key_value_heads,
        head_dim,
        intermediate_dim,
        activation="silu",
        layer_norm_epsilon=1e-6,
        dropout=0,
        attention_dropout=0,
        attention_bias=False,
        attention_output_bias=None,
        qk_norm=False,
        mlp_bias=False,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_dim = intermediate_dim
        self.activation = activation
        self.layer_norm_epsilon = layer_norm_epsilon
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.attention_bias = attention_bias
        self.attention_output_bias = attention_bias if attention_output_bias is None else attention_output_bias
        self.qk_norm = qk_norm
        self.mlp_bias = mlp_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.activation_function = get_activation(activation)

    def build(self, hidden_states_shape):
        *batch_shape, hidden_dim = hidden_states_shape
        policy = self.dtype_policy
        # In KerasHub's order: its LoRA files name layers by their place, and its `get_weights` lists arrays by theirs.
        self.self_attention = LlamaAttention(
            self.num_query_heads,
            self.num_key_value_heads,
            self.head_dim,
            use_bias=self.attention_bias,
            use_output_bias=self.attention_output_bias,
            qk_norm_epsilon=self.layer_norm_epsilon if self.qk_norm else None,
            dropout=self.attention_dropout,
            kernel_initializer=self.kernel_initializer,
            dtype=policy,
            name="self_attention",
        )
        self.self_attention_layernorm = RMSNorm(self.layer_norm_epsilon, dtype=policy, name="self_attention_layernorm")
        self.self_attention_dropout = keras.layers.Dropout(self.dropout, dtype=policy, name="self_attention_dropout")
        self.feedforward_intermediate_dense = self._dense(self.intermediate_dim, "feedforward_intermediate_dense")
        self.feedforward_gate_dense = self._dense(self.intermediate_dim, "feedforward_gate_dense")
        self.feedforward_output_dense = self._dense(hidden_dim, "feedforward_output_dense")
        self.feedforward_layernorm = RMSNorm(self.layer_norm_epsilon, dtype=policy, name="feedforward_layernorm")
        self.feedforward_output_dense.build((*batch_shape, self.intermediate_dim))
        for layer in (
            self.self_attention,
            self.self_attention_layernorm,
            self.feedforward_layernorm,
            self.feedforward_gate_dense,
            self.feedforward_intermediate_dense,
        ):
            layer.build(hidden_states_shape)
        self.built = True

    def _dense(self, units, name):
        return keras.layers.EinsumDense(
            "btd,df->btf",
            output_shape=(None, units),
            bias_axes="f" if self.mlp_bias else None,
            kernel_initializer=self.kernel_initializer.clone(),
            dtype=self.dtype_policy,
            name=name,
        )

    def call(self, hidden_states, cos, sin, attention_mask=None, cache=None, cache_update_index=None, training=None):
        def attend(x):
            output = self.self_attention(
                x,
                cos,
                sin,
                attention_mask=attention_mask,
                cache=cache,
                cache_update_index=cache_update_index,
                training=training,
            )
            output, updated_cache = (output, None) if cache is None else output
            return self.self_attention_dropout(output, training=training), updated_cache

        feed = functools.partial(
            feed_forward,
            gate=self.feedforward_gate_dense,
            up=self.feedforward_intermediate_dense,
            down=self.feedforward_output_dense,
            activation=self.activation_function,
        )
        hidden_states, cache = decoder_block(
            hidden_states, self.self_attention_layernorm, attend, self.feedforward_layernorm, feed
        )
        return hidden_states if cache is None else (hidden_states, cache)

    def compute_output_shape(self, hidden_states_shape):
        return hidden_states_shape

    def get_config(self):
        return {
            **super().get_config(),
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "intermediate_dim": self.intermediate_dim,
            "activation": self.activation,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "attention_bias": self.attention_bias,
            "attention_output_bias": self.attention_output_bias,
            "qk_norm": self.qk_norm,
            "mlp_bias": self.mlp_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }
