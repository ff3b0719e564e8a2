"""The preprocessor: text to padded rows of ids with their mask, for training and for generation, and ids back to text.

It has rows made (`row_builder`), cuts and pads them in NumPy (`rows`), and shifts the targets by one. It does not split
text into tokens or render conversations (`tokenizer`) and knows no model. `fit` and `generate` of the models call it. A
TensorFlow graph reaches the same code through `backend/tf_data.py`.
"""

import os

import keras
import keras_hub
import numpy as np
from keras_hub.src.utils.tensor_utils import convert_preprocessing_outputs_python, in_tf_function

from kllama.checkpoints.files.undisturbed import undisturbed
from kllama.checkpoints.formats import open_tokenizer
from kllama.checkpoints.presets.directory import layer_files, staged_preset
from kllama.text.huggingface_export import export_tokenizer
from kllama.text.row_builder import RowBuilder
from kllama.text.rows import Row, cut, pad
from kllama.text.samples import Samples, read_samples
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

    With `{"prompts": ["a"], "responses": ["b"]}` the row is `<s> a b </s>` and the loss counts `b </s>`. Prompt and
    response are split into tokens separately, so the prompt's ids are those that `generate` sees, and the response
    keeps the spaces that it begins with. (A tokenizer that begins each text with a space, as Llama 2's does, does so
    with the response too.)

    With `{"messages": ...}` the row is what the tokenizer's chat template writes. It has its own start and end tokens:
    none is added, whatever `add_start_token` and `add_end_token` say. The loss counts what the assistant wrote.

    Args:
        tokenizer: a `LlamaTokenizer`, or any `keras_hub.tokenizers.Tokenizer`.
        sequence_length: int >= 1. Length T of the padded rows.
        add_start_token: bool. Put the start token before each text, in training and in generation.
        add_end_token: bool. Put the end token after each text, in training only.
        loss_on: which tokens the loss counts. `"all"`: every real token. `"replies"`: the response and its end token,
            or what the assistant wrote. `"auto"`: the replies where there are any, and all tokens of plain texts.
        truncate: the side on which rows that are too long lose tokens, `"left"` or `"right"`, in training and in
            generation, where one place is left for a new token. `None`: training rows are cut on the right, as KerasHub
            does, and a prompt that is too long is refused. The start token stays, and so does the end token that
            `add_end_token` puts after a text.
        **kwargs: `name`, `dtype`, `trainable` and `config_file` of `keras_hub.models.CausalLMPreprocessor`.

    Attributes:
        num_cut_rows: how many training rows were too long and have been cut so far.

    Call arguments:
        x: a str, or a list, tuple or array of str; `{"prompts", "responses"}` of these; `{"messages": ...}` with one
            conversation, a list of `{"role", "content"}`, or a list of conversations, and `"tools"` beside it if there
            are any. Conversations may also be columns, `{"role": [[...]], "content": [[...]]}`. Inside a TensorFlow
            graph string tensors stand in for lists of str, and ragged ones for lists of lists.
        y: ignored, as in KerasHub: the targets are made here.
        sample_weight: ignored, as in KerasHub.
        sequence_length: int. Stands in for the constructor's in this call.

    Call returns:
        `({"token_ids", "padding_mask"}, y, sample_weight)`, backend tensors of shape `(B, T)`, `(T,)` for a single
        sample; ids int32; masks and weights bool.

    Raises:
        ValueError: the tokenizer lacks the start or end token that is to be added; plain texts with
            `loss_on="replies"`.
        TypeError: an input is none of these; the message has its row.

    Example:
    ```python
    preprocessor = LlamaCausalLMPreprocessor(tokenizer, sequence_length=128)
    x, y, sample_weight = preprocessor(["Once upon a time", "The end."])
    x, y, sample_weight = preprocessor({"prompts": ["2 + 2 ="], "responses": [" 4"]})
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
        *,
        loss_on: str = "auto",
        truncate: str | None = None,
        **kwargs,
    ):
        if not isinstance(tokenizer, keras_hub.tokenizers.Tokenizer):
            raise TypeError(f"tokenizer = {tokenizer!r}; expected a LlamaTokenizer.")
        for name, value in (("add_start_token", add_start_token), ("add_end_token", add_end_token)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} = {value!r}; expected True or False.")
        _check_choice("loss_on", loss_on, ("auto", "all", "replies"))
        _check_choice("truncate", truncate, (None, "left", "right"))
        super().__init__(tokenizer, sequence_length, add_start_token, add_end_token, **kwargs)
        self.loss_on = loss_on
        self.truncate = truncate
        self.num_cut_rows = 0
        self.built = True

    def build(self, input_shape):
        pass  # The base class makes a packer here; rows are packed by `rows.pad`.

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
        token_ids, padding_mask, counts = self._encode(x, width, self._training_rows)
        inputs = {"token_ids": token_ids[..., :-1], "padding_mask": padding_mask[..., :-1]}
        return _to_backend((inputs, token_ids[..., 1:], counts[..., 1:]))

    def generate_preprocess(self, x, sequence_length: int | None = None) -> dict:
        """Turn prompts into padded rows that generation continues: a start token, no end token.

        Args:
            x: a str, or a list, tuple or array of str. An empty prompt gives the start token alone. Or
                `{"messages": ...}` as in a call, which the chat template renders up to where the assistant's turn
                begins.
            sequence_length: int. Width of the rows; `None` takes the preprocessor's own.

        Returns:
            `{"token_ids", "padding_mask"}`, backend tensors `(B, T)` of int32 and bool; `(T,)` for a single prompt.

        Raises:
            ValueError: a prompt has more tokens than the row has room for, and `truncate` is None.
        """
        width = self._length(sequence_length)
        token_ids, padding_mask, _ = self._encode(x, width, self._fitting_prompts)
        return _to_backend({"token_ids": token_ids, "padding_mask": padding_mask})

    def prompt_rows(self, x) -> list[list[int]]:
        """Give the ids of prompts, neither cut nor padded; `x` as in `generate_preprocess`."""
        return self._builder().prompt_rows(read_samples(x))

    def cut_prompt(self, ids: list[int], max_length: int) -> list[int]:
        """Cut the ids of a prompt as `truncate` says, so that of `max_length` places one is left for a new token.

        A start token at its beginning stays.
        """
        if self.truncate is None:
            return ids
        row = Row(ids, [False] * len(ids), self._builder().num_start_tokens(ids))
        return cut(row, max(1, max_length - 1), self.truncate).ids

    def generate_postprocess(self, x: dict, skip_special_tokens: bool = True) -> str | list[str]:
        """Turn generated ids into text, without padding and, unless told otherwise, without special tokens.

        What is padding the mask says, and never the value of an id: the id that fills a row may be a real token.

        Args:
            x: `{"token_ids", "padding_mask"}`, arrays or backend tensors of one shape, `(B, T)` or `(T,)`.
            skip_special_tokens: bool. Leave special tokens out of the text.

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
        keep = padding_mask
        if skip_special_tokens:
            keep = keep & ~np.isin(token_ids, self.tokenizer.special_token_ids)
        if token_ids.ndim == 1:
            return self.tokenizer.detokenize(token_ids[keep].tolist())
        return [self.tokenizer.detokenize(row[kept].tolist()) for row, kept in zip(token_ids, keep, strict=True)]

    def export_to_transformers(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write the tokenizer as a Hugging Face directory, with the start token if `add_start_token` says so.

        Arguments and errors are those of `LlamaTokenizer.export_to_transformers`.
        """
        if not isinstance(self.tokenizer, LlamaTokenizer):
            raise TypeError(f"tokenizer = {self.tokenizer!r}; expected a LlamaTokenizer.")
        export_tokenizer(self.tokenizer, path, add_start_token=self.add_start_token, overwrite=overwrite)

    def save_to_preset(self, preset_dir, *, overwrite: bool = False):
        """Save preprocessor and tokenizer to a directory that `from_preset` loads; what else a preset has is kept.

        Args:
            preset_dir: the directory, which is whole at every instant.
            overwrite: whether it may hold files that no preset has; they are kept.

        Raises:
            ValueError: the directory holds files that no preset has.
            ResourceError: the disk is full or fails, or the directory may not be written to.
        """
        files = layer_files(self.config_file, *(() if self.tokenizer is None else (self.tokenizer.config_file,)))
        with staged_preset(preset_dir, files, overwrite) as staging:
            super().save_to_preset(str(staging))

    @classmethod
    @undisturbed
    def from_preset(cls, preset: str | os.PathLike, **kwargs) -> "LlamaCausalLMPreprocessor":
        """Build the preprocessor of a checkpoint, with its tokenizer.

        Args:
            preset: the name of a preset, a `kaggle://` handle, or the path of a checkpoint of any format.
            **kwargs: constructor arguments that replace the checkpoint's, such as `sequence_length`.

        Raises:
            MissingFileError: if there is no such preset, or it carries no tokenizer.
            ResourceError: if a download fails.
            CheckpointError: if a file is damaged.
        """
        return cls.from_checkpoint(open_tokenizer(preset), **kwargs)

    @classmethod
    def from_checkpoint(cls, checkpoint, **kwargs) -> "LlamaCausalLMPreprocessor":
        """Build the preprocessor of a checkpoint that `kllama.checkpoints.formats` has opened."""
        config = dict(checkpoint.preprocessor_config)
        if "tokenizer" not in kwargs:
            config["tokenizer"] = tokenizer = LlamaTokenizer.from_checkpoint(checkpoint)
            config.setdefault("add_start_token", tokenizer.adds_start_token)
            config["add_start_token"] &= tokenizer.start_token is not None
            config["add_end_token"] = config.get("add_end_token", True) and tokenizer.end_token is not None
        return cls(**{**config, **kwargs})

    @classmethod
    def from_config(cls, config: dict) -> "LlamaCausalLMPreprocessor":
        return super().from_config(dict(config))  # The base class writes into what it is given.

    def get_config(self) -> dict:
        return {**super().get_config(), "loss_on": self.loss_on, "truncate": self.truncate}

    def _encode(self, x, width, make_rows):
        """Return ids, mask and what the loss counts, each `(B, width)`, or `(width,)` for a single sample."""

        def pack(samples):
            return pad(make_rows(samples, width), width, self.tokenizer.pad_token_id)

        if in_tf_function():
            from kllama.backend import tf_data

            return tf_data.encode_dense(lambda x: pack(read_samples(x)), x, width)
        samples = read_samples(x)
        outputs = pack(samples)
        return outputs if samples.is_batch else tuple(output[0] for output in outputs)

    def _training_rows(self, samples: Samples, width: int) -> list[Row]:
        rows = self._builder().training_rows(samples)
        self.num_cut_rows += sum(len(row.ids) > width for row in rows)
        return [cut(row, width, self.truncate or "right") for row in rows]

    def _fitting_prompts(self, samples: Samples, width: int) -> list[Row]:
        rows = [self.cut_prompt(ids, width) for ids in self._builder().prompt_rows(samples)]
        _check_prompts(np.array([len(ids) for ids in rows], "int64"), width)
        return [Row(ids, [False] * len(ids)) for ids in rows]

    def _builder(self) -> RowBuilder:
        return RowBuilder(self.tokenizer, self.add_start_token, self.add_end_token, self.loss_on)

    def _length(self, sequence_length):
        return self.sequence_length if sequence_length is None else _checked_length(sequence_length)


def _checked_length(value) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"sequence_length = {value!r}; expected an int.")
    if value < 1:
        raise ValueError(f"sequence_length = {value}; expected at least 1.")
    return int(value)


def _check_choice(name: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}; expected one of {', '.join(map(repr, allowed))}.")


def _check_prompts(lengths: np.ndarray, width: int) -> None:
    rows = np.flatnonzero(lengths > width)
    if rows.size == 0:
        return
    faults = [f"inputs[{row}]: prompt has {lengths[row]} tokens, max_length is {width}" for row in rows]
    more = f"; and {len(faults) - MAX_REPORTED_ROWS} more" if len(faults) > MAX_REPORTED_ROWS else ""
    raise ValueError(
        "; ".join(faults[:MAX_REPORTED_ROWS]) + f"{more}. Shorten the prompt, raise max_length, "
        "or let the preprocessor cut it: truncate='left'."
    )


def _to_backend(outputs):
    # KerasHub's own last step: backend tensors, or NumPy arrays in a Grain pipeline. A graph keeps its tensors.
    return outputs if in_tf_function() else convert_preprocessing_outputs_python(outputs)
