"""kllama: the Llama family of language models for Keras 3.

The public names are imported when they are first used, so `import kllama` loads neither Keras nor NumPy. It does see to
it that Keras and KerasHub find kllama's classes by name: see `kllama.registration`.
"""

import importlib

from kllama.registration import register_with_keras

__version__ = "0.1.0"

_HOMES = {
    "Llama3Backbone": "kllama.models",
    "Llama3CausalLM": "kllama.models",
    "Llama3CausalLMPreprocessor": "kllama.models",
    "Llama3Tokenizer": "kllama.models",
    "LlamaBackbone": "kllama.models",
    "LlamaCausalLM": "kllama.models",
    "LlamaCausalLMPreprocessor": "kllama.models",
    "LlamaTokenizer": "kllama.models",
    "upload_preset": "keras_hub",
    "CheckpointError": "kllama.errors",
    "KllamaError": "kllama.errors",
    "MissingFileError": "kllama.errors",
    "NonFiniteError": "kllama.errors",
    "ResourceError": "kllama.errors",
    "UnsupportedError": "kllama.errors",
}
_MODULES = ("models", "samplers", "tokenizers")  # KerasHub's names for what is in them
_KERAS_HUBS = ("metrics", "utils", "version")  # what scripts take from KerasHub, and kllama has no other for

__all__ = [*_HOMES, *_MODULES, "__version__"]

TYPE_CHECKING = False  # type checkers read it as true; importing it from `typing` would cost more than all of this file
if TYPE_CHECKING:
    from keras_hub import upload_preset as upload_preset

    from kllama import models as models
    from kllama import samplers as samplers
    from kllama import tokenizers as tokenizers
    from kllama.errors import CheckpointError as CheckpointError
    from kllama.errors import KllamaError as KllamaError
    from kllama.errors import MissingFileError as MissingFileError
    from kllama.errors import NonFiniteError as NonFiniteError
    from kllama.errors import ResourceError as ResourceError
    from kllama.errors import UnsupportedError as UnsupportedError
    from kllama.models import Llama3Backbone as Llama3Backbone
    from kllama.models import Llama3CausalLM as Llama3CausalLM
    from kllama.models import Llama3CausalLMPreprocessor as Llama3CausalLMPreprocessor
    from kllama.models import Llama3Tokenizer as Llama3Tokenizer
    from kllama.models import LlamaBackbone as LlamaBackbone
    from kllama.models import LlamaCausalLM as LlamaCausalLM
    from kllama.models import LlamaCausalLMPreprocessor as LlamaCausalLMPreprocessor
    from kllama.models import LlamaTokenizer as LlamaTokenizer


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"kllama.{name}")
    if name not in _HOMES:
        hint = f" What else KerasHub has is keras_hub.{name}." if name in _KERAS_HUBS else ""
        raise AttributeError(f"module 'kllama' has no attribute {name!r}.{hint}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})


register_with_keras()
