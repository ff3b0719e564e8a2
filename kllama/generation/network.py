"""The forward pass that the engine runs: the blocks of `core/`, over the tensors of a model instead of its layers.

A `Network` is a view of a model's variables, made inside each compiled program and gone with it, so it cannot be stale:
on JAX and TensorFlow programs take the variables' values at each call, on PyTorch each call makes a new view. Layers
with a plain or an int8 kernel become a product over that kernel; what else stands in a projection's place (layers that
are quantised in another way, say) is called as it is.
"""

import functools
import math
from collections.abc import Callable

import keras
from keras.quantizers import AbsMaxQuantizer

from kllama import backend
from kllama.core.attention import attention
from kllama.core.decoder_block import decoder_block
from kllama.core.feed_forward import feed_forward
from kllama.core.int8 import matmul_int8
from kllama.core.normalization import rms_norm


class Network:
    """The parts of a Llama as functions of arrays.

    Args:
        backbone: a `LlamaBackbone`.

    Attributes:
        windows: for each layer the number of positions that a query sees at most, or None for all.
    """

    def __init__(self, backbone):
        self._backbone = backbone
        self._scale = backbone.layer_norm.scale.value  # some tensor that lies where all of them lie
        self._rotary = backbone.rotary_embedding
        self._frequencies = None if self._rotary.depends_on_length else self._rotary.frequencies(None, self._scale)
        self._final_norm = _normalization(backbone.layer_norm)
        self._head = _head(backbone.token_embedding)
        self._blocks = [_block(layer) for layer in backbone.transformer_layers]
        self.windows = backbone.windows

    def frequencies(self, length):
        """Give the rotary frequencies for sequences of some length, int32 scalar; mostly the same for all."""
        return self._rotary.frequencies(length, self._scale) if self._frequencies is None else self._frequencies

    def run(self, token_ids, positions, frequencies, attend: Callable) -> tuple:
        """Run tokens through all blocks.

        Args:
            token_ids: int32 (B, T).
            positions: their absolute positions, int32 (1 or B, T).
            frequencies: what `frequencies` gave.
            attend: function (query, key, value, number of the layer) -> (context, memory); see
                `kllama.core.attention.attention`.

        Returns:
            `(hidden states (B, T, D), the memory of each layer)`.
        """
        rotary = self._rotary.tables(positions, frequencies)
        x, memories = self._embed(token_ids), []
        for layer, block in enumerate(self._blocks):
            x, memory = block(x, rotary, functools.partial(attend, layer=layer))
            memories.append(memory)
        return x, memories

    def _embed(self, token_ids):
        layer = self._backbone.token_embedding
        if layer.quantization_mode is not None or layer.lora_enabled:
            return layer(token_ids)
        return backend.cast(backend.take_rows(layer.embeddings.value, token_ids), layer.compute_dtype)

    def logits(self, hidden_states):
        """Give float32 logits (..., V) of hidden states (..., D) that the blocks have left."""
        return self._head(self._final_norm(hidden_states))


def _block(layer) -> Callable:
    attend = layer.self_attention
    query, key = _projection(attend.query), _projection(attend.key)
    if attend.qk_norm_epsilon is not None:
        query = _composed(_normalization(attend.query_norm), query)
        key = _composed(_normalization(attend.key_norm), key)
    value, output = _projection(attend.value), _projection(attend.attention_output)
    feed = functools.partial(
        feed_forward,
        gate=_projection(layer.feedforward_gate_dense),
        up=_projection(layer.feedforward_intermediate_dense),
        down=_projection(layer.feedforward_output_dense),
        activation=layer.activation_function,
    )
    norms = _normalization(layer.self_attention_layernorm), _normalization(layer.feedforward_layernorm)

    def run(x, rotary, attend):
        attended = functools.partial(
            attention, query=query, key=key, value=value, output=output, rotary=rotary, attend=attend
        )
        return decoder_block(x, norms[0], attended, norms[1], feed)

    return run


def _head(layer: keras.layers.Layer) -> Callable:
    """Give what turns hidden states into logits as a function of arrays."""
    if layer.quantization_mode is not None and not _is_plain_int8(layer):
        return functools.partial(layer, reverse=True)
    table = keras.ops.convert_to_tensor(layer.embeddings if layer.tie_weights else layer.reverse_embeddings)
    if layer.quantization_mode is None:
        kernel = backend.cast(table, layer.compute_dtype)
        return functools.partial(backend.matmul_float32, kernel=kernel, transpose=layer.tie_weights)
    scale = layer.embeddings_scale if layer.tie_weights else layer.reverse_embeddings_scale
    return _int8_product(layer, table, backend.cast(scale.value, "float32"), layer.tie_weights)


def _composed(outer: Callable, inner: Callable) -> Callable:
    return lambda x: outer(inner(x))


def _normalization(layer) -> Callable:
    return functools.partial(rms_norm, scale=layer.scale.value, epsilon=layer.epsilon)


def _projection(layer: keras.layers.Layer) -> Callable:
    """Give what a projection does as a function of arrays."""
    if type(layer) is not keras.layers.EinsumDense:
        return layer
    if layer.quantization_mode is not None and not _is_plain_int8(layer):
        return layer
    kernel = keras.ops.convert_to_tensor(layer.kernel)  # with LoRA's, if it has any
    sizes = tuple(kernel.shape)
    sizes_out = sizes[1 - len(layer.partial_output_shape) :]
    sizes_in = sizes[: len(sizes) - len(sizes_out)]
    kernel = backend.reshape(kernel, (math.prod(sizes_in), math.prod(sizes_out)))

    def row(variable):
        return backend.reshape(backend.cast(variable.value, layer.compute_dtype), (math.prod(sizes_out),))

    bias = None if layer.bias is None else row(layer.bias)
    if layer.quantization_mode is None:
        multiply = functools.partial(backend.linear, kernel=backend.cast(kernel, layer.compute_dtype), bias=bias)
    else:
        multiply = _with_bias(_int8_product(layer, kernel, row(layer.kernel_scale)), bias)
    return functools.partial(_project, multiply=multiply, size_in=math.prod(sizes_in), sizes_out=sizes_out)


def _project(x, multiply, size_in, sizes_out):
    rows = backend.shape(x)[:2]
    return backend.reshape(multiply(backend.reshape(x, (*rows, size_in))), (*rows, *sizes_out))


def _is_plain_int8(layer) -> bool:
    """Tell whether a layer rounds its inputs row by row to int8, and multiplies them by an int8 kernel."""
    rounding = layer.inputs_quantizer if layer.quantization_mode == "int8" else None
    return type(rounding) is AbsMaxQuantizer and rounding.output_dtype == "int8" and not layer.lora_enabled


def _int8_product(layer, kernel, scale, transpose: bool = False) -> Callable:
    rounding = layer.inputs_quantizer
    return functools.partial(
        matmul_int8,
        kernel=kernel,
        scale=scale,
        value_range=rounding.value_range,
        epsilon=rounding.epsilon,
        transpose=transpose,
    )


def _with_bias(multiply: Callable, bias) -> Callable:
    return multiply if bias is None else lambda x: multiply(x) + bias
