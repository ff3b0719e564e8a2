"""What `generate` is given, as rows of token ids, and the way back to what it gives."""

import dataclasses
from collections.abc import Callable, Mapping

import keras
import numpy as np

from kllama.text.inputs import as_texts
from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.samples import read_samples


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of prompts, and the way back from token ids to what the caller passed.

    Attributes:
        rows: one int32 array of token ids a row.
        width: the width that the caller's padded ids had, or None for text.
        num_tokens: size of the tokenizer's vocabulary, or None where ids were passed.
        finish_text: function ({"token_ids", "padding_mask"}) -> list of strings, or None where ids were passed.
        is_single: whether the caller passed one string, or one conversation.
        is_chat: whether the prompts are conversations.
        stop_token_ids: what ends an answer in them, besides what always ends a row.
        cut: function (row, max_length) -> row that leaves room for a new token, or None where long prompts are refused.
    """

    rows: list
    width: int | None = None
    num_tokens: int | None = None
    finish_text: Callable | None = None
    is_single: bool = False
    is_chat: bool = False
    stop_token_ids: tuple[int, ...] = ()
    cut: Callable | None = None

    @property
    def is_empty(self) -> bool:
        return not self.rows

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], "int32")

    def padded(self, width: int) -> np.ndarray:
        """Give the token ids as int32 (B, width), padded with 0 on the right."""
        return np.stack([np.pad(row, (0, width - len(row))) for row in self.rows]).astype("int32")

    def mask(self, width: int) -> np.ndarray:
        """Give the padding mask that belongs to `padded(width)`: bool (B, width)."""
        return np.arange(width) < self.lengths[:, None]

    def finish(self, token_ids: np.ndarray, lengths: np.ndarray, *, strip_prompt: bool, width: int | None = None):
        """Turn generated rows into text, or into ids of some width, by default the longest row's."""
        starts = self.lengths if strip_prompt else np.zeros_like(lengths)
        rows = [row[start:end] for row, start, end in zip(token_ids, starts, lengths, strict=True)]
        finished = Prompts(rows)
        width = width or max(1, int(finished.lengths.max()))
        outputs = {"token_ids": finished.padded(width), "padding_mask": finished.mask(width)}
        if self.finish_text is None:
            return outputs
        texts = self.finish_text(outputs)
        return texts[0] if self.is_single else texts


def read_prompts(inputs, preprocessor) -> Prompts:
    """Read text, conversations or token ids.

    Raises:
        TypeError: for anything else.
        ValueError: for text without a preprocessor, and for a padding mask that does not pad on the right.
    """
    if isinstance(inputs, Mapping) and "messages" not in inputs:
        return _read_token_ids(inputs)
    if isinstance(inputs, Mapping) or (isinstance(inputs, list | tuple) and _holds_messages(inputs)):
        return _read_conversations(inputs, preprocessor)
    texts, is_batch = as_texts(inputs, "inputs")
    return _text_prompts(preprocessor, _tokenize(texts, _given(preprocessor)), is_single=not is_batch)


def _text_prompts(preprocessor, rows: list, **settings) -> Prompts:
    is_ours = isinstance(preprocessor, LlamaCausalLMPreprocessor)
    return Prompts(
        rows,
        num_tokens=preprocessor.tokenizer.vocabulary_size(),
        finish_text=preprocessor.generate_postprocess,
        cut=preprocessor.cut_prompt if is_ours and preprocessor.truncate is not None else None,
        **settings,
    )


def _given(preprocessor):
    if preprocessor is None:
        raise ValueError("inputs are text, but the model has no preprocessor; expected a dict of token_ids.")
    return preprocessor


def _holds_messages(inputs) -> bool:
    first = inputs[0] if inputs else None
    return isinstance(first[0] if isinstance(first, list | tuple) and first else first, Mapping)


def _read_conversations(inputs, preprocessor) -> Prompts:
    if not isinstance(_given(preprocessor), LlamaCausalLMPreprocessor):
        raise TypeError(f"preprocessor = {preprocessor!r}; messages need a LlamaCausalLMPreprocessor.")
    rows = [np.array(ids, "int32") for ids in preprocessor.prompt_rows(inputs)]
    stop = preprocessor.tokenizer.turn_end_token_id
    return _text_prompts(
        preprocessor,
        rows,
        is_single=not read_samples(inputs).is_batch,
        is_chat=True,
        stop_token_ids=() if stop is None else (stop,),
    )


def _tokenize(texts, preprocessor) -> list[np.ndarray]:
    if not texts:
        return []
    # Wide enough for all of them: a token stands for at least a byte, and a normalizer makes at most 18 characters of
    # one. What is too long is told by `check_lengths`, or cut by `fit_prompts`.
    width = 18 * max(len(text.encode("utf-8", "replace")) for text in texts) + 16
    prompts = preprocessor.generate_preprocess(texts, sequence_length=width)
    token_ids, mask = (keras.ops.convert_to_numpy(prompts[name]) for name in ("token_ids", "padding_mask"))
    return [row[keep.astype(bool)].astype("int32") for row, keep in zip(token_ids, mask, strict=True)]


def _read_token_ids(inputs: Mapping) -> Prompts:
    if "token_ids" not in inputs:
        raise ValueError(
            f"inputs has the keys {sorted(inputs)}; expected 'messages', or 'token_ids' and 'padding_mask'."
        )
    token_ids = keras.ops.convert_to_numpy(inputs["token_ids"])
    if token_ids.ndim != 2 or not np.all(token_ids == np.floor(token_ids)):
        raise ValueError(f"inputs['token_ids'] has shape {token_ids.shape}; expected integers of shape (B, T).")
    mask = inputs.get("padding_mask")
    mask = np.ones(token_ids.shape, bool) if mask is None else keras.ops.convert_to_numpy(mask).astype(bool)
    if mask.shape != token_ids.shape:
        raise ValueError(
            f"inputs['padding_mask'] has shape {mask.shape}; expected that of token_ids {token_ids.shape}."
        )
    if np.any(mask[:, 1:] & ~mask[:, :-1]):
        raise ValueError("inputs['padding_mask'] has a real token after padding; expected padding on the right only.")
    rows = [row[: keep.sum()].astype("int32") for row, keep in zip(token_ids, mask, strict=True)]
    return Prompts(rows, width=token_ids.shape[1])


def check_ids(prompts: Prompts, vocabulary_size: int) -> None:
    """Raise a ValueError for an empty row and for an id that is not in the vocabulary."""
    for index, row in enumerate(prompts.rows):
        if not len(row):
            raise ValueError(f"inputs row {index} has no tokens; expected at least one (a start token, say).")
        wrong = row[(row < 0) | (row >= vocabulary_size)]
        if len(wrong):
            raise ValueError(
                f"inputs row {index} holds the token id {wrong[0]}; expected ids from 0 to {vocabulary_size - 1}."
            )


def join_results(results: list):
    """Join what `generate` gave for each batch of a dataset: a list of texts, or ids padded to one width."""
    if not any(isinstance(result, Mapping) for result in results):
        return [text for result in results for text in ([result] if isinstance(result, str) else result)]
    width = max(result["token_ids"].shape[1] for result in results)
    return {
        name: np.concatenate([np.pad(result[name], ((0, 0), (0, width - result[name].shape[1]))) for result in results])
        for name in ("token_ids", "padding_mask")
    }
