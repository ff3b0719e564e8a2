"""The models a user builds and calls: the backbone (token ids -> hidden states) and the causal language model.

The names are those of `keras_hub.models`. One class serves every Llama: the names with a 3, and those that in KerasHub
stand for models of every kind, are the same classes.
"""

from kllama.models.llama_backbone import LlamaBackbone
from kllama.models.llama_causal_lm import LlamaCausalLM
from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.tokenizer import LlamaTokenizer

Backbone = Llama3Backbone = LlamaBackbone
CausalLM = Llama3CausalLM = LlamaCausalLM
CausalLMPreprocessor = Llama3CausalLMPreprocessor = LlamaCausalLMPreprocessor
Tokenizer = Llama3Tokenizer = LlamaTokenizer

__all__ = [
    "Backbone",
    "CausalLM",
    "CausalLMPreprocessor",
    "Llama3Backbone",
    "Llama3CausalLM",
    "Llama3CausalLMPreprocessor",
    "Llama3Tokenizer",
    "LlamaBackbone",
    "LlamaCausalLM",
    "LlamaCausalLMPreprocessor",
    "LlamaTokenizer",
    "Tokenizer",
]
