"""Meta's own layout: `params.json`, `consolidated.00.pth` and its shards, and `tokenizer.model`.

Each shard is what one GPU held: a slice of every matrix, and the whole of every norm. They are joined tensor by tensor.
RoPE is interleaved; `name_map` puts it in order. What `params.json` cannot tell is in `open_questions`. `models/` opens
a checkpoint through it.
"""

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kllama.checkpoints.checkpoint import STRICT, Checkpoint, Strictness
from kllama.checkpoints.files.reader import FLOAT_DTYPES, check_file, check_finite, listed, shown
from kllama.checkpoints.meta.params import read_params
from kllama.checkpoints.name_map import META, ExpectedTensor, expected_tensors, refuse_missing
from kllama.checkpoints.torch_files.archive import ArchivedTensor, TorchArchive
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError

PARAMS = "params.json"
TOKENIZER = "tokenizer.model"
EMBEDDINGS, HEAD, FIRST_QUERY = "tok_embeddings.weight", "output.weight", "layers.0.attention.wq.weight"
IGNORED_SUFFIX = "rope.freqs"  # frequencies that follow from the parameters; those of Llama 1 are in each layer

LLAMA3_VOCABULARY = 128_256
# Meta's code stops on these whichever model it runs: <|end_of_text|>, <|eom_id|>, <|eot_id|>.
_LLAMA3_STOPS = (128_001, 128_008, 128_009)

_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
# The axis along which a matrix is cut; norms are not cut. That of the embedding changed with Llama 3: see `_find_axis`.
_AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
_PIECE = 2**22  # bytes of a table that are compared at once
_LOGGER = logging.getLogger(__name__)


def is_meta(path: str | Path) -> bool:
    """Whether `path` is a directory with a `params.json` and a file `consolidated.*`."""
    path = Path(path)
    return (path / PARAMS).is_file() and next(path.glob("consolidated.*"), None) is not None


