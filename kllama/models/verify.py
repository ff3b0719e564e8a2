"""Reading all of a checkpoint to see whether it is whole. Builds no model; the command line calls it."""

import os

from kllama.checkpoints import progress
from kllama.checkpoints.checkpoint import Strictness
from kllama.checkpoints.files import manifest
from kllama.checkpoints.formats import open_checkpoint
from kllama.checkpoints.name_map import num_parameters
from kllama.text.tokenizer import LlamaTokenizer


def verify_checkpoint(handle: str | os.PathLike) -> list[str]:
    """Compare the files with their manifest, read every tensor, and open the tokenizer.

    Args:
        handle: what `from_preset` takes.

    Returns:
        Lines that say what was checked.

    Raises:
        CheckpointError: anything is damaged, missing or left over, or does not fit the rest.
        ResourceError: the disk fails.
    """
    # The manifest is compared by itself: a checkpoint of any format may have one, and the figures are wanted.
    checkpoint = open_checkpoint(handle, Strictness(verify=False))
    lines = [f"{checkpoint.path}: {checkpoint.format}"]
    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    saved = manifest.read(directory)
    if saved is None or (directory != checkpoint.path and checkpoint.path.name not in saved):
        lines.append(f"no {manifest.NAME} lists it: a changed number that is still a number would not be noticed")
    else:
        files = manifest.verify(directory)
        lines.append(f"{len(files)} files, {sum(size for _, size in files):,} bytes: size and SHA-256 as saved")
    total = num_parameters(checkpoint.backbone_config)
    tensors = progress.track(checkpoint.tensors(), "reading weights", total, size=lambda pair: pair[1].size)
    count = sum(1 for _ in tensors)
    lines.append(f"{count} tensors, {total:,} parameters: complete, finite, and of the expected shapes")
    if checkpoint.tokenizer_config is None:
        lines.append("no tokenizer")
    else:
        tokenizer = LlamaTokenizer.from_checkpoint(checkpoint)
        lines.append(f"tokenizer of {tokenizer.vocabulary_size():,} tokens: fits the model")
    return lines
