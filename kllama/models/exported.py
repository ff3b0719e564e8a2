"""What an export writes: of a model in memory, or of a checkpoint that was opened and need not become a model.

`export_huggingface.py` and `export_gguf.py` take it; the model classes and `convert.py` make it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import keras
import numpy as np

from kllama import backend
from kllama.models.float_tensors import architecture, float_tensors, stored_dtype
from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.tokenizer import LlamaTokenizer


class Exported(NamedTuple):
    """A model, as far as an export needs it.

    Attributes:
        config: a value for each of `backbone_arguments.CONFIG_NAMES`.
        dtype: the one in which the weights lose nothing.
        tensors: (variable path, array) for each weight, float, in the order of the computation; to be read once.
        generation_config: as of `LlamaCausalLM`.
        preprocessor: with a `LlamaTokenizer`, or None.
        has_head: whether this is a language model; a backbone alone has none.
    """

    config: dict
    dtype: str
    tensors: Iterator[tuple[str, np.ndarray]]
    generation_config: dict
    preprocessor: LlamaCausalLMPreprocessor | None
    has_head: bool

    @property
    def tokenizer(self) -> LlamaTokenizer | None:
        """The tokenizer, or None.

        Raises:
            TypeError: the preprocessor has one of another class.
        """
        tokenizer = None if self.preprocessor is None else self.preprocessor.tokenizer
        if not isinstance(tokenizer, LlamaTokenizer | None):
            raise TypeError(
                f"preprocessor.tokenizer ({tokenizer!r}) must be a LlamaTokenizer. Set preprocessor = None to export "
                "the model alone."
            )
        return tokenizer


def exported_backbone(backbone: keras.Model) -> Exported:
    """Describe a `LlamaBackbone`; LoRA is merged, and int8 becomes float; see `float_tensors`."""
    return Exported(architecture(backbone), stored_dtype(backbone), float_tensors(backbone), {}, None, has_head=False)


def exported_model(model: keras.Model) -> Exported:
    """Describe a `LlamaCausalLM`, which may be in the middle of `fit`."""
    backend.synchronize(model)
    return exported_backbone(model.backbone)._replace(
        generation_config=model.generation_config, preprocessor=model.preprocessor, has_head=True
    )
