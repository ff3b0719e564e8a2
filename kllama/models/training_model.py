"""The half of the language model that learns: `fit`, `evaluate` and `predict`, and the steps that they make.

Data is prepared by `kllama.training`. Nothing here writes text, loads or saves. The base class of `LlamaCausalLM`, and
built upon the half that writes: Keras allows a functional model no second line of base classes.
"""

import contextlib
from collections.abc import Iterator

import keras
from keras import ops
from keras_hub.src.utils.tensor_utils import in_tf_function

from kllama import backend
from kllama.models.generating_model import GeneratingModel
from kllama.training.batches import is_batches, is_tf_dataset, refuse_labels, unpack_batch, wrap_batches
from kllama.training.data import is_token_ids, prepare_texts, prepare_token_ids, weigh
from kllama.training.fused_loss import can_fuse, sum_losses, update_metrics
from kllama.training.optimizers import check_optimizer


class Fusion:
    """Whether a model gives hidden states in place of logits, because its loss is computed of these.

    A plain object on purpose: Keras tracks what lies in the attributes of a model.
    """

    def __init__(self):
        self.is_on = False

    @contextlib.contextmanager
    def of(self, model: "TrainingModel") -> Iterator[None]:
        """Switch it on for a step, where nobody but the loss and the metrics of this package looks at logits."""
        has_plain_head = model.backbone.token_embedding.has_plain_head
        self.is_on = _is_ours(model) and has_plain_head and can_fuse(model.loss, model._compile_metrics)
        try:
            yield
        finally:
            self.is_on = False


class TrainingModel(GeneratingModel):
    """A causal language model that learns from text and from token ids.

    A subclass makes `backbone`, `preprocessor`, `_watch` (a `VariableWatch`) and `_fusion` (a `Fusion`).
    """

    def make_train_function(self, force: bool = False):
        """Compile the step of `fit`, anew where the model has other variables than last time; as in Keras."""
        check_optimizer(self.optimizer, self.trainable_variables)
        variables = [*self.variables, *self.trainable_variables]
        return super().make_train_function(force=self._watch.has_changed("train", variables) or force)

    def make_test_function(self, force: bool = False):
        """Compile the step of `evaluate`; see `make_train_function`."""
        return super().make_test_function(force=self._watch.has_changed("test", self.variables) or force)

    def make_predict_function(self, force: bool = False):
        """Compile the step of `predict`; see `make_train_function`."""
        return super().make_predict_function(force=self._watch.has_changed("predict", self.variables) or force)

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
        """Compute logits (B, T, V) of text or token ids, in NumPy; `x` as in `fit`.

        Text is padded to the preprocessor's `sequence_length`.
        """
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

    def train_step(self, *args):
        """Take one step of `fit`, as in Keras; without an array of all logits where nobody looks at them."""
        with self._fusion.of(self):
            return super().train_step(*args)

    def test_step(self, *args):
        """Evaluate one batch, as in Keras; see `train_step`."""
        with self._fusion.of(self):
            return super().test_step(*args)

    def call(self, inputs, training=None, mask=None):
        if self._fusion.is_on:
            return self.backbone(inputs, training=training)
        return super().call(inputs, training=training, mask=mask)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Compute the loss of logits, as in Keras; `train_step` may have it computed of hidden states, (B, T, D)."""
        if not self._fusion.is_on:
            return super().compute_loss(x, y, y_pred, sample_weight, training=training)
        sums, weight = sum_losses(self.backbone.token_embedding, y_pred, y, sample_weight, training=training)
        update_metrics(self._compile_metrics, sums, weight)
        loss = ops.divide_no_nan(sums[0], weight)
        return sum((self._aggregate_additional_loss(other) for other in self.losses), start=loss)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Update the metrics and give their results, as in Keras; `compute_loss` may have updated them."""
        if not self._fusion.is_on:
            return super().compute_metrics(x, y, y_pred, sample_weight)
        if self._compile_metrics is not None and not self._compile_metrics.built:
            self._compile_metrics.build(y, y_pred)
        return self.get_metrics_result()


def _is_ours(model: TrainingModel) -> bool:
    """Tell whether no subclass has a forward pass, a loss or metrics of its own."""
    names = ("call", "compute_loss", "compute_metrics")
    return all(getattr(type(model), name) is getattr(TrainingModel, name) for name in names)
