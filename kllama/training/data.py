"""What `fit` is given, made into what the model takes: text or token ids -> (x, y, sample_weight) in NumPy.

It takes data that is there as a whole; `batches` takes what comes batch by batch, and calls it. `fit`, `evaluate` and
`predict` of the models call it.
"""

import warnings
from collections.abc import Callable

import keras
import numpy as np
from keras_hub.src.utils.tensor_utils import no_convert_scope

from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.samples import Samples, read_samples

_PIECE = 1024


def is_token_ids(x) -> bool:
    """Tell whether `x` is a mapping with `token_ids`, or an array, a tensor or a nested list of integers."""
    if isinstance(x, dict):
        return "token_ids" in x
    if isinstance(x, list | tuple):
        return bool(x) and isinstance(x[0], list | tuple | np.ndarray) and np.asarray(x[0]).dtype.kind in "iu"
    return "int" in str(getattr(x, "dtype", ""))  # of any framework


def prepare_texts(x, preprocessor: Callable | None, sample_weight=None, *, is_training: bool = True) -> tuple:
    """Tokenize and pack texts, prompts with responses, or conversations.

    Args:
        x: what `kllama.text.samples.read_samples` takes.
        preprocessor: a `LlamaCausalLMPreprocessor`, or, for plain texts, any of KerasHub's.
        sample_weight: weights of the rows (B,) or of their labels (B, T), or None for ones.
        is_training: whether the labels matter: to say how many rows were cut, to refuse data without labels, and to
            make rows no wider than the longest of them needs. Else they are as wide as `sequence_length` says, as those
            of a dataset are.

    Returns:
        `(x, y, sample_weight)` in NumPy: `x` is `{"token_ids", "padding_mask"}`, all (B, T) with T at most the
        preprocessor's `sequence_length`; the weights are float32 and the rest int32.

    Raises:
        ValueError: no rows; with `is_training`, none in which the loss counts anything; text without a preprocessor.
        TypeError: a row is of the wrong type; the message has its index.
    """
    samples = read_rows(x)
    num_cut_before = num_cut_rows(preprocessor)
    # Piece by piece, trimmed: rows as wide as `sequence_length` never fill the memory all at once in training.
    starts = range(0, len(samples), _PIECE)
    pieces = (encode(samples.part(start, start + _PIECE), preprocessor) for start in starts)
    pieces = [_trimmed(piece) if is_training else piece for piece in pieces]
    width = max(piece[0].shape[1] for piece in pieces)
    token_ids, padding_mask, y, weights = (
        np.concatenate([np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays])
        for arrays in zip(*pieces, strict=True)
    )
    if is_training:
        _report_cut_rows(num_cut_rows(preprocessor) - num_cut_before, len(samples), preprocessor)
        _check_labels(weights)
    return {"token_ids": token_ids, "padding_mask": padding_mask}, y, weigh(weights, sample_weight)


def read_rows(x) -> Samples:
    """Read samples as `kllama.text.samples.read_samples` does, and raise a ValueError if there are none."""
    samples = read_samples(x)
    if len(samples) == 0:
        raise ValueError("x holds no training rows; expected at least one.")
    return samples


def encode(part, preprocessor: Callable | None) -> tuple:
    """Let a preprocessor make rows: token ids, padding mask, labels and their weights, each (B, T) in NumPy."""
    if preprocessor is None:
        raise ValueError("x is text, but the model has no preprocessor; expected token ids.")
    if isinstance(preprocessor, LlamaCausalLMPreprocessor):
        # NumPy it stays, since worker processes must not touch a device. `__call__` would print all rows with an error.
        with no_convert_scope():
            x, y, weights = preprocessor.call(part)
    else:
        x, y, weights = preprocessor(part)
    token_ids, padding_mask, y, weights = (to_numpy(a) for a in (x["token_ids"], x["padding_mask"], y, weights))
    return token_ids.astype("int32"), padding_mask.astype("int32"), y.astype("int32"), weights.astype("float32")


def _trimmed(arrays: tuple) -> list:
    width = max(1, arrays[1].sum(-1).max())
    return [array[:, :width] for array in arrays]


def num_cut_rows(preprocessor) -> int:
    """Give how many rows a preprocessor has cut so far; one of KerasHub's does not count them."""
    return preprocessor.num_cut_rows if isinstance(preprocessor, LlamaCausalLMPreprocessor) else 0


