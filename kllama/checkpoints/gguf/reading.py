"""GGUF, the format of llama.cpp: one file, or numbered parts, with configuration, weights and tokenizer.

Opening checks all that can be known without reading weights: the schema of the keys, the exact set of tensors and their
shapes. Quantised weights become float32. It builds no model and needs no llama.cpp. Architectures: llama (Mistral's
files too), qwen2 and qwen3.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kllama.checkpoints.checkpoint import STRICT, Checkpoint, Strictness
from kllama.checkpoints.files.reader import FLOAT_DTYPES, listed, shown
from kllama.checkpoints.gguf.config import ARCHITECTURES, backbone_arguments, read_architecture, read_fields
from kllama.checkpoints.gguf.file import GgufFile, is_later_part
from kllama.checkpoints.gguf.header import GgufTensor, starts_like_gguf
from kllama.checkpoints.gguf.rope import SCALING_KEYS, TABLES, TYPE, rope_scaling
from kllama.checkpoints.gguf.tokenizer import GgufTokenizer
from kllama.checkpoints.name_map import MLP_BIAS, OUT_BIAS, QKV_BIAS, expected_tensors, refuse_missing
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError

SUFFIX = ".gguf"
_EMBEDDINGS, _HEAD = "token_embd.weight", "output.weight"
_BIASES = {
    QKV_BIAS: ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    OUT_BIAS: ("attn_output.bias",),
    MLP_BIAS: ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"),
}
# Parts of names of tensors that stand for another computation.
_UNSUPPORTED = {
    ".attn_qkv.": "a fused projection",
    "_exps.": "experts",
    ".ffn_gate_inp.": "experts",
    ".attn_rot_embd.": "frequencies of its own",
    ".post_attention_norm.": "a normalization after the attention",
    ".post_ffw_norm.": "a normalization after the feed-forward layers",
}


def is_gguf(path: str | Path) -> bool:
    """Whether `path` is a GGUF file, by its first bytes or by its name, or a directory that holds one as its model.

    A directory counts if there is no `config.json`, which would make it another format's.
    """
    path = Path(path)
    if path.is_dir():
        return not (path / "config.json").exists() and bool(_gguf_names(path))
    return path.is_file() and (path.suffix == SUFFIX or starts_like_gguf(path))


class GgufCheckpoint(Checkpoint):
    """An opened GGUF model.

    Args:
        path: the file, the first of its parts, or a directory that holds one model.
        strictness: what is let pass.

    Attributes: those of `Checkpoint`; and `architecture`. `path` is the file. `dtype` is that of most parameters, which
        is "float32" where these are quantised. `stored_bytes` calls quantised types as llama.cpp does.

    Raises:
        MissingFileError: nothing is there, or a part is missing.
        UnsupportedError: another architecture, another version, or something that kllama does not do.
        CheckpointError: anything that is wrong, damaged or ambiguous.

    Example:

    ```python
    checkpoint = GgufCheckpoint("stories260K-q8_0.gguf")
    shapes = {path: array.shape for path, array in checkpoint.tensors()}
    shapes["transformer_layer_0/self_attention/query/kernel"]  # (64, 8, 8)
    ```
    """

    format = "GGUF"

    def __init__(self, path: str | Path, strictness: Strictness = STRICT):
        self._file = file = open_gguf(path)
        self._strictness = strictness
        self.path = file.path
        self.architecture = read_architecture(file.metadata, self.path)
        fields = read_fields(file.metadata, self.architecture, self.path)
        self.backbone_config = backbone_arguments(fields, self.architecture, self.path)
        self.backbone_config |= _follows_from_tensors(file.tensors, self.path)
        tables = _read_tables(file, self.backbone_config["head_dim"])
        self.backbone_config["rope_scaling"] = rope_scaling(
            {key: fields[key] for key in (TYPE, *SCALING_KEYS) if fields[key] is not None},
            tables,
            self.backbone_config["rope_max_wavelength"],
            self.backbone_config["head_dim"],
            self.backbone_config["max_sequence_length"],
            self.path,
        )
        self._naming = ARCHITECTURES[self.architecture].naming
        self._check_tensors(tables)
        self.stored_bytes = _count_bytes(file.tensors)
        self.dtype = _dtype_of_most(file.tensors)

        tokenizer = GgufTokenizer(file)
        self._check_vocabulary(fields["vocab_size"], tokenizer.backbone_config)
        self.tokenizer_config = tokenizer.tokenizer_config
        self.preprocessor_config = tokenizer.preprocessor_config
        self.generation_config = {"stop_token_ids": tokenizer.stop_token_ids} if tokenizer.stop_token_ids else {}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each variable's path and its array, in kllama's shape, one at a time; quantised ones in float32.

        Raises:
            CheckpointError: values that are not finite, or a file that changed since it was opened.
        """
        for tensor in expected_tensors(self.backbone_config, self._naming):
            yield tensor.path, tensor.to_kllama(self._file.read(tensor.name, self._strictness.check_finite))

    def _check_tensors(self, tables: dict[str, np.ndarray]) -> None:
        """Compare what the keys need with what the file holds: the exact set of names, and the shapes."""
        stored = self._file.tensors
        for part, what in _UNSUPPORTED.items():
            if name := next((name for name in stored if part in name), None):
                raise UnsupportedError(f"{self.path}: {shown(name)}: {what}, which kllama does not implement.")
        refuse_missing(self.backbone_config, stored, self.path, self._naming)
        shapes = {tensor.name: tensor.stored_shape for tensor in expected_tensors(self.backbone_config, self._naming)}
        unused = [name for name in stored if name not in shapes and name not in tables]
        if unused:
            self._strictness.refuse_unused(
                f"{self.path}: tensors that the keys do not use: {listed(map(shown, unused))}."
            )
        wrong = [name for name, shape in shapes.items() if stored[name].shape != shape]
        if wrong:
            received = listed((f"{name} = {stored[name].shape}; expected {shapes[name]}" for name in wrong), ". ")
            raise CheckpointError(f"{self.path}: {received}.")

    def _check_vocabulary(self, said: int | None, tokenizer: dict) -> None:
        rows = self.backbone_config["vocabulary_size"]
        sizes = {f"{self.architecture}.vocab_size": said, "number of tokens": tokenizer.get("vocabulary_size")}
        for name, size in sizes.items():
            if size not in (None, rows):
                raise CheckpointError(f"{self.path}: {name} = {size}; expected {rows}, the rows of {_EMBEDDINGS}.")


