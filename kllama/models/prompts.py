"""What `generate` is given, as rows of token ids."""

import dataclasses
import reprlib
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
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], "int32")

    def padded(self, width: int) -> np.ndarray:
        """Give the token ids as int32 (B, width), padded with 0 on the right."""
        return np.stack([np.pad(row, (0, width - len(row))) for row in self.rows]).astype("int32")

    def mask(self, width: int) -> np.ndarray:
        """Give the padding mask that belongs to `padded(width)`: bool (B, width)."""
        return np.arange(width) < self.lengths[:, None]


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
    if type(preprocessor).generate_preprocess is LlamaCausalLMPreprocessor.generate_preprocess:
        return [np.array(ids, "int32") for ids in preprocessor.prompt_rows(texts)]
    # Wide enough for all of them: a token stands for at least a byte, and a normalizer makes at most 18 characters of
    # one. What is too long is told by `check_lengths`, or cut by `fit_prompts`.
    width = 18 * max(len(text.encode("utf-8", "replace")) for text in texts) + 16
    prompts = preprocessor.generate_preprocess(texts, sequence_length=width)
    token_ids, mask = (keras.ops.convert_to_numpy(prompts[name]) for name in ("token_ids", "padding_mask"))
    return [row[keep.astype(bool)].astype("int32") for row, keep in zip(token_ids, mask, strict=True)]


def _read_token_ids(inputs: Mapping) -> Prompts:
    unknown = inputs.keys() - {"token_ids", "padding_mask"}
    if "token_ids" not in inputs or unknown:
        raise ValueError(
            f"inputs has the keys {sorted(map(str, inputs))}; expected 'messages', or 'token_ids' and 'padding_mask'."
        )
    token_ids = _integers("token_ids", inputs["token_ids"])
    if token_ids.ndim != 2:
        raise ValueError(f"inputs['token_ids'] has shape {token_ids.shape}; expected integers of shape (B, T).")
    mask = inputs.get("padding_mask")
    mask = np.ones_like(token_ids) if mask is None else _integers("padding_mask", mask)
    if mask.shape != token_ids.shape:
        raise ValueError(
            f"inputs['padding_mask'] has shape {mask.shape}; expected that of token_ids {token_ids.shape}."
        )
    _check_mask(mask)
    rows = [row[keep > 0] for row, keep in zip(token_ids, mask, strict=True)]
    return Prompts(rows, width=token_ids.shape[1])


def _check_mask(mask: np.ndarray) -> None:
    """Raise a ValueError unless each row of a padding mask is zeros, ones, and zeros."""
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("inputs['padding_mask'] holds other values than 0 and 1; expected 1 for real tokens.")
    steps = np.diff(mask, axis=1, prepend=0, append=0)
    holes = np.flatnonzero((steps > 0).sum(1) > 1)
    if holes.size:
        raise ValueError(
            f"inputs['padding_mask'] has padding between the real tokens of row {holes[0]}; expected padding on the "
            "left and on the right only."
        )


def _integers(name: str, values) -> np.ndarray:
    """Read integers, also as whole floats, of any array or of lists: int64."""
    try:
        array = keras.ops.convert_to_numpy(values) if keras.ops.is_tensor(values) else np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"inputs[{name!r}] ({reprlib.repr(values)}) must be integers of shape (B, T).") from error
    if name == "padding_mask" and array.dtype.kind == "b":
        array = array.astype("int64")
    if array.size and array.dtype.kind not in "iuf":
        raise TypeError(f"inputs[{name!r}] has dtype {array.dtype}; expected integers of shape (B, T).")
    if array.dtype.kind == "f" and not np.all(array == np.floor(array)):
        raise ValueError(f"inputs[{name!r}] holds numbers that are not whole; expected integers of shape (B, T).")
    if array.dtype.kind in "fu":  # what is too large for an id stays so
        array = np.clip(array.astype("float64"), -(2.0**62), 2.0**62)
    return array.astype("int64")


def checked(prompts: Prompts, vocabulary_size: int) -> Prompts:
    """Give the prompts; raise a ValueError for an empty row and for an id that is not in the vocabulary."""
    for index in np.flatnonzero(prompts.lengths == 0)[:1]:
        raise ValueError(f"inputs row {index} has no tokens; expected at least one (a start token, say).")
    ids = np.concatenate([np.zeros(0, "int64"), *prompts.rows])
    for place in np.flatnonzero((ids < 0) | (ids >= vocabulary_size))[:1]:
        index = np.searchsorted(np.cumsum(prompts.lengths), place, side="right")
        raise ValueError(
            f"inputs row {index} holds the token id {ids[place]}; expected ids from 0 to {vocabulary_size - 1}."
        )
    return dataclasses.replace(prompts, rows=[row.astype("int32") for row in prompts.rows])
