"""Text to token ids and back: the tokenizer and the preprocessor."""
