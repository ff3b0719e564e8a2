"""The Llama language model: text or token ids in, logits, loss or text out.

The parts, the defaults of `compile`, loading and saving. `fit` is `TrainingModel`'s; `generate`, `stream` and `chat`
are `GeneratingModel`'s; the maths is the backbone's.
"""

from collections.abc import Callable

import keras
import keras_hub
from keras import ops

from kllama import backend
from kllama.checkpoints.checkpoint import Strictness
from kllama.checkpoints.files.undisturbed import undisturbed
from kllama.checkpoints.formats import open_checkpoint
from kllama.checkpoints.presets.directory import staged_preset
from kllama.errors import CheckpointError
from kllama.generation.prefix_cache import PrefixCaches
from kllama.models.export_gguf import export_gguf
from kllama.models.export_huggingface import MAX_SHARD_SIZE, export_huggingface
from kllama.models.exported import exported_model
from kllama.models.generate_arguments import check_generation_config, check_score_ids, is_auto
from kllama.models.llama_backbone import LlamaBackbone
from kllama.models.quantization import check_preset_mode, quantize_model
from kllama.models.training_model import Fusion, TrainingModel
from kllama.models.variable_watch import VariableWatch
from kllama.models.weights import count_bytes, load_keras_hub_weights
from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.tokenizer import LlamaTokenizer
from kllama.training.losses import TokenCrossentropy, token_losses, token_weights
from kllama.training.metrics import Perplexity, TokenAccuracy
from kllama.training.optimizers import renewed

_TASK_KEYWORDS = {"compile", "name", "trainable"}


