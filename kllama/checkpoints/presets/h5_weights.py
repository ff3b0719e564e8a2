"""Keras' weight files: `model.weights.h5`, or the shards that `model.weights.json` names.

Lists what the files hold without reading it, then gives one array at a time. Knows places in a file, not the variables
of a model; which place belongs to which variable is for the format that uses this.
"""

import math
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import ml_dtypes
import numpy as np

from kllama.checkpoints.files.reader import check_file, check_file_name, check_finite, read_json, shown
from kllama.errors import CheckpointError, MissingFileError

_SINGLE, _INDEX = "model.weights.h5", "model.weights.json"
FLOATS = ("float32", "bfloat16", "float16")
_DTYPES = (*FLOATS, "int8")
_DEEPEST_GROUP = 8


class StoredTensor(NamedTuple):
    """Where and how a tensor is stored."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class H5Weights:
    """The weight files of a directory, or one weight file.

    Args:
        path: the directory, or the file.
        group: the group of the file that is looked at, all of it by default.
        among: the names of the files of the directory that count, all by default.

    Attributes:
        tensors: a `StoredTensor` for each dataset, by its name in the file, such as `layers/token_embedding/vars/0`.

    Raises:
        MissingFileError: if there are none, or a shard is missing.
        CheckpointError: if there are two sets, or a file is damaged, links to another, or holds anything but floats and
            int8 in plain blocks.
    """

    def __init__(self, path: Path, group: str = "/", among: Container[str] | None = None):
        self.tensors = _find_tensors(_weight_files(path, among), group)

    @property
    def stored_bytes(self) -> Counter:
        """How many bytes the files hold of each dtype."""
        counts = Counter()
        for stored in self.tensors.values():
            counts[stored.dtype] += math.prod(stored.shape) * np.dtype(stored.dtype).itemsize
        return counts

    def read(self, names: list[str], must_be_finite: bool = True) -> Iterator[np.ndarray]:
        """Yield the arrays of some datasets in the dtype that they are stored in, one at a time.

        Raises:
            CheckpointError: values that are not finite and must be, or a file that changed since it was listed.
        """
        with ExitStack() as stack:
            files = {self.tensors[name].file for name in names}
            opened = {file: stack.enter_context(_open_h5(file)) for file in files}
            for name in names:
                stored = self.tensors[name]
                array = _read_array(opened[stored.file], name, stored)
                if must_be_finite and stored.dtype in FLOATS:
                    check_finite(array, f"{stored.file}: {name}")
                yield array

    def read_part(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """Return a part of an array, which may hold values that are not finite; errors are those of `read`."""
        stored = self.tensors[name]
        with _open_h5(stored.file) as opened:
            return _read_array(opened, name, stored, part)


def find_group(path: Path, groups: tuple[str, ...]) -> str | None:
    """Return the first of some groups that a weight file has, or None.

    Raises:
        CheckpointError: the file is damaged.
    """
    with _open_h5(path) as file, _h5_errors(path):
        return next((group for group in groups if group in file), None)


def _weight_files(path: Path, among: Container[str] | None) -> list[Path]:
    if path.is_file():
        return [path]
    single, index = path / _SINGLE, path / _INDEX
    has_single, has_index = (file.exists() and (among is None or file.name in among) for file in (single, index))
    if has_single and has_index:
        raise CheckpointError(f"{path}: two weight sets, {_SINGLE} and {_INDEX}; expected one. Remove the stale one.")
    if has_index:
        names = _shard_names(index)
    elif has_single:
        names = [_SINGLE]
    else:
        raise MissingFileError(f"{path}: no weights; expected {_SINGLE} or {_INDEX}.", filename=str(single))
    for name in names:
        check_file(path / name)
    return [path / name for name in names]


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map = {shown(weight_map)}; expected an object with file names.")
    names = set()
    for group, value in weight_map.items():
        for name in value if isinstance(value, list) else [value]:
            names.add(check_file_name(name, f"{index}: weight_map[{shown(group)}]"))
    return sorted(names)


def _find_tensors(files: list[Path], group: str) -> dict[str, StoredTensor]:
    """List what the files hold, by dataset name, without reading it."""
    found = {}
    for file in files:
        with _open_h5(file) as opened:
            for name, stored in _list_tensors(opened, file, group):
                if name in found:
                    raise CheckpointError(
                        f"{file}: {name} is in {found[name].file.name} too; expected each tensor once."
                    )
                found[name] = stored
    return found


def _list_tensors(file: h5py.File, path: Path, group: str) -> list[tuple[str, StoredTensor]]:
    with _h5_errors(path):
        datasets = _datasets(file[group], path, _DEEPEST_GROUP)
        return [(item.name.lstrip("/"), _describe(item, path)) for item in datasets]


def _datasets(group: h5py.Group, path: Path, depth: int) -> Iterator[h5py.Dataset]:
    """Walk through the datasets of a file; a link is refused, not followed."""
    if not depth:
        raise CheckpointError(f"{path}: {group.name} is nested deeper than {_DEEPEST_GROUP}; expected Keras' groups.")
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise CheckpointError(f"{path}: {group.name}/{name} is a link; expected a group or a dataset.")
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from _datasets(item, path, depth - 1)
        elif isinstance(item, h5py.Dataset):
            yield item
        else:
            raise CheckpointError(f"{path}: {item.name} is a data type; expected a group or a dataset.")


def _describe(dataset: h5py.Dataset, path: Path) -> StoredTensor:
    """Say how a dataset is stored, which must be as Keras stores it: in one plain block of the file."""
    if dataset.external or dataset.is_virtual:
        raise CheckpointError(f"{path}: {dataset.name} lies in another file; expected its data here.")
    dtype = _dtype_name(dataset, path)
    # What is compressed, or never written, may be far larger in memory than on disk.
    size = dataset.id.get_storage_size()
    if dataset.chunks or size != dataset.nbytes:
        raise CheckpointError(
            f"{path}: {dataset.name} = {size} bytes for an array of {dataset.nbytes}; expected one plain block of its "
            "size."
        )
    return StoredTensor(path, dataset.shape, dtype)


def _dtype_name(dataset: h5py.Dataset, path: Path) -> str:
    # Keras writes bfloat16 as raw pairs of bytes, and says so in an attribute.
    if dataset.dtype.kind == "V" and dataset.dtype.itemsize == 2 and str(dataset.attrs.get("dtype")) == "bfloat16":
        return "bfloat16"
    for name in ("float32", "float16", "int8"):
        if dataset.dtype == np.dtype(name):
            return name
    raise CheckpointError(f"{path}: {dataset.name} is {dataset.dtype}; expected one of {', '.join(_DTYPES)}.")


def _open_h5(path: Path) -> h5py.File:
    with _h5_errors(path):
        return h5py.File(path, "r")


def _read_array(file: h5py.File, name: str, stored: StoredTensor, part: tuple[slice, ...] = ()) -> np.ndarray:
    with _h5_errors(stored.file):
        dataset = file[name]
        shape, array = dataset.shape, dataset[part]
    if stored.dtype == "bfloat16":
        array = array.view(ml_dtypes.bfloat16)
    if shape != stored.shape or array.dtype.name != stored.dtype:
        raise CheckpointError(f"{stored.file}: {name} has changed since the file was opened. Open it again.")
    return array


@contextmanager
def _h5_errors(path: Path) -> Iterator[None]:
    """Turn what h5py raises for a damaged file into a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: no sound HDF5 file: {error}. Download or save it again.") from error
