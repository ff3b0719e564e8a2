"""kllama: the Llama family of language models for Keras 3.

The public names are imported when they are first used, so `import kllama` loads neither Keras nor NumPy. It does see to
it that Keras and KerasHub find kllama's classes by name: see `kllama.registration`.
"""

import importlib

from kllama.registration import register_with_keras

__version__ = "0.1.0"

_HOMES = {
    "LlamaBackbone": "kllama.models.llama_backbone",
    "LlamaCausalLM": "kllama.models.llama_causal_lm",
    "LlamaCausalLMPreprocessor": "kllama.text.preprocessor",
    "LlamaTokenizer": "kllama.text.tokenizer",
    "CheckpointError": "kllama.errors",
    "KllamaError": "kllama.errors",
    "MissingFileError": "kllama.errors",
    "NonFiniteError": "kllama.errors",
    "ResourceError": "kllama.errors",
    "UnsupportedError": "kllama.errors",
}

__all__ = [*_HOMES, "__version__"]

TYPE_CHECKING = False  # type checkers read it as true; importing it from `typing` would cost more than all of this file
if TYPE_CHECKING:
    from kllama.errors import CheckpointError as CheckpointError
    from kllama.errors import KllamaError as KllamaError
    from kllama.errors import MissingFileError as MissingFileError
    from kllama.errors import NonFiniteError as NonFiniteError
    from kllama.errors import ResourceError as ResourceError
    from kllama.errors import UnsupportedError as UnsupportedError
    from kllama.models.llama_backbone import LlamaBackbone as LlamaBackbone
    from kllama.models.llama_causal_lm import LlamaCausalLM as LlamaCausalLM
    from kllama.text.preprocessor import LlamaCausalLMPreprocessor as LlamaCausalLMPreprocessor
    from kllama.text.tokenizer import LlamaTokenizer as LlamaTokenizer


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'kllama' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


register_with_keras()
