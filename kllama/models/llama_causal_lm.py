"""The Llama language model: text or token ids in, logits, loss or text out.

`fit` and its defaults, `generate`, and loading. The maths is the backbone's; the decoding loop is `generation/`'s.
"""

import functools

import keras
import keras_hub
import numpy as np
from keras import ops
from keras_hub.src.utils.tensor_utils import in_tf_function

from kllama import backend
from kllama.checkpoints.formats import open_checkpoint
from kllama.errors import CheckpointError
from kllama.generation import plain_loop
from kllama.generation.programs import Programs
from kllama.generation.sampling import Sampling, choose
from kllama.models.generate_arguments import (
    check_generation_config,
    check_lengths,
    fit_prompts,
    refuse_seed,
    resolve_limits,
    resolve_sampling,
    resolve_seed,
    resolve_stop_token_ids,
)
from kllama.models.llama_backbone import LlamaBackbone
from kllama.models.prompts import check_ids, read_prompts
from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.tokenizer import LlamaTokenizer
from kllama.training.batches import is_batches, is_tf_dataset, refuse_labels, unpack_batch, wrap_batches
from kllama.training.data import is_token_ids, prepare_texts, prepare_token_ids, weigh
from kllama.training.losses import TokenCrossentropy
from kllama.training.metrics import Perplexity, TokenAccuracy

_TASK_KEYWORDS = {"compile", "name", "trainable"}