def _report_cut_rows(num_cut: int, num_rows: int, preprocessor) -> None:
    if num_cut:
        warnings.warn(
            f"{num_cut} of {num_rows} rows are longer than sequence_length ({preprocessor.sequence_length}) and were "
            f"cut on the {preprocessor.truncate or 'right'}; sequence_length= or truncate= of the preprocessor changes "
            "that.",
            stacklevel=5,  # the caller of `fit`
        )


def _check_labels(weights: np.ndarray) -> None:
    if not weights.any():
        raise ValueError(
            "x holds no label that the loss counts: there are no replies in it, or no row has two tokens, or "
            "sequence_length cuts the replies away. With loss_on='all' the preprocessor counts every token; a larger "
            "sequence_length, or truncate='left', keeps more of the replies."
        )


def prepare_token_ids(x, y=None, sample_weight=None, vocabulary_size: int | None = None) -> tuple:
    """Complete token ids to what the model is trained on: each position predicts the token after it.

    Args:
        x: ints (B, T), or `{"token_ids": (B, T), "padding_mask": (B, T)}`; without a mask all tokens are real.
        y: labels (B, T), taken as they are: all count but -100. None for the token ids moved one to the left, of which
            those count that are real.
        sample_weight: weights (B, T) or (B,), or None for ones.
        vocabulary_size: the number of rows that the model has for ids; None leaves that unchecked.

    Returns:
        `(x, y, sample_weight)` in NumPy, the weights (B, T) or None.

    Raises:
        ValueError: no rows, rows of different lengths, or an id without a row, which on JAX would be NaN.
    """
    x = {name: to_numpy(value) for name, value in (x if isinstance(x, dict) else {"token_ids": x}).items()}
    token_ids = x["token_ids"]
    if len(token_ids) == 0:
        raise ValueError("x holds no training rows; expected at least one.")
    if token_ids.ndim != 2:
        raise ValueError(f"token_ids has shape {token_ids.shape}; expected (rows, length).")
    if vocabulary_size is not None and token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < vocabulary_size:
        wrong = token_ids[(token_ids < 0) | (token_ids >= vocabulary_size)]
        raise ValueError(f"x holds the token id {wrong[0]}; expected ids from 0 to {vocabulary_size - 1}.")
    if x.get("padding_mask") is None:
        x["padding_mask"] = np.ones(token_ids.shape, "int32")
    if sample_weight is not None:
        sample_weight = _widen(sample_weight, token_ids.shape)
    if y is not None:
        return x, to_numpy(y), sample_weight
    is_real = x["padding_mask"] > 0
    predicts = np.pad(is_real[:, :-1] & is_real[:, 1:], ((0, 0), (0, 1)))  # padding on the left predicts nothing
    return x, np.roll(token_ids, -1, axis=1), weigh(predicts, sample_weight)


def to_numpy(value) -> np.ndarray:
    """Give an array, a nested list, or a tensor of any framework as a NumPy array."""
    if keras.ops.is_tensor(value):
        return keras.ops.convert_to_numpy(value)
    if isinstance(value, list | tuple) and len({len(row) for row in value if isinstance(row, list | tuple)}) > 1:
        raise ValueError("rows of token ids have different lengths; expected one length, with a padding_mask.")
    return np.asarray(value.cpu() if hasattr(value, "cpu") else value)  # PyTorch's, under another backend


def weigh(label_weights: np.ndarray, sample_weight) -> np.ndarray:
    """Multiply the weights of labels (B, T) by those of rows (B,) or of labels, or by nothing; float32."""
    if sample_weight is None:
        return label_weights.astype("float32")
    return label_weights * _widen(sample_weight, label_weights.shape)


def _widen(weights, shape) -> np.ndarray:
    """Give weights of rows (B,) or of tokens (B, T) as float32 (B, T)."""
    weights = to_numpy(weights)
    if weights.dtype.kind not in "biuf" or weights.shape not in (shape, shape[:1]):
        raise ValueError(
            f"sample_weight has shape {weights.shape} and dtype {weights.dtype}; expected numbers of shape "
            f"{shape[:1]} for rows, or {shape} for labels."
        )
    return np.broadcast_to(weights[:, None] if weights.ndim == 1 else weights, shape).astype("float32")
