"""The Llama architecture as a functional Keras model: token ids -> hidden states.

What it does not do: no text, no logits, no loading of formats (`checkpoints/` opens files and names their tensors; this
file builds the model that they describe and fills it).
"""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import keras
import keras_hub
from keras_hub.src.utils.preset_utils import register_presets

from kllama.arguments import check_integer
from kllama.checkpoints.catalogue import keras_hub_entries
from kllama.checkpoints.checkpoint import Strictness
from kllama.checkpoints.files.undisturbed import undisturbed
from kllama.checkpoints.files.writer import staged_file
from kllama.checkpoints.formats import open_checkpoint
from kllama.checkpoints.presets.directory import BACKBONE, staged_preset
from kllama.errors import CheckpointError
from kllama.layers.causal_mask import CausalMask
from kllama.layers.decoder_layer import LlamaDecoderLayer
from kllama.layers.rms_norm import RMSNorm
from kllama.layers.rotary_embedding import RotaryEmbedding
from kllama.layers.token_embedding import TokenEmbedding
from kllama.models.backbone_arguments import (
    CONFIG_NAMES,
    KERAS_HUB_ROPE_KEYWORDS,
    layer_windows,
    refuse_unknown_keywords,
    settle_arguments,
)
from kllama.models.dtypes import check_dtype, resolve_dtype
from kllama.models.export_huggingface import MAX_SHARD_SIZE, export_huggingface
from kllama.models.exported import exported_backbone
from kllama.models.layout import megatron_layout
from kllama.models.lora import check_lora_targets
from kllama.models.quantization import quantize_model, serialize_dtypes, settle_policies
from kllama.models.weights import assign_weights, count_bytes, load_keras_hub_weights, uninitialized_weights


