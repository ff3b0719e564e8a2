"""The preprocessor: text to padded rows of ids with their mask, for training and for generation, and ids back to text.

It adds the start and end tokens, cuts, pads on the right, and shifts the targets by one. It does not split text into
tokens (`tokenizer`) and knows no model. `fit` and `generate` of the models call it. Rows are packed in NumPy; a
TensorFlow graph reaches the same code through `backend/tf_data.py`.
"""

import os
from itertools import chain

import keras
import keras_hub
import numpy as np
from keras_hub.src.utils.tensor_utils import convert_preprocessing_outputs_python, in_tf_function

from kllama.checkpoints.formats import open_checkpoint
from kllama.text.inputs import as_texts
from kllama.text.tokenizer import LlamaTokenizer

MAX_REPORTED_ROWS = 10


@keras.saving.register_keras_serializable(package="kllama")
class LlamaCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Turn texts into the inputs, targets and weights of a causal language model.

    ```
    text              "a b"       sequence_length = 5
    token_ids         <s> a  b  </s> .     the row, without its last position
    padding_mask       1  1  1   1   0
    y                  a  b </s> .   .     the next token at each position
    sample_weight      1  1  1   0   0     1 where y is real
    ```

    A training text that is too long is cut on the right, its end token kept. A prompt that is too long is refused.

    Args:
        tokenizer: a `LlamaTokenizer`, or any `keras_hub.tokenizers.Tokenizer`.
        sequence_length: int >= 1. Length T of the padded rows.
        add_start_token: bool. Put the start token before each text, in training and in generation.
        add_end_token: bool. Put the end token after each text, in training only.
        **kwargs: `name`, `dtype`, `trainable` and `config_file` of `keras_hub.models.CausalLMPreprocessor`.

    Call arguments:
        x: a str, or a list, tuple or array of str. A string tensor inside a TensorFlow graph.
        y: ignored, as in KerasHub: the targets are made here.
        sample_weight: ignored, as in KerasHub.
        sequence_length: int. Stands in for the constructor's in this call.

    Call returns:
        `({"token_ids", "padding_mask"}, y, sample_weight)`, backend tensors of shape `(B, T)`, `(T,)` for a single str;
        ids int32, masks bool (True = real token).

    Raises:
        ValueError: the tokenizer lacks the start or end token that is to be added.

    Example:
    ```python
    preprocessor = LlamaCausalLMPreprocessor(tokenizer, sequence_length=128)
    x, y, sample_weight = preprocessor(["Once upon a time", "The end."])
    prompt = preprocessor.generate_preprocess("Once upon")
    preprocessor.generate_postprocess(prompt)  # "Once upon"
    ```
    """

    # models/ sets this to LlamaBackbone: KerasHub finds a preprocessor by its backbone, and imports go downward only.
    backbone_cls = None
    tokenizer_cls = LlamaTokenizer

    def __init__(
        self,
        tokenizer: keras_hub.tokenizers.Tokenizer,
        sequence_length: int = 1024,
        add_start_token: bool = True,
        add_end_token: bool = True,
        **kwargs,
    ):
        if not isinstance(tokenizer, keras_hub.tokenizers.Tokenizer):
            raise TypeError(f"tokenizer = {tokenizer!r}; expected a LlamaTokenizer.")
        for name, value in (("add_start_token", add_start_token), ("add_end_token", add_end_token)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} = {value!r}; expected True or False.")
        super().__init__(tokenizer, sequence_length, add_start_token, add_end_token, **kwargs)
        self.built = True

    def build(self, input_shape):
        pass  # The base class makes a packer here; rows are packed by `_pack`.

    @property
    def sequence_length(self) -> int:
        """Length of the padded rows."""
        return self._sequence_length

    @sequence_length.setter
    def sequence_length(self, value: int):
        self._sequence_length = _checked_length(value)

    def call(self, x, y=None, sample_weight=None, sequence_length=None):
        # One position more than asked for: it is the target of the last.
        width = self._length(sequence_length) + 1
        token_ids, padding_mask = self._encode(x, width, self._start_ids(), self._end_ids(), cut=True)
        inputs = {"token_ids": token_ids[..., :-1], "padding_mask": padding_mask[..., :-1]}
        return _to_backend((inputs, token_ids[..., 1:], padding_mask[..., 1:]))

    def generate_preprocess(self, x, sequence_length: int | None = None) -> dict:
        """Turn prompts into padded rows that generation continues: a start token, no end token.

        Args:
            x: a str, or a list, tuple or array of str. An empty prompt gives the start token alone.
            sequence_length: int. Width of the rows; `None` takes the preprocessor's own.

        Returns:
            `{"token_ids", "padding_mask"}`, backend tensors `(B, T)` of int32 and bool; `(T,)` for a single str.

        Raises:
            ValueError: a prompt has more tokens than the row has room for.
        """
        width = self._length(sequence_length)
        token_ids, padding_mask = self._encode(x, width, self._start_ids(), [], cut=False)
        return _to_backend({"token_ids": token_ids, "padding_mask": padding_mask})

    def generate_postprocess(self, x: dict) -> str | list[str]:
        """Turn generated ids into text, without padding and special tokens.

        What is padding the mask says, and never the value of an id: the id that fills a row may be a real token.

        Args:
            x: `{"token_ids", "padding_mask"}`, arrays or backend tensors of one shape, `(B, T)` or `(T,)`.

        Returns:
            A list of B texts, or one str.
        """
        token_ids = keras.ops.convert_to_numpy(x["token_ids"])
        padding_mask = keras.ops.convert_to_numpy(x["padding_mask"]).astype(bool)
        if token_ids.shape != padding_mask.shape or token_ids.ndim not in (1, 2):
            raise ValueError(
                f"token_ids has shape {token_ids.shape} and padding_mask {padding_mask.shape}; expected one shape, "
                "(batch, length) or (length,)."
            )
        keep = padding_mask & ~np.isin(token_ids, self.tokenizer.special_token_ids)
        if token_ids.ndim == 1:
            return self.tokenizer.detokenize(token_ids[keep].tolist())
        return [self.tokenizer.detokenize(row[kept].tolist()) for row, kept in zip(token_ids, keep, strict=True)]

    @classmethod
    def from_preset(cls, preset: str | os.PathLike, **kwargs) -> "LlamaCausalLMPreprocessor":
        """Build the preprocessor of a checkpoint, with its tokenizer.

        Args:
            preset: the name of a built-in preset, or the path of a preset directory or of a Hugging Face directory.
            **kwargs: constructor arguments that replace the checkpoint's, such as `sequence_length`.

        Raises:
            MissingFileError: if there is no such preset, or it carries no tokenizer.
            CheckpointError: if a file is damaged.
        """
        return cls.from_checkpoint(open_checkpoint(preset), **kwargs)

    @classmethod
    def from_checkpoint(cls, checkpoint, **kwargs) -> "LlamaCausalLMPreprocessor":
        """Build the preprocessor of a checkpoint that `kllama.checkpoints.formats.open_checkpoint` has opened."""
        if "tokenizer" not in kwargs:
            kwargs["tokenizer"] = LlamaTokenizer.from_checkpoint(checkpoint)
        return cls(**{**checkpoint.preprocessor_config, **kwargs})

    @classmethod
    def from_config(cls, config: dict) -> "LlamaCausalLMPreprocessor":
        return super().from_config(dict(config))  # The base class writes into what it is given.

    def _encode(self, x, width, start, end, cut):
        def pack(texts):
            return self._pack(texts, width, start, end, cut)

        if in_tf_function():
            from kllama.backend import tf_data

            return tf_data.encode_dense(pack, x, width)
        texts, batched = as_texts(x)
        outputs = pack(texts)
        return outputs if batched else (outputs[0][0], outputs[1][0])

    def _pack(self, texts, width, start, end, cut):
        """Return ids `(B, width)` int32 and mask `(B, width)` bool, padded on the right."""
        rows = self.tokenizer.tokenize(texts) if texts else []
        if cut:
            rows = [row[: width - len(start) - len(end)] for row in rows]
        rows = [[*start, *row, *end] for row in rows]
        lengths = np.array([len(row) for row in rows], "int64")
        if not cut:
            _check_prompts(lengths, width)
        padding_mask = np.arange(width) < lengths[:, None]
        token_ids = np.full(padding_mask.shape, self.tokenizer.pad_token_id, "int32")
        token_ids[padding_mask] = np.fromiter(chain.from_iterable(rows), "int32", lengths.sum())
        return token_ids, padding_mask

    def _start_ids(self):
        return self._boundary("start_token", self.tokenizer.start_token_id) if self.add_start_token else []

    def _end_ids(self):
        return self._boundary("end_token", self.tokenizer.end_token_id) if self.add_end_token else []

    def _boundary(self, name, token_id):
        if token_id is None:
            raise ValueError(
                f"add_{name} = True, but {name} of the tokenizer = None; expected a token. Pass {name}= to the "
                f"tokenizer, or add_{name}=False to the preprocessor."
            )
        return [token_id]

    def _length(self, sequence_length):
        return self.sequence_length if sequence_length is None else _checked_length(sequence_length)


def _checked_length(value) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"sequence_length = {value!r}; expected an int.")
    if value < 1:
        raise ValueError(f"sequence_length = {value}; expected at least 1.")
    return int(value)


def _check_prompts(lengths: np.ndarray, width: int) -> None:
    rows = np.flatnonzero(lengths > width)
    if rows.size == 0:
        return
    faults = [f"inputs[{row}]: prompt has {lengths[row]} tokens, max_length is {width}" for row in rows]
    more = f"; and {len(faults) - MAX_REPORTED_ROWS} more" if len(faults) > MAX_REPORTED_ROWS else ""
    raise ValueError("; ".join(faults[:MAX_REPORTED_ROWS]) + f"{more}. Shorten the prompt or raise max_length.")


def _to_backend(outputs):
    # KerasHub's own last step: backend tensors, or NumPy arrays in a Grain pipeline. A graph keeps its tensors.
    return outputs if in_tf_function() else convert_preprocessing_outputs_python(outputs)
