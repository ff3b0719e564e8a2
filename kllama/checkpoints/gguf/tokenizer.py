"""The tokenizer of a GGUF file: what its `tokenizer.*` keys say about the vocabulary.

They become arguments of kllama's tokenizer and preprocessor. The lists of tokens are checked for their lengths and left
in the file: `text/formats/gguf_vocabulary.py` makes an encoder of them. Called by `reading.py`.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kllama.checkpoints.files.reader import shown
from kllama.checkpoints.gguf.file import GgufFile
from kllama.checkpoints.huggingface.tokenizer import CHAT_TEMPLATE_LIMIT
from kllama.errors import CheckpointError, UnsupportedError

MODEL, TOKENS = "tokenizer.ggml.model", "tokenizer.ggml.tokens"
SCORES, KINDS, MERGES = "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
ADD_START = "tokenizer.ggml.add_bos_token"
SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"
_NO_TOKENIZER = ("none", "no_vocab")
_TEMPLATE = "tokenizer.chat_template"
_STOPS = ("eos", "eot", "eom")


class GgufTokenizer:
    """The tokenizer of a GGUF file, whose weights may be missing or of any architecture.

    Args:
        file: the opened file.

    Attributes: `path`, `tokenizer_config` (None for a file without a tokenizer) and `preprocessor_config`, as an opened
        checkpoint has them; `stop_token_ids`; and `backbone_config`, of which only `vocabulary_size` is known, and that
        only where there is a tokenizer.

    Raises:
        CheckpointError: lists of different lengths, ids that no token has, or values of the wrong type.
    """

    def __init__(self, file: GgufFile):
        self.path = file.path
        self.tokenizer_config, self.backbone_config = None, {}
        self.preprocessor_config, self.stop_token_ids = {}, []
        metadata = file.metadata
        kind = metadata.get(MODEL)
        if kind is None or (isinstance(kind, str) and kind in _NO_TOKENIZER) or TOKENS not in metadata:
            return
        tokens = checked_tokens(metadata, self.path)
        ids = {name: token_id(metadata, name, self.path) for name in ("bos", "padding", *_STOPS)}
        self.backbone_config = {"vocabulary_size": len(tokens)}
        self.stop_token_ids = list(dict.fromkeys(ids[name] for name in _STOPS if ids[name] is not None))
        self.tokenizer_config = {"tokenizer": str(self.path)}
        for argument, name in (("start_token", "bos"), ("end_token", "eos")):
            if ids[name] is not None:
                self.tokenizer_config[argument] = ids[name]
        if ids["padding"] is not None:
            self.tokenizer_config["pad_token"] = tokens[ids["padding"]]
        if (template := _chat_template(metadata, self.path)) is not None:
            self.tokenizer_config["chat_template"] = template
        if (adds_start_token := flag(metadata, ADD_START, self.path)) is not None:
            self.preprocessor_config = {"add_start_token": adds_start_token}


def checked_tokens(metadata: Mapping, source: Path) -> list[str]:
    """Return the tokens in the order of their ids, once the lists beside them are as long.

    Raises:
        CheckpointError: a list is of the wrong type or length.
    """
    tokens = metadata.get(TOKENS)
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{source}: {TOKENS} = {type(tokens).__name__}; expected a list of texts.")
    for key, kind in ((SCORES, "f"), (KINDS, "i")):
        values = metadata.get(key)
        if values is not None and not (isinstance(values, np.ndarray) and values.dtype.kind == kind):
            raise CheckpointError(f"{source}: {key} = {type(values).__name__}; expected a list of numbers.")
        if values is not None and len(values) != len(tokens):
            raise CheckpointError(f"{source}: number of {key} = {len(values)}; expected {len(tokens)}, as of {TOKENS}.")
    if not isinstance(metadata.get(MERGES, []), list):
        raise CheckpointError(f"{source}: {MERGES} = {type(metadata[MERGES]).__name__}; expected a list of texts.")
    return tokens


def token_id(metadata: Mapping, name: str, source: Path) -> int | None:
    """Return the id of a special token, None where the file names none.

    Args:
        metadata: of the file, with its tokens.
        name: "bos", "eos", "eot", "eom", "unknown" or "padding".
        source: the file, for messages.

    Raises:
        CheckpointError: no token has the id.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    value, size = metadata.get(key), len(metadata[TOKENS])
    if key in metadata and (type(value) is not int or not 0 <= value < size):
        raise CheckpointError(f"{source}: {key} = {shown(str(value))}; expected the id of one of the {size} tokens.")
    return value


def flag(metadata: Mapping, key: str, source: Path) -> bool | None:
    """Return a key that is true or false, None where it is absent.

    Raises:
        CheckpointError: it is something else.
    """
    value = metadata.get(key)
    if key in metadata and type(value) is not bool:
        raise CheckpointError(f"{source}: {key} = {shown(str(value))}; expected true or false.")
    return value


def _chat_template(metadata: Mapping, source: Path) -> str | dict[str, str] | None:
    """Return the template, or several by name, of which the one without a name is the default."""
    prefix = f"{_TEMPLATE}."
    named = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    templates = {"default": metadata[_TEMPLATE]} if _TEMPLATE in metadata else {}
    templates |= named
    for name, template in templates.items():
        if not isinstance(template, str):
            raise CheckpointError(f"{source}: {_TEMPLATE} {shown(name)} = {type(template).__name__}; expected a text.")
        if len(template) > CHAT_TEMPLATE_LIMIT:
            raise UnsupportedError(
                f"{source}: length of {_TEMPLATE} {shown(name)} = {len(template)}; expected at most "
                f"{CHAT_TEMPLATE_LIMIT}."
            )
    return templates if named else templates.get("default")
