"""Run a Python function over the strings of a TensorFlow graph.

A tokenizer is Python and Rust: a `tf.data` pipeline or a `tf.function` reaches it through `tf.numpy_function`, so the
ids are those of an eager call by construction. `text/` calls this on every Keras backend, and imports it only while a
graph is being traced. Such a graph runs in the process that built it, and cannot be exported.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf


def encode_ragged(encode: Callable[[list[str]], list[list[int]]], text, dtype: str):
    """Encode a string tensor to ids.

    Args:
        encode: takes B texts, returns B lists of ids.
        text: a str, or a string tensor of shape () or (B,).
        dtype: integer dtype of the ids.

    Returns:
        A `(None,)` tensor for one text, a `(B, None)` ragged tensor for a batch.
    """

    def run(texts):
        rows = encode(texts)
        lengths = np.array([len(row) for row in rows], "int64")
        return np.array([token for row in rows for token in row], dtype), lengths

    text = _strings(text)
    ids, lengths = _call(run, text, (dtype, "int64"))
    ids.set_shape((None,))
    if text.shape.rank == 0:
        return ids
    lengths.set_shape(text.shape)
    return tf.RaggedTensor.from_row_lengths(ids, lengths, validate=False)


def encode_dense(encode: Callable[[list[str]], tuple[np.ndarray, np.ndarray]], text, width: int):
    """Encode a string tensor to padded ids and their mask.

    Args:
        encode: takes B texts, returns ids `(B, width)` int32 and mask `(B, width)` bool.
        text: a str, or a string tensor of shape () or (B,).
        width: the padded length.

    Returns:
        Two tensors of shape `(width,)` for one text, `(B, width)` for a batch.
    """
    text = _strings(text)
    outputs = _call(encode, text, ("int32", "bool"))
    if text.shape.rank == 0:
        outputs = [output[0] for output in outputs]
    for output in outputs:
        output.set_shape((*text.shape, width))
    return outputs


def _strings(text):
    text = tf.convert_to_tensor(text)
    if text.dtype != tf.string or text.shape.rank not in (0, 1):
        raise TypeError(f"texts = {text}; expected a string tensor of shape () or (batch,).")
    return text


def _call(function, text, dtypes):
    @tf.autograph.experimental.do_not_convert
    def run(values):
        # TensorFlow strings are bytes that nobody has checked, and text never raises.
        return function([value.decode("utf-8", "replace") for value in np.atleast_1d(values)])

    return tf.numpy_function(run, [text], dtypes)


def next_token_labels(x, sample_weight=None):
    """Complete token ids in a `tf.data` pipeline, as `kllama.training.data.prepare_token_ids` does in NumPy."""
    x = dict(x) if isinstance(x, dict) else {"token_ids": x}
    token_ids = x["token_ids"]
    if x.get("padding_mask") is None:
        x["padding_mask"] = tf.ones_like(token_ids, "int32")
    is_real = tf.cast(x["padding_mask"][:, 1:], "float32")
    is_real = tf.pad(is_real, [[0, 0], [0, 1]])
    if sample_weight is not None:
        is_real *= tf.reshape(tf.cast(sample_weight, "float32"), (tf.shape(token_ids)[0], -1))
    return x, tf.roll(token_ids, -1, axis=1), is_real