@keras.saving.register_keras_serializable(package="kllama")
class LlamaBackbone(keras_hub.models.Backbone):
    """The Llama decoder: token embedding, grouped-query decoder layers with rotary positions, final normalization.

    One class for every Llama: what differs between the generations is arguments, and a generation is a preset.

    Letters: `B` batch, `T` positions, `D` hidden dim, `N` query heads, `K` key/value heads, `H` head dim, `F`
    intermediate dim, `V` vocabulary size.

    Args:
        vocabulary_size: V.
        num_layers: number of decoder layers.
        num_query_heads: N.
        hidden_dim: D.
        intermediate_dim: F.
        num_key_value_heads: K, a divisor of N.
        rope_max_wavelength: theta, the base of the rotary frequencies. Defaults to 10000.
        rope_scaling_factor: at least 1; shorthand for `rope_scaling={"rope_type": "linear", "factor": ...}`.
        layer_norm_epsilon: epsilon of all normalizations. Defaults to 1e-6; released Llama 2 and 3 use 1e-5.
        dropout: rate of dropout on the attention output, in [0, 1). Defaults to 0.
        dtype: dtype or `keras.DTypePolicy` of weights and computation. Normalization, softmax, rotary angles and the
            gate's activation are computed in float32 in any case.
        tie_word_embeddings: whether the head is the transposed embedding table. Defaults to False.
        head_dim: H, even. Defaults to D / N.
        rope_scaling: None, or ONE mapping with Hugging Face's keys: `rope_type` (`"linear"`, `"dynamic"`, `"yarn"`,
            `"longrope"` or `"llama3"`) and that type's values; see `kllama.core.rope_scaling`.
        max_sequence_length: the longest sequence the model is made for (Hugging Face's `max_position_embeddings`), or
            None. It bounds generation, and some types of `rope_scaling` need it.
        attention_bias: whether the query, key and value projections have biases. Defaults to False.
        attention_output_bias: whether the attention output projection has one. None, the default, means as those:
            Llama's biases are on all four, Qwen2's on three.
        qk_norm: whether the queries and keys of each head are normalized before they are rotated, as in Qwen3.
        sliding_window: None, or the number of keys that a query sees at most, itself among them, as in Mistral.
        layer_types: None, or `"full_attention"` or `"sliding_attention"` for each layer: the window holds for those
            alone. By default for all.
        mlp_bias: whether the three feed-forward projections have biases. Defaults to False.
        activation: name of the gate's activation; see `kllama.core.activations`. Defaults to `"silu"`.
        attention_dropout: rate of dropout on the attention probabilities, in [0, 1). Defaults to 0.
        initializer_range: standard deviation of the normal distribution that random weights are drawn from.
        **kwargs: `name` and `trainable`, and KerasHub 0.32's five `rope_*` keywords, which are translated.

    Raises:
        TypeError: for an unknown keyword or a value of the wrong type.
        ValueError: for a value out of range.

    Inputs and output: called on `{"token_ids": int32 (B, T), "padding_mask": (B, T) with 1 for real tokens, or None}`;
    gives hidden states (B, T, D) after the final normalization. What it gives at padded positions means nothing.

    Example:

    ```python
    import numpy as np
    import kllama

    backbone = kllama.LlamaBackbone(
        vocabulary_size=100,
        num_layers=2,
        num_query_heads=4,
        hidden_dim=32,
        intermediate_dim=64,
        num_key_value_heads=2,
    )
    ids = np.array([[5, 6, 7, 0]])
    hidden_states = backbone({"token_ids": ids, "padding_mask": np.array([[1, 1, 1, 0]])})  # (1, 4, 32)
    ```

    References: Touvron et al., "LLaMA" (arXiv:2302.13971) and "Llama 2" (arXiv:2307.09288); Grattafiori et al., "The
    Llama 3 Herd of Models" (arXiv:2407.21783), section 3.2.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_query_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        num_key_value_heads: int,
        rope_max_wavelength: float = 10000,
        rope_scaling_factor: float = 1.0,
        layer_norm_epsilon: float = 1e-6,
        dropout: float = 0,
        dtype=None,
        tie_word_embeddings: bool = False,
        *,
        head_dim: int | None = None,
        rope_scaling: dict | None = None,
        max_sequence_length: int | None = None,
        attention_bias: bool = False,
        attention_output_bias: bool | None = None,
        qk_norm: bool = False,
        sliding_window: int | None = None,
        layer_types: list[str] | None = None,
        mlp_bias: bool = False,
        activation: str = "silu",
        attention_dropout: float = 0,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        check_dtype(dtype)
        keras_hub_rope = {name: kwargs.pop(name) for name in KERAS_HUB_ROPE_KEYWORDS if name in kwargs}
        refuse_unknown_keywords(kwargs)
        arguments = {
            "vocabulary_size": vocabulary_size,
            "num_layers": num_layers,
            "num_query_heads": num_query_heads,
            "hidden_dim": hidden_dim,
            "intermediate_dim": intermediate_dim,
            "num_key_value_heads": num_key_value_heads,
            "rope_max_wavelength": rope_max_wavelength,
            "layer_norm_epsilon": layer_norm_epsilon,
            "dropout": dropout,
            "tie_word_embeddings": tie_word_embeddings,
            "head_dim": head_dim,
            "rope_scaling": rope_scaling,
            "max_sequence_length": max_sequence_length,
            "attention_bias": attention_bias,
            "attention_output_bias": attention_output_bias,
            "qk_norm": qk_norm,
            "sliding_window": sliding_window,
            "layer_types": layer_types,
            "mlp_bias": mlp_bias,
            "activation": activation,
            "attention_dropout": attention_dropout,
            "initializer_range": initializer_range,
        }
        config = SimpleNamespace(**settle_arguments(arguments, rope_scaling_factor, keras_hub_rope))

        # === Layers ===
        initializer = keras.initializers.RandomNormal(stddev=config.initializer_range)
        self.token_embedding = TokenEmbedding(
            config.vocabulary_size,
            config.hidden_dim,
            tie_weights=config.tie_word_embeddings,
            embeddings_initializer=initializer.clone(),
            dtype=dtype,
            name="token_embedding",
        )
        self.rotary_embedding = RotaryEmbedding(
            config.head_dim,
            config.rope_max_wavelength,
            config.rope_scaling,
            config.max_sequence_length,
            dtype=dtype,
            name="rotary_embedding",
        )
        self.windows = layer_windows(config.num_layers, config.sliding_window, config.layer_types)
        if None in self.windows:
            self.causal_mask = CausalMask(dtype=dtype, name="causal_mask")
        if config.sliding_window is not None:
            self.sliding_mask = CausalMask(config.sliding_window, dtype=dtype, name="sliding_mask")
        self.transformer_layers = [
            LlamaDecoderLayer(
                config.num_query_heads,
                config.num_key_value_heads,
                config.head_dim,
                config.intermediate_dim,
                activation=config.activation,
                layer_norm_epsilon=config.layer_norm_epsilon,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                attention_bias=config.attention_bias,
                attention_output_bias=config.attention_output_bias,
                qk_norm=config.qk_norm,
                mlp_bias=config.mlp_bias,
                kernel_initializer=initializer.clone(),
                dtype=dtype,
                name=f"transformer_layer_{i}",
            )
            for i in range(config.num_layers)
        ]
        self.layer_norm = RMSNorm(config.layer_norm_epsilon, dtype=dtype, name="sequence_output_layernorm")

        # === Functional Model ===
        token_ids = keras.Input(shape=(None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input(shape=(None,), dtype="int32", name="padding_mask", optional=True)
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=self.run_layers(token_ids, padding_mask),
            dtype=dtype,
            **kwargs,
        )
        settle_policies(self)

        # === Config ===
        for name, value in vars(config).items():
            setattr(self, name, value)

    def run_layers(self, token_ids, padding_mask=None, intercept: Callable | None = None):
        """Run the layers one after another, and let a function look at what flows between them.

        Args:
            token_ids: int (B, T).
            padding_mask: (B, T) with 1 for real tokens, or None.
            intercept: function (hidden states (B, T, D), index) -> hidden states (B, T, D), or None. The index is -1
                for the token embeddings and i for the output of decoder layer i.

        Returns:
            Hidden states (B, T, D) after the final normalization, as a call of the backbone gives them.
        """
        cos, sin = self.rotary_embedding(token_ids, padding_mask)
        masks = self._make_masks(lambda mask: mask(token_ids, padding_mask))
        x = _intercepted(intercept, self.token_embedding(token_ids), -1)
        for i, (transformer_layer, mask) in enumerate(zip(self.transformer_layers, masks, strict=True)):
            x = _intercepted(intercept, transformer_layer(x, cos, sin, mask), i)
        return self.layer_norm(x)

    def run_layers_with_cache(self, token_ids, cache, cache_update_index, rope_length=None):
        """Run the layers on new tokens of sequences whose earlier keys and values are in a cache.

        Args:
            token_ids: int (B, T), the new tokens.
            cache: float (B, L, 2, S, K, H): keys and values of each layer for S positions.
            cache_update_index: int or int32 scalar, the position of the first new token.
            rope_length: as of `LlamaCausalLM.call_with_cache`.

        Returns:
            `(hidden states (B, T, D), updated cache)`.
        """
        cos, sin = self.rotary_embedding(token_ids, start_index=cache_update_index, length=rope_length)
        num_slots = cache.shape[3]
        masks = self._make_masks(lambda mask: mask.for_cache(token_ids, num_slots, cache_update_index))
        x, caches = self.token_embedding(token_ids), []
        for i, (transformer_layer, mask) in enumerate(zip(self.transformer_layers, masks, strict=True)):
            x, updated = transformer_layer(x, cos, sin, mask, cache=cache[:, i], cache_update_index=cache_update_index)
            caches.append(updated)
        return self.layer_norm(x), keras.ops.stack(caches, axis=1)

    def _make_masks(self, make: Callable) -> list:
        """Make the mask of each layer; layers with the same window share one."""
        made = {
            window: make(self.causal_mask if window is None else self.sliding_mask)
            for window in dict.fromkeys(self.windows)
        }
        return [made[window] for window in self.windows]

    def _empty_cache(self, token_ids, num_slots: int | None = None):
        """Give a cache of zeros for sequences (B, T): (B, L, 2, S, K, H), where S is `num_slots`, or T."""
        batch_size, length = token_ids.shape
        shape = batch_size, self.num_layers, 2, num_slots or length, self.num_key_value_heads, self.head_dim
        return keras.ops.zeros(shape, dtype=self.compute_dtype)

    def resize_vocabulary(self, vocabulary_size: int) -> None:
        """Make room for new tokens at the end of the vocabulary.

        The embedding table and the head grow in place; each new row is the mean of the old ones. A `LlamaCausalLM`
        around this backbone has the method too, and is the one to call it on.

        Args:
            vocabulary_size: the new V, at least the present one.

        Raises:
            TypeError: if it is not an integer.
            ValueError: if it is smaller than the present one, or the embedding is quantised or has LoRA matrices.
        """
        check_integer("vocabulary_size", vocabulary_size, minimum=self.vocabulary_size)
        self.token_embedding.grow(int(vocabulary_size))
        self.vocabulary_size = int(vocabulary_size)

    @staticmethod
    def get_layout_map(
        device_mesh: keras.distribution.DeviceMesh,
        model_parallel_dim_name: str = "model",
        data_parallel_dim_name: str = "batch",
        *,
        num_key_value_heads: int | None = None,
    ) -> keras.distribution.LayoutMap:
        """Give a layout that spreads the weights over a mesh of devices, for `keras.distribution.ModelParallel`.

        It is Megatron-LM's. Along the model axis of the mesh, the query, key, value and attention output projections
        are split by heads, the feed-forward network by its units, the embedding table and the head by tokens, so a
        decoder layer adds up partial results twice and exchanges nothing else. Along the data axis, all of these are
        split by the hidden dim. LoRA matrices are split along the axes that they share with their kernel. Whole on each
        device are the normalizations, the biases of the attention output and the feed-forward output, and the scales
        of int8 and float8; int4 packs kernels into shapes that do not fit. Build, load, quantise and train the model
        inside the distribution's scope.

        The size of the model axis must divide N, F and V, and that of the data axis D.

        Keras 3.15 distributes weights on JAX only. On PyTorch it has no distribution, and on TensorFlow a
        `ModelParallel` scope changes nothing, so both are refused here.

        Args:
            device_mesh: the devices.
            model_parallel_dim_name: the axis of the mesh along which the weights are split.
            data_parallel_dim_name: the axis of the mesh along which batches are split.
            num_key_value_heads: K. If the size of the model axis does not divide it, each device gets all of the key
                and value projections. By default it must.

        Returns:
            A `keras.distribution.LayoutMap`.

        Raises:
            UnsupportedError: on a backend other than JAX.
            TypeError: if `num_key_value_heads` is not an integer.
            ValueError: if `device_mesh` is no `DeviceMesh` or lacks an axis, or `num_key_value_heads` is not positive.

        Example:

        ```python
        devices = keras.distribution.list_devices()
        mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
        layout_map = kllama.LlamaBackbone.get_layout_map(mesh, num_key_value_heads=2)
        with keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch").scope():
            causal_lm = kllama.LlamaCausalLM.from_preset("stories_1m_en")
        ```

        Reference: Shoeybi et al., "Megatron-LM" (arXiv:1909.08053), section 3.
        """
        return megatron_layout(device_mesh, model_parallel_dim_name, data_parallel_dim_name, num_key_value_heads)

    def load_weights(self, filepath, skip_mismatch: bool = False, **kwargs) -> None:
        """Load what `save_weights` wrote, KerasHub's Llama's, too; arguments as in `keras.Model.load_weights`."""
        if not load_keras_hub_weights(self, filepath):
            super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)

    def save_to_preset(self, preset_dir, max_shard_size: float | None = 10, *, overwrite: bool = False):
        """Save the backbone to a directory that `from_preset` loads; what else a preset has there is kept.

        The directory is whole at every instant: it has the old backbone or the new one.

        Args:
            preset_dir: the directory.
            max_shard_size: the largest size of a file of weights, in GB. None writes one file whatever its size.
            overwrite: whether the directory may hold files that no preset has; they are kept.

        Raises:
            ValueError: the directory holds files that no preset has.
            ResourceError: the disk is full or fails, or the directory may not be written to.
        """
        with staged_preset(preset_dir, BACKBONE, overwrite, count_bytes(self), max_shard_size) as staging:
            super().save_to_preset(str(staging), max_shard_size=max_shard_size)

    def save_lora_weights(self, filepath):
        """Save the matrices of LoRA to a `.lora.h5` file, which appears whole or not at all; one there is replaced."""
        if not str(filepath).endswith(".lora.h5"):
            raise ValueError(f"filepath ({str(filepath)!r}) must end in .lora.h5.")
        with staged_file(filepath, overwrite=True) as staging:
            super().save_lora_weights(str(staging))

    def default_lora_layer_names(self) -> list[str]:
        """List the names of the layers that `enable_lora` adapts by default."""
        return ["query", "value"]

    def enable_lora(self, rank: int, target_layer_names: list[str] | None = None) -> None:
        """Freeze the backbone, and give some of its layers low-rank matrices that train, as Keras' layers have them.

        Args:
            rank: of the matrices, at least 1.
            target_layer_names: names of layers, such as `"attention_output"` or `"feedforward_gate_dense"`. By default
                those of `default_lora_layer_names`.

        Raises:
            TypeError: if `rank` is not an integer.
            ValueError: for a rank below 1, a name that no layer has, and layers that have LoRA or are quantised to
                float8. Nothing changes then.

        Reference: Hu et al., "LoRA" (arXiv:2106.09685), section 4.1.
        """
        check_integer("rank", rank, minimum=1)
        names = self.default_lora_layer_names() if target_layer_names is None else target_layer_names
        check_lora_targets(self, names)
        super().enable_lora(int(rank), names)
        self.train_function = self.test_function = self.predict_function = None  # they have the old variables

    def quantize(self, mode=None, config=None, filters=None, **kwargs) -> None:
        """Quantise the weights in place; see `LlamaCausalLM.quantize`, the one to call where there is such a model."""
        quantize_model(self, mode, config, filters, **kwargs)

    def export_to_transformers(
        self,
        path,
        *,
        dtype: str | None = None,
        max_shard_size: float = MAX_SHARD_SIZE,
        overwrite: bool = False,
    ) -> None:
        """Write the backbone as a Hugging Face directory: a base model, `LlamaModel` of transformers 4 and 5.

        A base model gives hidden states and has no head: an untied head stays behind. To write it, too, call the method
        of `LlamaCausalLM`; its arguments and errors are the same, and it says what becomes of LoRA and int8.

        Args:
            path: the directory.
            dtype: of the stored weights, by default that of the variables.
            max_shard_size: how much of the weights a file holds at most, in GB.
            overwrite: whether a directory that holds something is replaced, whole.
        """
        exported = exported_backbone(self)
        export_huggingface(exported, path, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)

    def get_config(self):
        config = {"name": self.name, "trainable": self.trainable, "dtype": serialize_dtypes(self)}
        config |= {name: getattr(self, name) for name in CONFIG_NAMES}
        if self.rope_scaling is not None:
            config["rope_scaling"] = dict(self.rope_scaling)
        if self.layer_types is not None:
            config["layer_types"] = list(self.layer_types)
        return config

    @classmethod
    @undisturbed
    def from_preset(
        cls,
        preset,
        load_weights: bool = True,
        *,
        dtype=None,
        verify: bool = True,
        check_finite: bool = True,
        strict: bool = True,
        **kwargs,
    ):
        """Build a backbone from a checkpoint.

        Args:
            preset: a name that `presets` lists, a `kaggle://` handle, or the path of a checkpoint: a preset directory
                of kllama or KerasHub, a Hugging Face directory, a directory of Meta's, a GGUF file or a llama2.c file.
                The format is recognised by content.
            load_weights: whether to load the weights; otherwise they are random.
            dtype: of weights and computation. By default a global dtype policy, if one was set, else the file's own;
                weights that a GGUF or llama2.c file holds quantised are float32 then.
            verify: whether files are compared with the sizes and SHA-256 of the manifest beside them, where there is
                one.
            check_finite: whether NaN and infinity in weights are refused.
            strict: whether tensors that the configuration does not use are refused; else a warning names them.
            **kwargs: constructor arguments that replace the checkpoint's, such as `dropout`.

        Returns:
            A `LlamaBackbone`.

        Raises:
            MissingFileError: if there is no such preset or a file is missing.
            ResourceError: if a download fails.
            CheckpointError: if a file is damaged, or does not fit the others.
            UnsupportedError: if the checkpoint is no Llama, or asks for what kllama does not implement.

        Example:

        ```python
        backbone = kllama.LlamaBackbone.from_preset("stories_1m_en")
        ```
        """
        checkpoint = open_checkpoint(preset, Strictness(verify, check_finite, strict))
        return cls.from_checkpoint(checkpoint, load_weights, dtype=dtype, **kwargs)

    @classmethod
    def from_checkpoint(cls, checkpoint, load_weights: bool = True, *, dtype=None, **kwargs):
        """Build a backbone from a checkpoint that `kllama.checkpoints.formats.open_checkpoint` has opened."""
        checkpoint.refuse_open_questions(kwargs)
        config = {**checkpoint.backbone_config, "dtype": resolve_dtype(dtype, checkpoint.dtype)}
        if not {"rope_scaling_factor", *KERAS_HUB_ROPE_KEYWORDS}.isdisjoint(kwargs):
            config["rope_scaling"] = None
        try:
            with uninitialized_weights() if load_weights else contextlib.nullcontext():
                backbone = cls(**{**config, **kwargs})
        except (TypeError, ValueError) as error:
            if kwargs or dtype is not None:  # the caller's own values may be what is wrong
                raise
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
        if load_weights:
            assign_weights(backbone, checkpoint.tensors())
        return backbone


def _intercepted(intercept, hidden_states, index):
    if intercept is None:
        return hidden_states
    given = intercept(hidden_states, index)
    if given is None:
        raise TypeError(
            f"the intercepting function gave None for index {index}; expected the hidden states to go on with."
        )
    return given


# KerasHub lists the presets of a class, and finds one's files by its handle.
register_presets(keras_hub_entries(), LlamaBackbone)
