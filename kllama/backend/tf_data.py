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
        rows = encode(_decoded(np.atleast_1d(texts).tolist()))
        lengths = np.array([len(row) for row in rows], "int64")
        return np.array([token for row in rows for token in row], dtype), lengths

    text = _strings(text)
    ids, lengths = _call(run, [text], (dtype, "int64"))
    ids.set_shape((None,))
    if text.shape.rank == 0:
        return ids
    lengths.set_shape(text.shape)
    return tf.RaggedTensor.from_row_lengths(ids, lengths, validate=False)


def decode(detokenize: Callable[[list[list[int]]], list[str]], ids):
    """Join ids into texts.

    Args:
        detokenize: takes B lists of ids, returns B texts.
        ids: a tensor of integers of shape (), (T,) or (B, T), or a ragged one (B, None).

    Returns:
        A string tensor of shape (), or (B,) for a batch.
    """
    ids = ids if isinstance(ids, tf.RaggedTensor) else tf.convert_to_tensor(ids)
    if not ids.dtype.is_integer or ids.shape.rank not in (0, 1, 2):
        raise TypeError(f"ids = {ids}; expected a tensor of integers of shape (), (length,) or (batch, length).")

    def run(values, lengths):
        rows = _rows(values, lengths) if isinstance(ids, tf.RaggedTensor) else np.atleast_2d(values)
        return np.array([text.encode() for text in detokenize([row.tolist() for row in rows])], object)

    texts = _call(run, _parts(ids), tf.string)
    texts.set_shape((ids.shape[0] if ids.shape.rank == 2 else 1,))
    return texts if ids.shape.rank == 2 else texts[0]


def encode_dense(encode: Callable[[object], tuple[np.ndarray, np.ndarray, np.ndarray]], x, width: int):
    """Encode string tensors to padded ids, their mask, and what the loss counts.

    Args:
        encode: takes what `kllama.text.samples.read_samples` does, in lists; returns ids `(B, width)` int32 and two
            masks `(B, width)` bool.
        x: a str, or a string tensor of shape () or (B,); `{"prompts", "responses"}` of these; or
            `{"messages": {"role", "content"}}` of string tensors (T,) for one conversation, (B, T), or ragged.
        width: the padded length.

    Returns:
        Three tensors of shape `(width,)` for one sample, `(B, width)` for a batch.
    """
    is_chat = isinstance(x, dict) and "messages" in x
    leaves = [_strings(leaf, rank=1 if is_chat else 0) for leaf in _leaves(x)]

    def run(*arrays):
        arrays = iter(arrays)
        lists = iter([_as_lists(leaf, next(arrays), next(arrays)) for leaf in leaves])
        return encode(_rebuilt(x, lists))

    outputs = _call(run, [part for leaf in leaves for part in _parts(leaf)], ("int32", "bool", "bool"))
    shape = leaves[0].shape[: leaves[0].shape.rank - (1 if is_chat else 0)]
    if shape.rank == 0:
        outputs = [output[0] for output in outputs]
    for output in outputs:
        output.set_shape((*shape, width))
    return outputs


def _leaves(x) -> list:
    return [leaf for name in sorted(x) for leaf in _leaves(x[name])] if isinstance(x, dict) else [x]


def _rebuilt(x, leaves):
    return {name: _rebuilt(x[name], leaves) for name in sorted(x)} if isinstance(x, dict) else next(leaves)


def _strings(text, rank: int = 0):
    """Give a string tensor of some rank, or of one more for a batch."""
    text = text if isinstance(text, tf.RaggedTensor) else tf.convert_to_tensor(text)
    if text.dtype != tf.string or text.shape.rank not in (rank, rank + 1):
        shapes = "(turns,) or (batch, turns)" if rank else "() or (batch,)"
        raise TypeError(f"texts = {text}; expected a string tensor of shape {shapes}.")
    return text


def _parts(text) -> tuple:
    """Split what may be ragged into its strings and its row lengths, which are none for a dense tensor."""
    if isinstance(text, tf.RaggedTensor):
        return text.values, text.row_lengths()
    return text, tf.zeros((0,), "int64")


def _as_lists(text, values: np.ndarray, lengths: np.ndarray) -> list:
    if not isinstance(text, tf.RaggedTensor):
        return _decoded(np.atleast_1d(values).tolist())
    return [_decoded(row.tolist()) for row in _rows(values, lengths)]


def _rows(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Cut the values of a ragged tensor into its rows."""
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _decoded(values: list) -> list:
    # TensorFlow strings are bytes that nobody has checked, and text never raises.
    return [_decoded(value) if isinstance(value, list) else value.decode("utf-8", "replace") for value in values]


def _call(function, tensors, dtypes):
    return tf.numpy_function(tf.autograph.experimental.do_not_convert(function), tensors, dtypes)


def next_token_labels(x, sample_weight=None):
    """Complete token ids in a `tf.data` pipeline, as `kllama.training.data.prepare_token_ids` does in NumPy."""
    x = dict(x) if isinstance(x, dict) else {"token_ids": x}
    token_ids = x["token_ids"]
    if x.get("padding_mask") is None:
        x["padding_mask"] = tf.ones_like(token_ids, "int32")
    is_real = tf.cast(x["padding_mask"], "float32")
    predicts = tf.pad(is_real[:, :-1] * is_real[:, 1:], [[0, 0], [0, 1]])
    if sample_weight is not None:
        predicts = weigh_rows(predicts, sample_weight)
    return x, tf.roll(token_ids, -1, axis=1), predicts


def weigh_rows(label_weights, sample_weight):
    """Multiply the weights of labels (B, T) by those of rows (B,) or of labels, in a `tf.data` pipeline."""
    weights = tf.cast(label_weights, "float32")
    return weights * tf.reshape(tf.cast(sample_weight, "float32"), (tf.shape(weights)[0], -1))


def map_batches(dataset, prepare: Callable):
    """Prepare the batches of a `tf.data.Dataset` as it is read, several at a time and ahead of the training."""
    prepared = dataset.map(prepare, num_parallel_calls=tf.data.AUTOTUNE)
    if prepared.element_spec[0]["token_ids"].shape.rank == 1:
        raise ValueError("x gives single samples; expected batches of them. Call batch() on the dataset.")
    return prepared.prefetch(tf.data.AUTOTUNE)


def dataset_of(batches: Callable):
    """Make a `tf.data.Dataset` of prepared batches.

    Args:
        batches: gives an iterator over `({"token_ids", "padding_mask"}, y, sample_weight)`, NumPy arrays (B, T), the
            weights float32 and the rest int32; called once for each pass.
    """
    ids, weights = tf.TensorSpec((None, None), "int32"), tf.TensorSpec((None, None), "float32")
    signature = {"token_ids": ids, "padding_mask": ids}, ids, weights
    return tf.data.Dataset.from_generator(batches, output_signature=signature)
