"""The tokenizer, under the names of `keras_hub.tokenizers`."""

from kllama.text.tokenizer import LlamaTokenizer

Tokenizer = Llama3Tokenizer = LlamaTokenizer

__all__ = ["Llama3Tokenizer", "LlamaTokenizer", "Tokenizer"]