class MetaCheckpoint(Checkpoint):
    """An opened directory of Meta's.

    Its tokenizer is the `tokenizer.model` in the directory, else the one in the directory above, where Meta's script
    for Llama 1 and 2 put it. `max_sequence_length` is None: no file says it. A `checklist.chk` is not read: the
    archives have checksums of their own.

    Args:
        path: the directory.
        strictness: what is let pass.

    Attributes: those of `Checkpoint`. The head is tied where `output.weight` is a copy of `tok_embeddings.weight`: for
        that, opening reads the two as far as they agree. `dtype` is that of the embedding.

    Raises:
        MissingFileError: the directory, `params.json` or a shard is not there.
        UnsupportedError: a sound checkpoint of something kllama does not read.
        CheckpointError: anything that is wrong, damaged or ambiguous.
    """

    format = "Meta"

    def __init__(self, path: str | Path, strictness: Strictness = STRICT):
        self.path = Path(path)
        self._strictness = strictness
        files = _find_shards(self.path)
        self.backbone_config, self.open_questions = read_params(self.path / PARAMS)
        shards = [TorchArchive(file) for file in files]
        _settle_vocabulary(self.backbone_config, shards, self.path)
        _check_shards(self.backbone_config, shards, self.path)
        self._tensors = _join_tensors(self.backbone_config, shards, self.path, strictness)
        self.stored_bytes = _count_bytes(self._tensors)
        self.dtype = self._tensors[EMBEDDINGS].dtype.name
        if _are_equal(self._tensors[EMBEDDINGS], self._tensors[HEAD]):
            self.backbone_config["tie_word_embeddings"] = True
            _LOGGER.info("%s: %s is a copy of %s; the two are tied again.", path, HEAD, EMBEDDINGS)
        self.tokenizer_config = _find_tokenizer(self.path)
        if self.backbone_config["vocabulary_size"] == LLAMA3_VOCABULARY:
            self.generation_config = {"stop_token_ids": list(_LLAMA3_STOPS)}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each variable's path and its array, in kllama's shape and the stored dtype, one at a time.

        Raises:
            CheckpointError: values that are not finite, norms or copies that differ between shards, or a file that
                changed since it was opened.
        """
        for tensor in expected_tensors(self.backbone_config, META):
            # No name for the array here: it would hold this one while the next is read.
            yield tensor.path, tensor.to_kllama(self._tensors[tensor.name].read(self._strictness.check_finite))


class _Joined(NamedTuple):
    """A tensor of which each shard has a part.

    Attributes:
        shards: the files, in the order of their ranks.
        name: in each of them.
        shape: of the whole.
        axis: along which the parts are joined; None where each shard has the whole.
        num_copies: how many neighbouring shards have the same part.
    """

    shards: list[TorchArchive]
    name: str
    shape: tuple[int, ...]
    axis: int | None
    num_copies: int

    @property
    def stored(self) -> ArchivedTensor:
        """The part of the first shard; the others are stored alike."""
        return self.shards[0].tensors[self.name]

    @property
    def dtype(self) -> np.dtype:
        return FLOAT_DTYPES[self.stored.dtype]

    def read(self, must_be_finite: bool) -> np.ndarray:
        """Return the whole, holding no more than one part besides."""
        if len(self.shards) == 1:
            return self._read_part(0, must_be_finite)
        whole = np.empty(self.shape, self.dtype)
        for rank in range(len(self.shards)):
            place = self._place(rank)
            if rank % self.num_copies == 0:
                whole[place] = self._read_part(rank, must_be_finite)
            elif not _same_bytes(whole[place], self._read_part(rank, must_be_finite)):
                raise CheckpointError(
                    f"{self.shards[rank].path}: {self.name} differs from that of {self.shards[rank - 1].path.name}; "
                    "expected the same numbers. Do the files belong to one model?"
                )
        return whole

    def read_rows(self, first: int, end: int) -> np.ndarray:
        """Return rows of the whole; where shards hold rows, the range must lie in one of them."""
        if self.axis == 0:
            rows = self.stored.shape[0]
            rank = first // rows
            return self.shards[rank].read_rows(self.name, first - rank * rows, end - rank * rows)
        return np.concatenate([shard.read_rows(self.name, first, end) for shard in self.shards], axis=1)

    def _read_part(self, rank: int, must_be_finite: bool) -> np.ndarray:
        shard = self.shards[rank]
        part = shard.read(self.name)
        if must_be_finite:
            check_finite(part, f"{shard.path}: {self.name}")
        return part

    def _place(self, rank: int) -> tuple[slice, ...]:
        if self.axis is None:
            return (slice(None),)
        size, part = self.stored.shape[self.axis], rank // self.num_copies
        return (slice(None),) * self.axis + (slice(part * size, (part + 1) * size),)


def _same_bytes(first: np.ndarray, second: np.ndarray) -> bool:
    """Compare numbers bit by bit, so that NaN equals itself and need not be widened."""
    unsigned = f"<u{first.itemsize}"
    return first.dtype == second.dtype and np.array_equal(first.view(unsigned), second.view(unsigned))


def _find_shards(directory: Path) -> list[Path]:
    """Return the files of the shards, by rank; there must be one of each."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise MissingFileError(f"{directory}: not a directory that can be listed.", str(directory)) from error
    shards = [name for name in names if _SHARD.fullmatch(name)]
    others = [name for name in names if name.startswith("consolidated.") and name not in shards]
    if not shards and others:
        raise UnsupportedError(
            f"{directory}: {listed(map(shown, others))}; expected consolidated.00.pth, Meta's own file. Files of this "
            "name are Mistral's: download those that Hugging Face's transformers reads, with config.json."
        )
    if others:
        raise CheckpointError(
            f"{directory}: {listed(map(shown, others))} beside {shards[0]}; expected one or the other."
        )
    expected = [f"consolidated.{rank:02d}.pth" for rank in range(max(len(shards), 1))]
    if shards != expected:
        missing = [name for name in expected if name not in shards]
        raise MissingFileError(
            f"{directory}: {len(shards)} shards without {listed(missing)}; expected one of each number from 00. "
            "Download it again.",
            str(directory / missing[0]),
        )
    return [directory / name for name in shards]


def _settle_vocabulary(config: dict, shards: list[TorchArchive], directory: Path) -> None:
    """Put in the size of the vocabulary where the parameters leave it to the tensors, and what follows from it.

    The head is always cut into rows. A theta that is absent is a constant of Meta's code: 10000 in that of Llama 1 and
    2, 500000 in that of Llama 3, which has a vocabulary of its own.
    """
    head = shards[0].tensors.get(HEAD)
    if head is None:
        raise CheckpointError(f"{directory}: missing tensors: {HEAD}. Meta's files have it even where it is tied.")
    if config["vocabulary_size"] is None:
        config["vocabulary_size"] = head.shape[0] * len(shards) if head.shape else 1
    if config["rope_max_wavelength"] is None:
        is_llama3 = config["vocabulary_size"] == LLAMA3_VOCABULARY
        config["rope_max_wavelength"] = 500000.0 if is_llama3 else 10000.0


def _check_shards(config: dict, shards: list[TorchArchive], directory: Path) -> None:
    """Check that the shards hold the same tensors, and that there are as many as the model was cut into."""
    first = shards[0]
    for shard in shards[1:]:
        if shard.tensors.keys() != first.tensors.keys():
            names = listed(map(shown, sorted(shard.tensors.keys() ^ first.tensors.keys())))
            raise CheckpointError(f"{shard.path}: not the same tensors as in {first.path.name}: {names}.")
        for name, stored in shard.tensors.items():
            expected = first.tensors[name]
            if (stored.shape, stored.dtype) != (expected.shape, expected.dtype):
                raise CheckpointError(
                    f"{shard.path}: {shown(name)} = {stored.dtype} {shown(stored.shape)}; expected {expected.dtype} "
                    f"{shown(expected.shape)}, as in {first.path.name}."
                )
    _check_count(config, shards, directory)


