"""Data that comes batch by batch, prepared as it comes: PyDatasets, DataLoaders, generators, pipelines.

Keras goes on deciding when a batch is read; here a batch of text or token ids becomes one of arrays. `data` prepares;
`fit`, `evaluate` and `predict` of the models call `wrap_batches`.
"""

import functools
import itertools
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping

import keras
import numpy as np
from keras.src.trainers.data_adapters import data_adapter_utils
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from kllama.training.data import encode, is_token_ids, num_cut_rows, prepare_token_ids, read_rows, weigh

_LOADERS = {"torch": {"DataLoader"}, "grain": {"DataLoader", "MapDataset", "IterDataset"}}


def is_tf_dataset(x) -> bool:
    """Tell whether `x` is a `tf.data.Dataset`, without importing TensorFlow."""
    return any(cls.__module__.startswith("tensorflow.") and cls.__name__ == "DatasetV2" for cls in type(x).__mro__)


def is_batches(x) -> bool:
    """Tell whether `x` gives batches: a pipeline of any framework, a `PyDataset`, or a Python generator."""
    return is_tf_dataset(x) or _is_loader(x) or isinstance(x, keras.utils.PyDataset | types.GeneratorType)


def _is_loader(x) -> bool:
    """Tell whether `x` is a DataLoader of PyTorch or a pipeline of Grain, without importing them."""
    return any(cls.__name__ in _LOADERS.get(cls.__module__.partition(".")[0], ()) for cls in type(x).__mro__)


def unpack_batch(batch) -> tuple:
    """Take a batch apart into `(x, y, sample_weight)`.

    A tuple of one to three is `(x,)`, `(x, y)` or `(x, y, sample_weight)`, and so is such a list, which a DataLoader
    makes of it. What has no batch for its first element, as a list of texts has not, is `x` itself.
    """
    if not isinstance(batch, list | tuple) or not 1 <= len(batch) <= 3 or not _holds_rows(batch[0]):
        return batch, None, None
    if isinstance(batch, list) and all(isinstance(row, Mapping) for row in batch):
        return batch, None, None
    return (*batch, None, None)[:3]


def _holds_rows(x) -> bool:
    if isinstance(x, list | tuple):
        return not (x and isinstance(x[0], int | np.integer | Mapping))  # a row of ids, or a conversation
    if isinstance(x, str | bytes) or x is None:
        return False
    if isinstance(x, Mapping):
        return True
    shape = getattr(x, "shape", ())
    return len(shape) > 1 or (len(shape) == 1 and "int" not in str(x.dtype))


def prepare_batch(batch, preprocessor: Callable | None, vocabulary_size: int | None = None) -> tuple:
    """Turn one batch of text or token ids into `({"token_ids", "padding_mask"}, y, sample_weight)` in NumPy.

    The arrays are (B, T), the weights float32 and the rest int32. For text T is the preprocessor's `sequence_length`,
    so that all batches have one shape. A batch in which rows were cut, or in which nothing counts, is warned of.

    Raises:
        ValueError: labels with text, or no rows.
        TypeError: a row is of the wrong type; the message has its index.
    """
    x, y, sample_weight = unpack_batch(batch)
    if not is_token_ids(x):
        refuse_labels(y)
        num_cut_before = num_cut_rows(preprocessor)
        token_ids, padding_mask, y, weights = encode(read_rows(x).part(0, sys.maxsize), preprocessor)
        if num_cut_rows(preprocessor) > num_cut_before:
            # Always the same text, so that Python shows it once.
            warnings.warn("rows longer than the preprocessor's sequence_length were cut.", stacklevel=2)
        if not weights.any():
            warnings.warn("a batch holds no label that the loss counts, and teaches nothing.", stacklevel=2)
        return {"token_ids": token_ids, "padding_mask": padding_mask}, y, weigh(weights, sample_weight)
    x, y, weights = prepare_token_ids(x, y, sample_weight, vocabulary_size)
    weights = np.ones(y.shape, "float32") if weights is None else weights
    return {name: x[name].astype("int32") for name in ("token_ids", "padding_mask")}, y.astype("int32"), weights