@keras.saving.register_keras_serializable(package="kllama")
class LlamaCausalLM(keras_hub.models.CausalLM):
    """A Llama that predicts the next token, with everything around it: text in, text out.

    Args:
        backbone: a `LlamaBackbone`.
        preprocessor: a `LlamaCausalLMPreprocessor`, or None to work on token ids alone.
        generation_config: how the checkpoint wants to be sampled: a dict with some of `stop_token_ids` (list of int),
            `do_sample`, `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty` (which `generate` does not
            apply, and says so). Its stop ids always count; the rest is what `generate` does when neither the call nor
            `compile` says otherwise.
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
        self._programs = Programs()

        # === Functional Model ===
        inputs = backbone.input
        logits = backbone.token_embedding(backbone(inputs), reverse=True)
        super().__init__(inputs=inputs, outputs=logits, **kwargs)
        self._choose_sampler(sampler)

    def get_config(self):
        sampler = self._sampler_choice
        if not isinstance(sampler, str | dict):
            sampler = keras_hub.samplers.serialize(sampler)
        return {**super().get_config(), "generation_config": dict(self.generation_config), "sampler": sampler}

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
        if self.compiled:
            self.optimizer = type(self.optimizer).from_config(self.optimizer.get_config())
            # Compiled steps hold the old variables.
            self.train_function = self.test_function = self.predict_function = None

    def save_to_preset(self, preset_dir, **kwargs):
        """Save the model to a directory that `from_preset` loads; arguments as in `keras_hub.models.Task`.

        Raises:
            ValueError: the tokenizer has more tokens than the model has rows for.
        """
        self._check_vocabulary()
        super().save_to_preset(preset_dir, **kwargs)

    @classmethod
    def from_preset(cls, preset, load_weights: bool = True, *, dtype=None, **kwargs):
        """Build a language model, with its tokenizer, from a checkpoint.

        Args:
            preset: the name of a built-in preset, or the path of a preset directory or of a Hugging Face directory.
                The format is recognised by content.
            load_weights: whether to load the weights; otherwise they are random.
            dtype: of weights and computation. By default a global dtype policy, if one was set, else the file's own.
            **kwargs: constructor arguments that replace the checkpoint's, such as `preprocessor`.

        Returns:
            A `LlamaCausalLM`. Its preprocessor is None where the checkpoint carries no tokenizer.

        Raises:
            MissingFileError: if there is no such preset or a file is missing.
            CheckpointError: if a file is damaged, or does not fit the others.
            UnsupportedError: if the checkpoint is no Llama, or asks for what kllama does not implement.
        """
        checkpoint = open_checkpoint(preset)
        if not checkpoint.has_head:
            raise CheckpointError(
                f"{checkpoint.path}: lm_head.weight is missing and tie_word_embeddings is false; expected one of the "
                "two. A base model without a head opens as a LlamaBackbone."
            )
        if "preprocessor" not in kwargs:
            has_tokenizer = checkpoint.tokenizer_config is not None
            kwargs["preprocessor"] = LlamaCausalLMPreprocessor.from_checkpoint(checkpoint) if has_tokenizer else None
        if "backbone" not in kwargs:
            kwargs["backbone"] = LlamaBackbone.from_checkpoint(checkpoint, load_weights, dtype=dtype)
        return cls(**{"generation_config": checkpoint.generation_config, **kwargs})

    # === Training ===

    def compile(self, optimizer="auto", loss="auto", *, weighted_metrics="auto", sampler="auto", **kwargs):
        """Choose how the model is trained and how it generates.

        Args:
            optimizer: an optimizer, its name, or `"auto"` for Adam with a learning rate of 2e-5.
            loss: a loss, its name, or `"auto"` for `TokenCrossentropy`: the mean over real tokens.
            weighted_metrics: list of metrics, or `"auto"` for token accuracy and perplexity.
            sampler: a `keras_hub.samplers` object or its name, or `"auto"` for what the checkpoint's
                `generation_config` asks for, else KerasHub's default, top-k with k = 5.
            **kwargs: those of `keras.Model.compile`.
        """
        super().compile(
            optimizer=optimizer,
            loss=TokenCrossentropy() if _is_auto(loss) else loss,
            weighted_metrics=[TokenAccuracy(), Perplexity()] if _is_auto(weighted_metrics) else weighted_metrics,
            **kwargs,
        )
        self._choose_sampler(sampler)
        self._programs = Programs()

    def _choose_sampler(self, choice):
        self._sampler_choice = choice
        self.sampler = keras_hub.samplers.get("top_k" if _is_auto(choice) else choice)

    def compile_from_config(self, config):
        """Compile as `get_compile_config` described; the sampler is part of the model's own config."""
        self.compile(**keras.saving.deserialize_keras_object(config), sampler=self._sampler_choice)
        self.optimizer.build(self.trainable_variables)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        """Turn a batch of text into (x, y, sample_weight); token ids pass, with their own next tokens for labels.

        Args:
            x: text or token ids, as in `fit`; string or integer tensors in a `tf.data` pipeline.
            y: labels (B, T) for token ids; None for text.
            sample_weight: weights (B,) of rows, or (B, T) of labels.
        """
        if not is_token_ids(x):
            return self._preprocess_text(x, y, sample_weight)
        if y is not None:
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        if in_tf_function():
            from kllama.backend import tf_data

            return tf_data.next_token_labels(x, sample_weight)
        return prepare_token_ids(x, y, sample_weight)

    def _preprocess_text(self, x, y, sample_weight):
        refuse_labels(y)
        if self.preprocessor is None:
            raise ValueError("x is text, but the model has no preprocessor; expected token ids.")
        x, y, weights = super().preprocess_samples(x)
        if sample_weight is None:
            return x, y, weights
        if in_tf_function():
            from kllama.backend import tf_data

            return x, y, tf_data.weigh_rows(weights, sample_weight)
        return x, y, weigh(ops.convert_to_numpy(weights), sample_weight)

    def fit(self, x=None, y=None, batch_size=None, sample_weight=None, validation_data=None, **kwargs):
        """Train on text or on token ids.

        Which tokens of a text the loss counts is the preprocessor's `loss_on`; how long rows may be, and where longer
        ones are cut, its `sequence_length` and `truncate`. Rows that are there as a whole and had to be cut are counted
        in a warning.

        Args:
            x: text: strings; or `{"prompts": [...], "responses": [...]}`; or `{"messages": [...]}`, conversations for
                the chat template, with `"tools"` beside them if there are any; or rows, a list of
                `{"prompt": ..., "response": ...}` or `{"messages": ...}`. Or token ids (B, T), or
                `{"token_ids": (B, T), "padding_mask": (B, T)}`. Or batches of any of these, or of `(x,)`, `(x, y)` or
                `(x, y, sample_weight)`: a `tf.data.Dataset`, a `keras.utils.PyDataset`, a PyTorch `DataLoader`, a Grain
                pipeline or a generator, whose batches are prepared as they are read.
            y: labels (B, T) for token ids, of which all count but -100. By default each token's next one, of which the
                real ones count.
            batch_size: rows per step. Defaults to 32. None where `x` comes in batches.
            sample_weight: weights (B,) of rows, or (B, T) of the labels of token ids.
            validation_data: what to evaluate on after each epoch: anything that `x` can be, or `(x, y)`, or
                `(x, y, sample_weight)`.
            **kwargs: those of `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: no rows, or none with a label that the loss counts; labels with text; text without a
                preprocessor.
            TypeError: a row is of the wrong type; the message has its index.
        """
        x, y, sample_weight = self._prepare(x, y, sample_weight, batch_size)
        if validation_data is not None:
            validation_data = self._prepare(*unpack_batch(validation_data))
        with backend.keep_variables(self):
            return keras.Model.fit(
                self,
                x,
                y,
                batch_size=batch_size,
                sample_weight=sample_weight,
                validation_data=validation_data,
                **kwargs,
            )

    def evaluate(self, x=None, y=None, batch_size=None, sample_weight=None, **kwargs):
        """Compute the loss and the metrics on text or token ids; arguments as in `fit`."""
        if not kwargs.get("_use_cached_eval_dataset", False):  # as `fit` calls it, on what it has prepared
            x, y, sample_weight = self._prepare(x, y, sample_weight, batch_size)
        with backend.keep_variables(self):
            return keras.Model.evaluate(self, x, y, batch_size=batch_size, sample_weight=sample_weight, **kwargs)

    def predict(self, x=None, batch_size=None, **kwargs):
        """Compute logits (B, T, V) of text or token ids, in NumPy; `x` as in `fit`."""
        x, _, _ = self._prepare(x, batch_size=batch_size, is_training=False)
        with backend.keep_variables(self):
            return keras.Model.predict(self, x, batch_size=batch_size, **kwargs)

    def _prepare(self, x, y=None, sample_weight=None, batch_size=None, is_training=True):
        """Give `(x, y, sample_weight)` as Keras takes it: arrays, or what prepares batches as they are read."""
        vocabulary_size = self.backbone.vocabulary_size
        if is_token_ids(x):
            return prepare_token_ids(x, y, sample_weight, vocabulary_size)
        self._check_vocabulary()
        if not is_batches(x):
            refuse_labels(y)
            return prepare_texts(x, self.preprocessor, sample_weight, is_training=is_training)
        for name, value in (("y", y), ("sample_weight", sample_weight), ("batch_size", batch_size)):
            if value is not None:
                raise ValueError(f"{name} must be None with a {type(x).__name__}, which gives it with each batch.")
        if not is_tf_dataset(x):
            return wrap_batches(x, self.preprocessor, vocabulary_size), None, None
        from kllama.backend import tf_data

        return tf_data.map_batches(x, self.preprocess_samples), None, None

    def _check_vocabulary(self):
        """Raise a ValueError for a tokenizer with more tokens than the model has rows for: JAX would give NaN."""
        if self.preprocessor is None:
            return
        num_tokens, num_rows = self.preprocessor.tokenizer.vocabulary_size(), self.backbone.vocabulary_size
        if num_tokens > num_rows:
            raise ValueError(
                f"the tokenizer has {num_tokens} tokens, the model {num_rows} rows for them; expected a row for each. "
                f"Call resize_vocabulary({num_tokens}) on the model."
            )

    # === Generation ===

    def generate(
        self,
        inputs,
        max_length: int | None = None,
        stop_token_ids="auto",
        strip_prompt: bool | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ):
        """Continue prompts.

        A call's own `temperature`, `top_k`, `top_p` and `min_p` beat what `compile` chose, which beats the checkpoint's
        `generation_config`, which beats KerasHub's default (top-k with k = 5).

        Args:
            inputs: a string or a list of strings; or `{"messages": ...}`, a conversation or a list of them (also
                without the key), which the chat template renders and the assistant answers; or
                `{"token_ids": (B, T), "padding_mask": (B, T)}` with padding on the right. The preprocessor's `truncate`
                says what becomes of text that is too long.
            max_length: the length, prompt included, at which a row ends. Defaults to the smaller of the preprocessor's
                `sequence_length` and the backbone's `max_sequence_length`; for token ids to their width T.
            stop_token_ids: ids that end a row. `"auto"` means the tokenizer's end token, the stop ids of
                `generation_config` and, in a conversation, the special token that ends the assistant's turn; None or
                an empty list means none.
            strip_prompt: whether to leave the prompt out of the result. None leaves a conversation out, and no other
                prompt.
            max_new_tokens: how many tokens to add to each row at most, instead of `max_length`.
            temperature: at least 0; what logits are divided by. 0 takes the most likely token each time.
            top_k: sample among the k most likely tokens.
            top_p: sample among the fewest tokens whose probabilities sum to at least p, in (0, 1].
            min_p: sample among the tokens at least p times as probable as the most probable one, in [0, 1].
            seed: non-negative integer below 2 ** 31. The same seed gives the same text on the same backend.

        Returns:
            A string for a string, the answer for a conversation, a list of strings for a list of either; for token ids
            a dict of NumPy arrays `token_ids` (B, S) and `padding_mask` (B, S), where S is the longest row.

        Raises:
            TypeError: for an argument of the wrong type.
            ValueError: for a value out of range, a prompt that is too long, and text without a preprocessor.
        """
        backend.synchronize(self)  # generating is allowed in the middle of `fit`
        prompts = read_prompts(inputs, self.preprocessor)
        if prompts.is_empty:
            return []
        if prompts.finish_text is not None:
            self._check_vocabulary()
        check_ids(prompts, self.backbone.vocabulary_size)
        lengths = max_length, max_new_tokens, self.preprocessor, self.backbone.max_sequence_length
        prompts = fit_prompts(prompts, *lengths)
        limits = resolve_limits(prompts, *lengths)
        check_lengths(prompts, limits)
        stop_token_ids = resolve_stop_token_ids(
            stop_token_ids, prompts, self.preprocessor, self.generation_config, self.backbone
        )
        call = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        sampler = None if _is_auto(self._sampler_choice) else self.sampler
        sampling = resolve_sampling(call, sampler, self.generation_config)
        if sampling is None:
            refuse_seed(seed, sampler)
            results = self._generate_with_sampler(prompts, limits, stop_token_ids)
        else:
            seed = resolve_seed(seed, sampler)
            results = self._generate_plainly(prompts, limits, stop_token_ids, sampling, seed)
        return prompts.finish(*results, strip_prompt=prompts.is_chat if strip_prompt is None else strip_prompt)

    def _generate_plainly(self, prompts, limits, stop_token_ids, sampling: Sampling, seed: int):
        settings = {"plan": sampling.plan, "prompt_width": plain_loop.bucket(int(prompts.lengths.max()))}
        # A model may have more embedding rows than its tokenizer has tokens; text can be made of tokens only.
        settings["num_tokens"] = prompts.num_tokens or self.backbone.vocabulary_size
        decode = functools.partial(self._decode, **settings)
        options = {"is_eager": self.run_eagerly, "jit_compile": bool(self.jit_compile)}
        decoder = self._programs.get(tuple(settings.values()), self.variables, decode, **options)
        token_ids = prompts.padded(plain_loop.bucket(int(limits.max())))
        arrays = token_ids, prompts.lengths, limits, np.asarray(stop_token_ids, "int32"), np.int32(seed)
        arrays = [ops.convert_to_tensor(array, "int32") for array in arrays]
        token_ids, lengths = decoder(*arrays, ops.convert_to_tensor(sampling.values, "float32"))
        return ops.convert_to_numpy(token_ids), ops.convert_to_numpy(lengths)

    def _decode(self, token_ids, lengths, limits, stop_token_ids, seed, values, *, plan, prompt_width, num_tokens):
        # Types of rotary embedding that depend on the length keep the prompts' from here on, as their cached keys do.
        rope_length = self._rope_length(lengths)
        width = min(prompt_width, token_ids.shape[1])
        _, cache = self._hidden_states_with_cache(token_ids[:, :width], self._empty_cache(token_ids), 0, **rope_length)

        def step(token, cache, index):
            logits, _, cache = self.call_with_cache(token, cache, index, **rope_length)
            return logits[:, -1, :num_tokens], cache

        def choose_one(logits, index):
            return choose(logits, plan, values, seed, index)

        return plain_loop.decode(step, choose_one, token_ids, cache, lengths, limits, stop_token_ids)

    def _rope_length(self, lengths) -> dict:
        """Give the keyword by which cached calls keep the frequencies of the prompts; none where they never change."""
        return {"rope_length": ops.max(lengths)} if self.backbone.rotary_embedding.depends_on_length else {}

    def _generate_with_sampler(self, prompts, limits, stop_token_ids):
        """Let a sampler with a loop of its own (beam search, say) write up to one common length."""
        if limits.min() != limits.max():
            raise ValueError(
                f"max_new_tokens with prompts of different lengths asks for different lengths {sorted(set(limits))}, "
                f"which {type(self.sampler).__name__} cannot do; expected max_length."
            )
        width = int(limits[0])
        inputs = {"token_ids": prompts.padded(width), "padding_mask": prompts.mask(width)}
        outputs = self.make_generate_function()(inputs, stop_token_ids=tuple(stop_token_ids) or None)
        return (
            ops.convert_to_numpy(outputs["token_ids"]),
            ops.convert_to_numpy(outputs["padding_mask"]).astype("int32").sum(-1),
        )

    def generate_step(self, inputs, stop_token_ids=None):
        """Generate with the compiled sampler's own loop; KerasHub's protocol for samplers.

        Args:
            inputs: dict of `token_ids` int (B, S), the prompts padded on the right to the final length, and
                `padding_mask` (B, S).
            stop_token_ids: tuple of ids that end a row, or None.

        Returns:
            Dict of `token_ids` (B, S) and a bool `padding_mask` (B, S) that covers each row up to its stop token.
        """
        token_ids, padding_mask = inputs["token_ids"], ops.cast(inputs["padding_mask"], "bool")
        lengths = ops.sum(ops.cast(padding_mask, "int32"), axis=-1)
        rope_length = self._rope_length(lengths)
        cache = self._empty_cache(token_ids)
        hidden_states, cache = self._hidden_states_with_cache(token_ids, cache, 0, **rope_length)

        def next(prompt, cache, index):
            token = ops.slice(prompt, (0, index - 1), (prompt.shape[0], 1))
            logits, hidden_states, cache = self.call_with_cache(token, cache, index - 1, **rope_length)
            return ops.squeeze(logits, axis=1), ops.squeeze(hidden_states, axis=1), cache

        token_ids = self.sampler(
            next=next,
            prompt=token_ids,
            cache=cache,
            index=ops.min(lengths),
            mask=padding_mask,
            stop_token_ids=stop_token_ids,
            hidden_states=hidden_states,
            model=self,
        )
        if stop_token_ids is None:
            return {"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids, dtype="bool")}
        stops = ops.any(ops.equal(token_ids[..., None], ops.convert_to_tensor(stop_token_ids)), axis=-1)
        stops = ops.cast(stops & ~padding_mask, "int32")
        return {"token_ids": token_ids, "padding_mask": ops.equal(ops.cumsum(stops, axis=-1) - stops, 0)}

    def call_with_cache(self, token_ids, cache, cache_update_index, *, rope_length=None):
        """Run the model on new tokens of sequences whose earlier keys and values are in a cache.

        Args:
            token_ids: int (B, T), the new tokens.
            cache: float (B, L, 2, S, K, H): keys and values of each layer for S positions.
            cache_update_index: int or int32 scalar, the position of the first new token.
            rope_length: int32 scalar, the length that dynamic and longrope frequencies are to be those of: the length
                at which the cached keys were made. None takes that of this call.

        Returns:
            `(logits float32 (B, T, V), hidden states (B, T, D), updated cache)`.
        """
        hidden_states, cache = self._hidden_states_with_cache(token_ids, cache, cache_update_index, rope_length)
        return self.backbone.token_embedding(hidden_states, reverse=True), hidden_states, cache

    def _hidden_states_with_cache(self, token_ids, cache, start, rope_length=None):
        backbone = self.backbone
        cos, sin = backbone.rotary_embedding(token_ids, start_index=start, length=rope_length)
        x = backbone.token_embedding(token_ids)
        mask = backbone.causal_mask.for_cache(token_ids, cache.shape[3], start)
        caches = []
        for i, layer in enumerate(backbone.transformer_layers):
            x, layer_cache = layer(x, cos, sin, mask, cache=cache[:, i], cache_update_index=start)
            caches.append(layer_cache)
        return backbone.layer_norm(x), ops.stack(caches, axis=1)

    def _empty_cache(self, token_ids):
        batch_size, num_slots = token_ids.shape
        backbone = self.backbone
        shape = batch_size, backbone.num_layers, 2, num_slots, backbone.num_key_value_heads, backbone.head_dim
        return ops.zeros(shape, dtype=self.compute_dtype)


def _is_auto(choice) -> bool:
    return isinstance(choice, str) and choice == "auto"


# The text classes stand below the models and cannot know them; KerasHub finds the class of a preset by this attribute.
LlamaTokenizer.backbone_cls = LlamaBackbone
LlamaCausalLMPreprocessor.backbone_cls = LlamaBackbone
