"""What callers may pass as text and as ids, brought to lists of str and lists of lists of int.

It checks types and names the row that is wrong; it knows no vocabulary. The tokenizer and the preprocessor call it.
"""

import operator
import reprlib
from collections.abc import Sequence

import keras
import numpy as np


def as_texts(inputs, name: str = "texts") -> tuple[list[str], bool]:
    """Return the texts of an input as a list of str, and whether the input was a batch.

    Args:
        inputs: a str; a list or tuple of str; a NumPy array of str of shape () or (B,); an eager TensorFlow string
            tensor, whose bytes are read as UTF-8.
        name: what a message calls the input.

    Raises:
        TypeError: an input is not text; the message has its row.
    """
    if isinstance(inputs, str):
        return [without_surrogates(inputs)], False
    if not isinstance(inputs, list | tuple):
        return _array_texts(inputs, name)
    for row, text in enumerate(inputs):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{row}] = {reprlib.repr(text)} ({type(text).__name__}); expected a str.")
    return [without_surrogates(text) for text in inputs], True


def _array_texts(inputs, name):
    values = np.asarray(inputs)
    if values.ndim > 1 or values.dtype.kind not in "UTO":
        raise TypeError(f"{name} = {reprlib.repr(inputs)} ({type(inputs).__name__}); expected a str or a list of str.")
    texts = np.atleast_1d(values).tolist()
    if not isinstance(inputs, np.ndarray):  # A string tensor: bytes are all that it can hold.
        texts = [text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in texts]
    return as_texts(texts, name)[0], values.ndim == 1


def without_surrogates(text: str) -> str:
    """Return a text that UTF-8 can hold: a pair of surrogates as its character, a lone one as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def as_rows(ids) -> tuple[list[list[int]], bool]:
    """Return the rows of ids of an input as lists of int, and whether the input was a batch.

    Args:
        ids: an int; a list, an array or a backend tensor of shape (T,); a list of B such rows; an array or a backend
            tensor of shape (B, T); a ragged tensor of TensorFlow.

    Raises:
        TypeError: an id is not an integer.
    """
    ids = _as_list(ids)
    if not isinstance(ids, list):
        return [[_as_id(ids)]], False
    if _are_ints(ids):
        return [ids], False
    batch = [_as_list(row) for row in ids]
    if batch and all(isinstance(row, list) for row in batch):
        return [_as_ids(row) for row in batch], True
    return [_as_ids(batch)], False


def _as_ids(row: list) -> list[int]:
    return row if _are_ints(row) else [_as_id(token_id) for token_id in row]


def _are_ints(row: list) -> bool:
    return set(map(type, row)) == {int}  # at the speed of C: detokenizing is not much more


def _as_list(ids):
    if isinstance(ids, int | list):
        return ids
    if hasattr(ids, "row_splits"):  # A ragged tensor of TensorFlow, which Keras would fill up with zeros.
        return ids.to_list()
    if keras.ops.is_tensor(ids):
        ids = keras.ops.convert_to_numpy(ids)
    if isinstance(ids, Sequence) and not isinstance(ids, str):
        return list(ids)
    return np.asarray(ids).tolist()


def _as_id(value) -> int:
    if isinstance(value, bool):
        raise TypeError(f"id = {value!r}; expected an integer.")
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"id = {reprlib.repr(value)}; expected an integer.") from error
