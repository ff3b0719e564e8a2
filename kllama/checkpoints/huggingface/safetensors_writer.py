"""Safetensors files, one or shards with an index, written one tensor at a time: no file is ever in memory whole.

The shapes are known before the first value is, so each file gets its header and its length at once, and each tensor is
written to its place as it comes. It knows nothing of models. `writing.py` calls it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kllama.checkpoints.files.reader import FLOAT_DTYPES, check_finite

INDEX = "model.safetensors.index.json"
# Versions of transformers refuse a file that does not say so. It is about the layout of tensors, not about PyTorch.
_METADATA = {"__metadata__": {"format": "pt"}}


class _Place(NamedTuple):
    file: Path
    offset: int
    shape: tuple[int, ...]


class SafetensorsWriter:
    """The files of one set of weights, at first without values.

    Args:
        directory: where they are written.
        shapes: of the tensors by name, in the order in which they shall lie in the files.
        dtype: "float32", "bfloat16" or "float16", of all of them.
        max_shard_bytes: how much of them a file holds at most. A tensor that is larger has a file to itself.

    Attributes:
        missing: the names of the tensors that have not been written yet, in order.
    """

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, max_shard_bytes: float):
        self._code, self._dtype = next(item for item in FLOAT_DTYPES.items() if item[1].name == dtype)
        shards = self._split(shapes, max_shard_bytes)
        self._places: dict[str, _Place] = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            self._start_file(directory / name, shard)
        if len(shards) > 1:
            self._write_index(directory / INDEX)
        self.missing = list(shapes)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write the values of a tensor, rounded to the dtype of the files.

        Args:
            name: one of `missing`.
            array: float, of the shape that it was announced with.

        Raises:
            CheckpointError: a value is not finite in the dtype of the files.
        """
        place = self._places[name]
        if array.shape != place.shape:
            raise ValueError(f"{name} has the shape {array.shape}; expected {place.shape}.")
        with np.errstate(over="ignore"):  # which is an error below
            array = np.ascontiguousarray(array, self._dtype)
        check_finite(array, f"{name} in {self._dtype.name}")
        with open(place.file, "r+b") as file:
            file.seek(place.offset)
            file.write(array.reshape(-1).view(np.uint8))
        self.missing.remove(name)

    def _num_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self._dtype.itemsize

    def _split(self, shapes, max_shard_bytes) -> list[dict[str, tuple[int, ...]]]:
        shards, size = [{}], 0
        for name, shape in shapes.items():
            num_bytes = self._num_bytes(shape)
            if shards[-1] and size + num_bytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = shape
            size += num_bytes
        return shards

    def _start_file(self, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        header, end = dict(_METADATA), 0
        for name, shape in shapes.items():
            start, end = end, end + self._num_bytes(shape)
            header[name] = {"dtype": self._code, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8, as the library's own do
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for name, shape in shapes.items():
            self._places[name] = _Place(path, 8 + len(text) + header[name]["data_offsets"][0], shape)

    def _write_index(self, path: Path) -> None:
        total = sum(self._num_bytes(place.shape) for place in self._places.values())
        weight_map = {name: place.file.name for name, place in self._places.items()}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
