"""What `fit` is given, made into what the model takes: text or token ids -> (x, y, sample_weight) in NumPy."""

from collections.abc import Callable

import keras
import numpy as np

_PIECE = 1024


def is_text(x) -> bool:
    """Tell whether `x` is a string or holds strings."""
    if isinstance(x, str | bytes):
        return True
    if isinstance(x, list | tuple):
        return bool(x) and is_text(x[0])
    return isinstance(x, np.ndarray) and x.dtype.kind in "USO"


def is_tf_dataset(x) -> bool:
    """Tell whether `x` is a `tf.data.Dataset`, without importing TensorFlow."""
    return any(cls.__module__.startswith("tensorflow.") and cls.__name__ == "DatasetV2" for cls in type(x).__mro__)


def is_token_ids(x) -> bool:
    """Tell whether `x` is a mapping with `token_ids`, or an array or a nested list of integers."""
    if isinstance(x, dict):
        return "token_ids" in x
    if isinstance(x, list | tuple):
        return bool(x) and isinstance(x[0], list | tuple | np.ndarray) and np.asarray(x[0]).dtype.kind in "iu"
    if isinstance(x, np.ndarray):
        return x.dtype.kind in "iu"
    return keras.ops.is_tensor(x) and "int" in keras.backend.standardize_dtype(x.dtype)


def prepare_texts(texts, preprocessor: Callable, sample_weight=None) -> tuple:
    """Tokenize and pack texts, no wider than the longest of them needs.

    Args:
        texts: strings.
        preprocessor: a `LlamaCausalLMPreprocessor`.
        sample_weight: weights of the texts (B,), or None for ones.

    Returns:
        `(x, y, sample_weight)` in NumPy: `x` is `{"token_ids", "padding_mask"}`, all (B, T) with T at most the
        preprocessor's `sequence_length`.
    """
    texts = texts.tolist() if isinstance(texts, np.ndarray) else list(texts)
    # A preprocessor gives tensors of the backend: piece by piece, they never fill the memory of a device.
    pieces = [_prepare_piece(texts[i : i + _PIECE], preprocessor) for i in range(0, len(texts), _PIECE)]
    width = max(piece.shape[-1] for piece in pieces)
    padded = [np.pad(piece, ((0, 0), (0, 0), (0, width - piece.shape[-1]))) for piece in pieces]
    token_ids, padding_mask, y, weights = np.concatenate(padded, axis=1)
    if sample_weight is not None:
        weights = weights * _widen(sample_weight, weights.shape)
    return {"token_ids": token_ids, "padding_mask": padding_mask}, y, weights.astype("float32")


def _prepare_piece(texts: list[str], preprocessor: Callable) -> np.ndarray:
    x, y, weights = preprocessor(texts)
    arrays = (keras.ops.convert_to_numpy(a) for a in (x["token_ids"], x["padding_mask"], y, weights))
    stacked = np.stack([array.astype("int32") for array in arrays])
    return stacked[:, :, : max(1, stacked[1].sum(-1).max())]


def prepare_token_ids(x, y=None, sample_weight=None) -> tuple:
    """Complete token ids to what the model is trained on: each position predicts the token after it.

    Args:
        x: ints (B, T), or `{"token_ids": (B, T), "padding_mask": (B, T)}`; without a mask all tokens are real.
        y: labels (B, T), taken as they are: all count but -100. None for the token ids moved one to the left, of which
            those count that are real.
        sample_weight: weights (B, T) or (B,), or None for ones.

    Returns:
        `(x, y, sample_weight)` in NumPy, the weights (B, T) or None.
    """
    x = {name: _to_numpy(value) for name, value in (x if isinstance(x, dict) else {"token_ids": x}).items()}
    token_ids = x["token_ids"]
    if x.get("padding_mask") is None:
        x["padding_mask"] = np.ones(token_ids.shape, "int32")
    if sample_weight is not None:
        sample_weight = _widen(sample_weight, token_ids.shape)
    if y is not None:
        return x, _to_numpy(y), sample_weight
    is_real = np.roll(x["padding_mask"] > 0, -1, axis=1).astype("float32")
    is_real[:, -1] = 0
    return x, np.roll(token_ids, -1, axis=1), is_real if sample_weight is None else is_real * sample_weight


def _to_numpy(value):
    return keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else np.asarray(value)


def _widen(weights, shape) -> np.ndarray:
    """Give weights of rows (B,) or of tokens (B, T) as float32 (B, T)."""
    weights = _to_numpy(weights).astype("float32")
    return np.broadcast_to(weights[:, None] if weights.ndim == 1 else weights, shape)
