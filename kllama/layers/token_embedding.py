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

    def grow(self, input_dim: int) -> None:
        """Add tokens at the end of the vocabulary, each at the mean of the old ones, in the table and in the head.

        The mean is a place where the model has seen nothing unusual, so the logits of the old tokens keep their order
        and a new one starts out neither likely nor impossible (Hewitt, "Initializing New Word Embeddings for Pretrained
        Language Models", 2021). It is accumulated in float32. The variables are new ones, of the same paths.

        Args:
            input_dim: the new V, at least the old one.

        Raises:
            ValueError: for a smaller V, and for a layer that is quantised or has LoRA matrices.
        """
        if input_dim < self.input_dim:
            raise ValueError(f"input_dim ({input_dim}) must be at least {self.input_dim}, the size it has.")
        if self.quantization_mode is not None or self.lora_enabled:
            raise ValueError(f"{self.name} is quantised or has LoRA enabled; expected neither. Grow it before.")
        if input_dim == self.input_dim:
            return
        old = [self._embeddings] if self.tie_weights else [self._embeddings, self.reverse_embeddings]
        tables = [_with_mean_rows(self._embeddings.value, input_dim)]
        if not self.tie_weights:
            head = _with_mean_rows(keras.ops.transpose(self.reverse_embeddings.value), input_dim)
            tables.append(keras.ops.transpose(head))
        self._tracker.unlock()
        try:
            new = [self._add_like(variable, table) for variable, table in zip(old, tables, strict=True)]
            self._embeddings = new[0]
            if not self.tie_weights:
                self.reverse_embeddings = new[1]
            for variable in old:
                self._untrack_variable(variable)
            self.input_dim = input_dim
        finally:
            self._tracker.lock()

    def _add_like(self, variable, value):
        return self.add_weight(
            name=variable.name,
            shape=value.shape,
            dtype=variable.dtype,
            initializer=lambda shape, dtype: keras.ops.cast(value, dtype),
            regularizer=variable.regularizer,
            constraint=variable.constraint,
            trainable=variable.trainable,
        )

    @property
    def head_variable(self) -> keras.Variable:
        """The variable of the head: the table, where it is tied."""
        return self._embeddings if self.tie_weights else self.reverse_embeddings

    @property
    def has_plain_head(self) -> bool:
        """Whether the head is a product with its variable: not quantised, and without LoRA matrices."""
        return self.quantization_mode is None and not (self.tie_weights and self.lora_enabled)

    def head_kernel(self, dtype):
        """Give the kernel of a plain head, (D, V), or (V, D) where it is tied, in some dtype."""
        # Keras' embedding layers switch off the automatic cast of their weights.
        return backend.cast(keras.ops.convert_to_tensor(self.head_variable), dtype)

    def call(self, inputs, reverse=False):
        if not reverse:
            return super().call(inputs)
        if self.has_plain_head:
            return backend.matmul_float32(inputs, self.head_kernel(inputs.dtype), transpose=self.tie_weights)
        table = backend.cast(keras.ops.convert_to_tensor(self.embeddings), inputs.dtype)  # with its LoRA matrices
        return backend.matmul_float32(inputs, table, transpose=True)

    def quantize(self, mode=None, type_check=True, config=None):
        """Quantise the table and an untied head; as in `keras.layers.ReversibleEmbedding`, which refuses subclasses."""
        super().quantize(mode, type_check=type_check and type(self) is not TokenEmbedding, config=config)

    def quantized_build(self, embeddings_shape, mode, config=None):
        super().quantized_build(embeddings_shape, mode, config)
        if mode == "int4" and config is None:
            # A layer built as int4 then works as one that became int4: Keras would quantise its inputs, too.
            self.inputs_quantizer = None

    def quantized_call(self, inputs, reverse=False):
        outputs = super().quantized_call(inputs, reverse=reverse)
        return backend.cast(outputs, "float32" if reverse else self.compute_dtype)

    def _int8_call(self, inputs, reverse=False):
        if not reverse:
            return super()._int8_call(inputs)
        if self.tie_weights:
            kernel, scale = self._embeddings, self.embeddings_scale
        else:
            kernel, scale = self.reverse_embeddings, self.reverse_embeddings_scale
        kernel, scale = keras.ops.convert_to_tensor(kernel), keras.ops.convert_to_tensor(scale, "float32")
        logits = self._int8_logits(inputs, kernel, scale)
        if self.tie_weights and self.lora_enabled:
            delta = backend.matmul_float32(
                inputs, backend.cast(keras.ops.transpose(self.lora_embeddings_b), inputs.dtype)
            )
            delta = keras.ops.matmul(delta, keras.ops.transpose(self.lora_embeddings_a))
            logits = logits + self.lora_alpha / self.lora_rank * delta
        return logits

    def _int8_logits(self, inputs, kernel, scale):
        """Multiply (..., D) by an int8 kernel (D, V), or the transpose of a tied (V, D), with one scale a column.

        The gradient is that of the float head.

        Rounding has no gradient of its own, and Keras' layer would train nothing below the head.
        """

        @keras.ops.custom_gradient
        def project(inputs, kernel, scale):
            def gradient(*args, upstream=None):
                upstream = args[0] if upstream is None else upstream
                table = backend.cast(kernel if self.tie_weights else keras.ops.transpose(kernel), inputs.dtype)
                return keras.ops.matmul(backend.cast(upstream / scale, inputs.dtype), table), None, None

            if self.inputs_quantizer is None:
                head = backend.cast(kernel, inputs.dtype)
                return backend.matmul_float32(inputs, head, self.tie_weights) / scale, gradient
            rounded, inputs_scale = self.inputs_quantizer(inputs, axis=-1)
            sums = backend.cast(backend.matmul_int32(rounded, kernel, self.tie_weights), "float32")
            return sums / (backend.cast(inputs_scale, "float32") * scale), gradient

        return project(inputs, kernel, scale)

    def compute_output_spec(self, inputs, reverse=False):
        spec = super().compute_output_spec(inputs, reverse=reverse)
        return keras.KerasTensor(spec.shape, dtype="float32") if reverse else spec


def _with_mean_rows(table, num_rows):
    """Give a table (V, D) with more rows, the new ones at the mean of the old."""
    size = table.shape[0]
    mean = backend.matmul_float32(keras.ops.ones((1, size), dtype=table.dtype), table) / size
    new = keras.ops.repeat(keras.ops.cast(mean, table.dtype), num_rows - size, axis=0)
    return keras.ops.concatenate([table, new], axis=0)