def refuse_labels(y) -> None:
    """Raise a ValueError for labels with text."""
    if y is not None:
        raise ValueError(
            "y must be None with text: the labels of a text are its own next tokens. Responses to prompts come as "
            "{'prompts': ..., 'responses': ...}, weights in a batch as (x, None, sample_weight)."
        )


def wrap_batches(x, preprocessor: Callable | None, vocabulary_size: int | None = None):
    """Give what Keras takes and what prepares the batches of `x` as they are read; not for tf.data pipelines.

    Raises:
        ValueError: there is no batch in `x`.
    """
    prepare = functools.partial(prepare_batch, preprocessor=preprocessor, vocabulary_size=vocabulary_size)
    if isinstance(x, keras.utils.PyDataset):
        return PreparedDataset(x, prepare)
    return PreparedBatches(x, prepare)


class PreparedDataset(keras.utils.PyDataset):
    """A `PyDataset` whose batches are prepared where they are read: in the same worker, in the same order.

    Args:
        dataset: the `PyDataset`.
        prepare: function (batch) -> prepared batch.
    """

    def __init__(self, dataset: keras.utils.PyDataset, prepare: Callable):
        _check_number_of_batches(dataset.num_batches)
        super().__init__(dataset.workers, dataset.use_multiprocessing, dataset.max_queue_size)
        self._dataset = dataset
        self._prepare = prepare

    @property
    def num_batches(self) -> int | None:
        return self._dataset.num_batches

    def __getitem__(self, index):
        return self._prepare(self._dataset[index])

    def on_epoch_begin(self):
        self._dataset.on_epoch_begin()

    def on_epoch_end(self):
        self._dataset.on_epoch_end()


class PreparedBatches(DataAdapter):
    """What can be iterated over, batch by batch, as Keras reads data.

    Each pass iterates anew, so that a DataLoader shuffles and starts its workers as it does by itself. A generator has
    one pass only.

    Args:
        batches: a DataLoader, a Grain pipeline, or a generator.
        prepare: function (batch) -> prepared batch.
    """

    def __init__(self, batches, prepare: Callable):
        self._num_batches = None
        if isinstance(batches, types.GeneratorType):
            batches = _OnePass(batches)
        else:
            self._num_batches = _length(batches)
            _check_number_of_batches(self._num_batches)
        self._batches = batches
        self._prepare = prepare

    def get_numpy_iterator(self) -> Iterator[tuple]:
        batch = None
        for batch in self._batches:
            yield self._prepare(batch)
        if batch is None:
            raise ValueError("x holds no training rows; expected at least one batch in each pass.")

    def get_jax_iterator(self) -> Iterator[tuple]:
        return self.get_numpy_iterator()

    def get_tf_dataset(self):
        from kllama.backend import tf_data

        return tf_data.dataset_of(self.get_numpy_iterator)

    def get_torch_dataloader(self):
        return data_adapter_utils.get_torch_dataloader(self.get_numpy_iterator())

    @property
    def num_batches(self) -> int | None:
        return self._num_batches

    @property
    def batch_size(self) -> None:
        return None

    @property
    def has_partial_batch(self) -> None:
        return None

    @property
    def partial_batch_size(self) -> None:
        return None


class _OnePass:
    """A generator, whose first two batches may be looked at before the pass: Keras builds a model with them."""

    def __init__(self, generator):
        self._first = list(itertools.islice(generator, 2))
        if not self._first:
            raise ValueError("x holds no training rows; expected a generator of at least one batch.")
        self._rest = generator
        self._is_under_way = False

    def __iter__(self):
        if not self._is_under_way:
            yield from self._first
            self._is_under_way = True
        elif (batch := next(self._rest, None)) is None:
            raise ValueError(
                "a generator has ended; expected as many batches as all epochs take, with steps_per_epoch= (or "
                "validation_steps=), or data that can be read again in each epoch."
            )
        else:
            yield batch
        yield from self._rest


def _length(batches) -> int | None:
    try:
        length = len(batches)
    except TypeError:  # a stream
        return None
    return None if length >= sys.maxsize else length  # how Grain counts what is repeated without end


def _check_number_of_batches(num_batches: int | None) -> None:
    if num_batches == 0:
        raise ValueError("x holds no training rows; expected at least one batch.")