@keras.saving.register_keras_serializable(package="kllama")
class LlamaCausalLM(TrainingModel):
    """A Llama that predicts the next token, with everything around it: text in, text out.

    Args:
        backbone: a `LlamaBackbone`.
        preprocessor: a `LlamaCausalLMPreprocessor`, or None to work on token ids alone.
        generation_config: how the checkpoint wants to be sampled: a dict with some of `stop_token_ids` (list of int),
            `do_sample`, `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty`. Its stop ids always count;
            the rest is what `generate` does when neither the call nor `compile` says otherwise.
        sampler: what `generate` draws with until the next `compile`; see there.
        **kwargs: `name`, `trainable`, and `compile=False` to leave the model uncompiled.

    Raises:
        TypeError: for an unknown keyword or a value of the wrong type.
        ValueError: for a `generation_config` with unknown keys or values out of range.

    Inputs and output: called on `{"token_ids": int32 (B, T), "padding_mask": (B, T) with 1 for real tokens, or None}`;
    gives float32 logits (B, T, V), in every dtype policy.

    Example:

    ```python
    import kllama

    model = kllama.LlamaCausalLM.from_preset("stories_1m_en")
    print(model.generate("Once upon a time", max_new_tokens=100, temperature=0.8, seed=1))
    model.fit(["Once upon a time there was a fox.", "The end."], epochs=2)
    ```

    References: those of `LlamaBackbone`.
    """

    backbone_cls = LlamaBackbone
    preprocessor_cls = LlamaCausalLMPreprocessor

    def __init__(self, backbone, preprocessor=None, *, generation_config: dict | None = None, sampler="auto", **kwargs):
        if not isinstance(backbone, LlamaBackbone):
            raise TypeError(f"backbone ({backbone!r}) must be a LlamaBackbone.")
        if preprocessor is not None and not isinstance(preprocessor, keras_hub.models.CausalLMPreprocessor):
            raise TypeError(f"preprocessor ({preprocessor!r}) must be a LlamaCausalLMPreprocessor or None.")
        unknown = sorted(kwargs.keys() - _TASK_KEYWORDS)
        if unknown:
            raise TypeError(
                f"LlamaCausalLM got unknown keyword arguments {unknown}; it takes {sorted(_TASK_KEYWORDS)}."
            )

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.generation_config = check_generation_config(generation_config or {}, backbone.vocabulary_size)
        self._watch = VariableWatch()
        self._fusion = Fusion()
        self._prefix_caches = PrefixCaches()
        self._asked_jit_compile = "auto"

        # === Functional Model ===
        inputs = backbone.input
        logits = backbone.token_embedding(backbone(inputs), reverse=True)
        super().__init__(inputs=inputs, outputs=logits, **kwargs)
        self.sampler = sampler

    def get_config(self):
        sampler = self._sampler_choice
        if not isinstance(sampler, str | dict):
            sampler = keras_hub.samplers.serialize(sampler)
        return {**super().get_config(), "generation_config": dict(self.generation_config), "sampler": sampler}

    def load_weights(self, filepath, skip_mismatch: bool = False, **kwargs) -> None:
        """Load what `save_weights` wrote, KerasHub's Llama's, too; arguments as in `keras.Model.load_weights`."""
        if not load_keras_hub_weights(self.backbone, filepath):
            super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)

    def quantize(self, mode=None, config=None, filters=None, **kwargs) -> None:
        """Quantise the projections, the embedding table and the head in place; normalizations stay as they are.

        Training goes on with LoRA alone, enabled before or after: quantised kernels have no gradient. float8 keeps
        kernels that train, without LoRA, and leaves the embedding table and the head alone. The optimizer of a model
        that has trained starts anew. Logits stay float32.

        Args:
            mode: `"int8"`, `"int4"` or `"float8"`, as in `keras.Model.quantize`.
            config: a `keras.quantizers.QuantizationConfig` instead of the mode.
            filters: which layers: a regular expression or a list of them, searched for in a layer's name (`"query"`,
                `"feedforward_gate_dense"`, `"token_embedding"`), or a function of the layer. By default all.
            **kwargs: `type_check`, whether subclasses of the layers that Keras knows are refused. Defaults to True.

        Raises:
            TypeError: for filters of another type.
            ValueError: for another mode (gptq and awq, too), for float16 with int8, for LoRA with float8, for layers
                that are quantised already, and for filters that no layer matches.

        Example:

        ```python
        model.quantize("int8")
        ```
        """
        quantize_model(self, mode, config, filters, **kwargs)

    def resize_vocabulary(self, vocabulary_size: int) -> None:
        """Make room for new tokens at the end of the vocabulary.

        The embedding table and the head grow in place; each new row is the mean of the old ones, so the model gives
        the old tokens the logits that it gave them before. The optimizer starts anew: its state had the old shapes.

        Args:
            vocabulary_size: the new V, at least the present one.

        Raises:
            TypeError: if it is not an integer.
            ValueError: if it is smaller than the present one, or the embedding is quantised or has LoRA matrices.

        Example:

        ```python
        model.preprocessor.tokenizer.add_tokens(["ŋ", "ɔ"])
        model.resize_vocabulary(model.preprocessor.tokenizer.vocabulary_size())
        ```
        """
        self.backbone.resize_vocabulary(vocabulary_size)
        for logits in self.outputs:  # what the functional model says of its output, in `summary()` for one
            logits._shape = (*logits.shape[:-1], self.backbone.vocabulary_size)
        if self.compiled and self.optimizer is not None:
            self.optimizer = renewed(self.optimizer)

    def save_to_preset(self, preset_dir, max_shard_size: float | None = 10, *, overwrite: bool = False):
        """Save the model, with its tokenizer, to a directory that `from_preset` loads.

        The directory appears whole, with a manifest of sizes and SHA-256, or not at all. A preset that is there is
        replaced, all of it, and stays as it was until the new one is complete.

        Args:
            preset_dir: the directory.
            max_shard_size: the largest size of a file of weights, in GB. None writes one file whatever its size.
            overwrite: whether a directory that holds files that no preset has is replaced, with these files.

        Raises:
            ValueError: the tokenizer has more tokens than the model has rows for, the model is quantised to other than
                int8, or the directory holds files that no preset has.
            ResourceError: the disk is full or fails, or the directory may not be written to.
        """
        self._check_vocabulary()
        check_preset_mode(self)
        with staged_preset(preset_dir, None, overwrite, count_bytes(self), max_shard_size) as staging:
            super().save_to_preset(str(staging), max_shard_size=max_shard_size)

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
        """Build a language model, with its tokenizer, from a checkpoint.

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
            **kwargs: constructor arguments that replace the checkpoint's, such as `preprocessor`; and `rope_scaling`
                where the files of a checkpoint cannot tell it.

        Returns:
            A `LlamaCausalLM`. Its preprocessor is None where the checkpoint carries no tokenizer.

        Raises:
            MissingFileError: if there is no such preset or a file is missing.
            ResourceError: if a download fails.
            CheckpointError: if a file is damaged, or does not fit the others.
            UnsupportedError: if the checkpoint is no Llama, or asks for what kllama does not implement.
        """
        checkpoint = open_checkpoint(preset, Strictness(verify, check_finite, strict))
        return cls.from_checkpoint(checkpoint, load_weights, dtype=dtype, **kwargs)

    @classmethod
    def from_checkpoint(cls, checkpoint, load_weights: bool = True, *, dtype=None, **kwargs):
        """Build a model from a checkpoint that `kllama.checkpoints.formats.open_checkpoint` has opened."""
        if "backbone" in kwargs and (dtype is not None or not load_weights):
            raise ValueError(
                f"dtype ({dtype!r}) and load_weights ({load_weights}) are for a backbone from the checkpoint; expected "
                "neither with backbone=."
            )
        if not checkpoint.has_head:
            raise CheckpointError(
                f"{checkpoint.path}: lm_head.weight is missing and tie_word_embeddings is false; expected one of the "
                "two. A base model without a head opens as a LlamaBackbone."
            )
        if "preprocessor" not in kwargs:
            has_tokenizer = checkpoint.tokenizer_config is not None
            kwargs["preprocessor"] = LlamaCausalLMPreprocessor.from_checkpoint(checkpoint) if has_tokenizer else None
        if "sampler" not in kwargs and checkpoint.sampler != "auto":
            kwargs["sampler"] = checkpoint.sampler
        if "backbone" not in kwargs:
            answers = {name: kwargs.pop(name) for name in checkpoint.open_questions if name in kwargs}
            kwargs["backbone"] = LlamaBackbone.from_checkpoint(checkpoint, load_weights, dtype=dtype, **answers)
        return cls(**{"generation_config": checkpoint.generation_config, **kwargs})

    def export_to_transformers(
        self,
        path,
        *,
        dtype: str | None = None,
        max_shard_size: float = MAX_SHARD_SIZE,
        overwrite: bool = False,
    ) -> None:
        """Write the model and its tokenizer as a Hugging Face directory, which transformers 4 and 5 open.

        It holds `config.json`, `generation_config.json`, safetensors and, where there is a preprocessor, tokenizer
        files with its start token and its chat templates. The directory appears whole or not at all.

        The matrices of LoRA are merged into the weights, and int8 weights become floats again. `dropout` is left out,
        with a warning. A `max_sequence_length` of None becomes what `rope_scaling` was made for, else 2048: there has
        to be a number, and no logit depends on it. Where there is a chat template, the token that ends a turn ends
        texts, too: transformers has one list for both.

        Args:
            path: the directory.
            dtype: `"float32"`, `"bfloat16"` or `"float16"`, of the stored weights. By default that of the variables,
                of which nothing is lost then, but for the rounding of what was merged or was int8.
            max_shard_size: how much of the weights a file holds at most, in GB.
            overwrite: whether a directory that holds something is replaced, whole.

        Raises:
            TypeError: for an argument of the wrong type, and a tokenizer that is no `LlamaTokenizer`.
            ValueError: for a value out of range, a directory that holds something, and a tokenizer with more tokens
                than the model has rows for.
            UnsupportedError: no class of transformers has this combination of settings, or the model is quantised to
                int4.
            CheckpointError: a weight is not finite, or becomes too large for `dtype`.
            ResourceError: the disk is full or failing.

        Example:

        ```python
        model.export_to_transformers("my_model", dtype="bfloat16")
        # transformers.AutoModelForCausalLM.from_pretrained("my_model")
        ```
        """
        self._check_vocabulary()
        exported = exported_model(self)
        export_huggingface(exported, path, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)

    def export_gguf(self, path, *, dtype: str | None = None, overwrite: bool = False) -> None:
        """Write the model and its tokenizer as one GGUF file, which llama.cpp runs.

        The file appears whole or not at all. LoRA matrices are merged into it, and int8 kernels become floats first.
        llama.cpp wants to know how long texts may be: where `max_sequence_length` is None, that is the preprocessor's
        `sequence_length`. Without a preprocessor the file holds no tokenizer. Where llama.cpp works otherwise than this
        model, on some texts, a warning says on which.

        Args:
            path: the file.
            dtype: `"float32"`, `"float16"` or `"bfloat16"`; or `"q8_0"` or `"q4_0"`, 8 or 4 bits a weight and a scale
                for 32 of them. Norms and biases are float32 in any case; where rows do not fill blocks of 32, the
                blocks are float16; the head of q4_0 is q8_0. None means the dtype of the weights.
            overwrite: whether a file that is there is replaced.

        Raises:
            ValueError: another dtype, a file that is there, or a tokenizer with more tokens than the model has rows.
            UnsupportedError: what llama.cpp cannot run, in the model or in the tokenizer, and layers that are quantised
                to int4; the message names it.
            NonFiniteError: a weight that is no number, or too large for the dtype.
            ResourceError: the disk is full or fails.

        Example:

        ```python
        model.export_gguf("model.gguf", dtype="q8_0")
        ```
        """
        self._check_vocabulary()
        export_gguf(exported_model(self), path, dtype=dtype, overwrite=overwrite)

    # === Training ===

    def compile(self, optimizer="auto", loss="auto", *, weighted_metrics="auto", sampler="auto", **kwargs):
        """Choose how the model is trained and how it generates.

        Args:
            optimizer: an optimizer, its name, or `"auto"` for Adam with a learning rate of 2e-5.
            loss: a loss, its name, or `"auto"` for `TokenCrossentropy`: the mean over real tokens.
            weighted_metrics: list of metrics, or `"auto"` for token accuracy, which has KerasHub's name
                `sparse_categorical_accuracy`, and perplexity.
            sampler: a `keras_hub.samplers` object or its name, or `"auto"` for what the checkpoint's
                `generation_config` asks for, else KerasHub's default, top-k with k = 5.
            **kwargs: those of `keras.Model.compile`.
        """
        super().compile(
            optimizer=optimizer,
            loss=TokenCrossentropy() if is_auto(loss) else loss,
            weighted_metrics=_default_metrics() if is_auto(weighted_metrics) else weighted_metrics,
            **kwargs,
        )
        # Keras' "auto" knows the needs of training; generation has its own.
        self._asked_jit_compile = kwargs.get("jit_compile", "auto")
        self.sampler = sampler

    def get_compile_config(self):
        """Describe how the model was compiled, as in Keras; it notes what "auto" came to, so that stands here, too."""
        config = super().get_compile_config()
        return {**config, "asked_jit_compile": self._asked_jit_compile} if config else config

    def compile_from_config(self, config):
        """Compile as `get_compile_config` described; the sampler is part of the model's own config."""
        config = keras.saving.deserialize_keras_object(config)
        # What "auto" came to on one backend is nothing that was asked for, and not what another one would make of it.
        config["jit_compile"] = config.pop("asked_jit_compile", "auto")
        self.compile(**config, sampler=self._sampler_choice)
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def score(
        self,
        token_ids,
        padding_mask=None,
        scoring_mode: str = "logits",
        layer_intercept_fn: Callable | None = None,
        target_ids=None,
    ):
        """Score sequences: the logits of each position, or the loss of each target.

        Runs eagerly and keeps gradients, so a function between the layers may look at activations, change them, or
        differentiate the loss by them.

        Args:
            token_ids: int (B, T).
            padding_mask: (B, T) with 1 for real tokens, or None if all are.
            scoring_mode: `"logits"` or `"loss"`.
            layer_intercept_fn: function (hidden states (B, T, D), index) -> hidden states (B, T, D), or None. The index
                is -1 for the token embeddings and i for the output of decoder layer i.
            target_ids: int (B, T), for `"loss"` alone: the token that each position is to predict. The loss of -100 is
                0.

        Returns:
            float32 logits (B, T, V), or losses in nats (B, T).

        Raises:
            TypeError: for ids that are no integers.
            ValueError: for another `scoring_mode`, for `"loss"` without `target_ids`, for ids out of range, and for
                targets of another shape than the ids.

        Example:

        ```python
        ids = np.array([[5, 6, 7, 8]])
        losses = model.score(ids, scoring_mode="loss", target_ids=np.roll(ids, -1, axis=1))
        ```
        """
        if scoring_mode not in ("logits", "loss"):
            raise ValueError(f"scoring_mode ({scoring_mode!r}) must be 'logits' or 'loss'.")
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError("target_ids (None) must be given with scoring_mode='loss': the tokens to predict.")
        backend.synchronize(self)  # scoring is allowed in the middle of `fit`
        token_ids = ops.convert_to_tensor(token_ids)
        target_ids = ops.convert_to_tensor(target_ids) if scoring_mode == "loss" else None
        check_score_ids(token_ids, target_ids, self.backbone.vocabulary_size)
        token_ids = ops.cast(token_ids, "int32")
        if padding_mask is not None:
            padding_mask = ops.convert_to_tensor(padding_mask, "int32")
        hidden_states = self.backbone.run_layers(token_ids, padding_mask, layer_intercept_fn)
        logits = self.backbone.token_embedding(hidden_states, reverse=True)
        if scoring_mode == "logits":
            return logits
        return token_losses(target_ids, logits) * token_weights(target_ids, None)


def _default_metrics() -> list:
    # Callbacks of KerasHub's users look for its name.
    return [TokenAccuracy(name="sparse_categorical_accuracy"), Perplexity()]


# The text classes stand below the models and cannot know them; KerasHub finds the class of a preset by this attribute.
LlamaTokenizer.backbone_cls = LlamaBackbone
LlamaCausalLMPreprocessor.backbone_cls = LlamaBackbone
