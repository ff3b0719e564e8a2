"""What a reader of this folder gives: an opened checkpoint, checked, with its weights still in the file.

Each format's class derives from `Checkpoint`; `formats.py` chooses among them, and `models/` builds a model from one
without knowing which it is.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kllama.errors import CheckpointError

_LOGGER = logging.getLogger(__name__)


class Strictness(NamedTuple):
    """What a caller lets pass.

    Attributes:
        verify: compare the files of a directory with its manifest, where it has one.
        check_finite: refuse NaN and infinity in weights.
        unused: refuse tensors that the configuration does not use; else they are named in a warning.
    """

    verify: bool = True
    check_finite: bool = True
    unused: bool = True

    def refuse_unused(self, message: str) -> None:
        """Refuse what is in a checkpoint besides what is used, or warn of it.

        Raises:
            CheckpointError: with the message.
        """
        if self.unused:
            raise CheckpointError(f"{message} strict=False leaves it out.")
        _LOGGER.warning("%s It is left out.", message)


STRICT = Strictness()
"""Nothing passes."""


class Checkpoint(ABC):
    """An opened checkpoint. Opening checks all that can be known without reading weights.

    Attributes:
        format: what it is, for people: "Hugging Face", "GGUF", ...
        path: the directory or the file.
        backbone_config: keyword arguments of `LlamaBackbone`, without `dtype`, with `head_dim`, `qk_norm` and all
            biases.
        open_questions: what the files cannot tell, by the argument of `LlamaBackbone` that answers it, each with the
            sentence that asks for it. Usually empty.
        dtype: the file's own: "float32", "bfloat16", "float16", or a `LayerDtypes`.
        has_head: False for a base model, of which only the hidden states mean anything.
        stored_bytes: how many bytes of weights the files hold, by the name of the type they are stored in.
        tokenizer_config: keyword arguments of `LlamaTokenizer`, and the `added_tokens` that its vocabulary lacks; None
            where there is no vocabulary.
        preprocessor_config: keyword arguments of `LlamaCausalLMPreprocessor` besides the tokenizer.
        generation_config: `stop_token_ids` and the sampling settings that the files give.
        sampler: what `generate` draws with: a name, `"auto"`, or what `keras_hub.samplers.get` takes. Reading it
            raises what is wrong with it.
    """

    format: str
    path: Path
    backbone_config: dict
    open_questions: Mapping[str, str] = {}
    dtype: object
    has_head: bool = True
    stored_bytes: Mapping[str, int]
    tokenizer_config: dict | None = None
    preprocessor_config: Mapping = {}
    generation_config: Mapping = {}
    sampler: object = "auto"

    def refuse_open_questions(self, answers: Container[str]) -> None:
        """Refuse to go on with a question open.

        Args:
            answers: the names of the arguments of `LlamaBackbone` that the caller gives.

        Raises:
            CheckpointError: asking for the first that is missing.
        """
        for argument, question in self.open_questions.items():
            if argument not in answers:
                raise CheckpointError(question)

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (variable path, array) for each weight, in kllama's shape, one at a time.

        Raises:
            CheckpointError: values that are not finite, or a file that changed since it was opened.
        """
