"""What `fit` is given, made into what the model takes: text or token ids -> (x, y, sample_weight) in NumPy."""

from collections.abc import Callable

import keras
import numpy as np


def is_text(x) -> bool:
    """Tell whether `x` is a string or holds strings."""
    if isinstance(x, str | bytes):
        return True
    if isinstance(x, list | tuple):
        return bool(x) and is_text(x[0])
    return isinstance(x, np.ndarray) and x.dtype.kind in "USO"


def is_token_ids(x) -> bool:
    """Tell whether `x` is a mapping with `token_ids`, or an array of integers."""
    if isinstance(x, dict):
        return "token_ids" in x
    return isinstance(x, np.ndarray) and x.dtype.kind in "iu"


def prepare_texts(texts, preprocessor: Callable) -> tuple:
    """Tokenize and pack texts, no wider than the longest of them needs.

    Args:
        texts: strings.
        preprocessor: a `LlamaCausalLMPreprocessor`.

    Returns:
        `(x, y, sample_weight)`: `x` is `{"token_ids", "padding_mask"}`, all (B, T) with T at most the preprocessor's
        `sequence_length`.
    """
    texts = texts.tolist() if isinstance(texts, np.ndarray) else list(texts)
    x, y, sample_weight = preprocessor(texts)
    x = {name: keras.ops.convert_to_numpy(value) for name, value in x.items()}
    width = max(1, int(x["padding_mask"].sum(-1).max()))
    return (
        {name: value[:, :width] for name, value in x.items()},
        keras.ops.convert_to_numpy(y)[:, :width],
        keras.ops.convert_to_numpy(sample_weight)[:, :width],
    )


def prepare_token_ids(x, y=None, sample_weight=None) -> tuple:
    """Complete token ids to what the model is trained on: each position predicts the token after it.

    Args:
        x: int array (B, T), or `{"token_ids": (B, T), "padding_mask": (B, T)}`; without a mask all tokens are real.
        y: labels (B, T), taken as they are; None for the token ids moved one to the left.
        sample_weight: weights (B, T); None for the padding mask moved one to the left where `y` is None too.

    Returns:
        `(x, y, sample_weight)`.
    """
    x = dict(x) if isinstance(x, dict) else {"token_ids": x}
    token_ids = np.asarray(x["token_ids"])
    if x.get("padding_mask") is None:
        x["padding_mask"] = np.ones(token_ids.shape, "int32")
    if y is not None:
        return x, y, sample_weight
    y = np.roll(token_ids, -1, axis=1)
    if sample_weight is None:
        sample_weight = np.roll(np.asarray(x["padding_mask"]) > 0, -1, axis=1).astype("float32")
        sample_weight[:, -1] = 0
    return x, y, sample_weight
