"""Hugging Face directories: `config.json`, safetensors, tokenizer files; read and written."""