def _check_count(config: dict, shards: list[TorchArchive], directory: Path) -> None:
    """Check that there are as many shards as the queries were cut into; a wrong size is left to `_join`."""
    query, rows = shards[0].tensors.get(FIRST_QUERY), config["num_query_heads"] * config["head_dim"]
    if query is None or not query.shape or rows % query.shape[0]:
        return
    needed = rows // query.shape[0]
    if needed != len(shards):
        raise CheckpointError(
            f"{directory}: {len(shards)} files consolidated.*.pth; expected {needed}, for each has {query.shape[0]} of "
            f"the {rows} rows of {FIRST_QUERY}. Download all of one model, with its {PARAMS}."
        )


def _join_tensors(
    config: dict, shards: list[TorchArchive], directory: Path, strictness: Strictness
) -> dict[str, _Joined]:
    """Say how each tensor of the model is joined; the shards must hold exactly what the model needs."""
    stored = {name: tensor for name, tensor in shards[0].tensors.items() if not name.endswith(IGNORED_SUFFIX)}
    refuse_missing(config, stored, directory, META)
    joined = {tensor.name: _join(config, tensor, shards, directory) for tensor in expected_tensors(config, META)}
    unused = sorted(stored.keys() - joined.keys())
    if unused:
        names = listed(map(shown, unused))
        strictness.refuse_unused(f"{directory}: tensors that {PARAMS} does not use: {names}.")
    return joined


def _join(config: dict, tensor: ExpectedTensor, shards: list[TorchArchive], directory: Path) -> _Joined:
    """Find the axis and the number of copies with which the parts of a tensor make up the whole."""
    stored, field = shards[0].tensors[tensor.name], f"{directory}: {tensor.name}"
    if stored.dtype not in FLOAT_DTYPES:
        verdict = "float64 is not read" if stored.dtype == "F64" else "looks quantised"
        raise UnsupportedError(f"{field} = {stored.dtype}: {verdict}; expected {', '.join(FLOAT_DTYPES)}.")
    module = tensor.name.removesuffix(".weight").rsplit(".", 1)[-1]
    axis = _find_axis(module, stored, config["hidden_dim"])
    shape, num_copies = list(stored.shape), len(shards)
    if axis is not None and len(shape) == 2:
        num_heads = config["num_key_value_heads"]
        is_copied = module in ("wk", "wv") and len(shards) > num_heads and shape[0] == config["head_dim"]
        # With more shards than heads, neighbours share one.
        num_copies = len(shards) // num_heads if is_copied and len(shards) % num_heads == 0 else 1
        shape[axis] *= len(shards) // num_copies
    if tuple(shape) != tensor.stored_shape:
        cause = f" {PARAMS} computes that size from dim, multiple_of and ffn_dim_multiplier." if module == "w1" else ""
        raise CheckpointError(
            f"{field} = {shown(stored.shape)} in each of {len(shards)} shards, {shown(shape)} when joined; expected "
            f"{shown(tensor.stored_shape)}.{cause}"
        )
    return _Joined(shards, tensor.name, tensor.stored_shape, axis, num_copies)


def _find_axis(module: str, stored: ArchivedTensor, hidden_dim: int) -> int | None:
    """Return the axis along which a module is cut; the embedding into columns before Llama 3, into rows since."""
    if module == "tok_embeddings":
        return 0 if stored.shape[1:] == (hidden_dim,) else 1
    return _AXES.get(module)


def _count_bytes(tensors: dict[str, _Joined]) -> Counter:
    counts = Counter()
    for joined in tensors.values():
        counts[joined.dtype.name] += sum(shard.tensors[joined.name].num_bytes for shard in joined.shards)
    return counts


def _are_equal(first: _Joined, second: _Joined) -> bool:
    """Compare two tables piece by piece, as far as they agree."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    num_rows, row_bytes = first.shape[0], first.shape[1] * first.dtype.itemsize
    rows_of_a_shard = math.gcd(*(joined.stored.shape[0] for joined in (first, second)))
    step = max(_PIECE // row_bytes, 1)
    for start in range(0, num_rows, rows_of_a_shard):
        for row in range(start, start + rows_of_a_shard, step):
            rows = row, min(row + step, start + rows_of_a_shard)
            if not _same_bytes(first.read_rows(*rows), second.read_rows(*rows)):
                return False
    return True


def _find_tokenizer(directory: Path) -> dict | None:
    for folder in (directory, Path(os.path.abspath(directory)).parent):
        file = folder / TOKENIZER
        if file.exists():
            check_file(file)
            return {"tokenizer": str(file)}
    return None