def open_gguf(path: str | Path) -> GgufFile:
    """Open the GGUF file at a path, or the one in a directory.

    Raises:
        MissingFileError: nothing is there, or a part is missing.
        CheckpointError: a directory that holds several models, or a damaged file.
    """
    path = Path(path)
    if not path.is_dir():
        return GgufFile(path)
    names = _gguf_names(path)
    if not names:
        raise MissingFileError(f"{path}: no {SUFFIX} file; expected one.", str(path / f"model{SUFFIX}"))
    if len(names) > 1:
        raise CheckpointError(f"{path}: several models: {listed(names)}; expected one. Pass the path of the file.")
    return GgufFile(path / names[0])


def _gguf_names(directory: Path) -> list[str]:
    """Return the names of the models in a directory, a split one by its first part."""
    try:
        names = os.listdir(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed ({error.strerror}, errno {error.errno}).") from error
    return sorted(name for name in names if name.endswith(SUFFIX) and not is_later_part(name))


def _follows_from_tensors(tensors: dict[str, GgufTensor], source: Path) -> dict:
    """Return the arguments that no key gives: they follow from which tensors there are."""
    if _EMBEDDINGS not in tensors:
        raise CheckpointError(f"{source}: missing tensors: {_EMBEDDINGS}. The file holds no whole model.")
    suffixes = {name.split(".", 2)[-1] for name in tensors if name.startswith("blk.")}
    biases = {setting: not suffixes.isdisjoint(names) for setting, names in _BIASES.items()}
    return {**biases, "vocabulary_size": tensors[_EMBEDDINGS].shape[0], "tie_word_embeddings": _HEAD not in tensors}


def _read_tables(file: GgufFile, head_dim: int) -> dict[str, np.ndarray]:
    tables = [name for name in TABLES if name in file.tensors]
    for name in tables:
        if file.tensors[name].shape != (head_dim // 2,):
            raise CheckpointError(
                f"{file.path}: {name} = {file.tensors[name].shape}; expected {(head_dim // 2,)}, half a head."
            )
    return {name: file.read(name) for name in tables}


def _count_bytes(tensors: dict[str, GgufTensor]) -> Counter:
    counts = Counter()
    for tensor in tensors.values():
        counts[_dtype_name(tensor)] += tensor.num_bytes
    return counts


def _dtype_of_most(tensors: dict[str, GgufTensor]) -> str:
    counts = Counter()
    for tensor in tensors.values():
        counts[_dtype_name(tensor)] += math.prod(tensor.shape)
    most = counts.most_common(1)[0][0]
    return most if most in {dtype.name for dtype in FLOAT_DTYPES.values()} else "float32"


def _dtype_name(tensor: GgufTensor) -> str:
    return FLOAT_DTYPES[tensor.type].name if tensor.type in FLOAT_DTYPES else tensor.type
