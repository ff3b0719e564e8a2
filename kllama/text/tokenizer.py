"""The tokenizer: text to token ids and back, by the rules of a `tokenizer.json`.

The file's own normalizer, pre-tokenizer, model, added tokens and decoder are run by the Rust `tokenizers` library; no
rule is written again here. Other formats become a `tokenizers.Tokenizer` first and enter by the same door. Start and
end tokens, padding and masks are the preprocessor's.
"""

import dataclasses
import operator
import os
import reprlib
from collections.abc import Mapping

import keras
import keras_hub
import numpy as np
import tokenizers
from keras_hub.src.utils.tensor_utils import in_tf_function

from kllama.checkpoints.formats import open_checkpoint
from kllama.errors import CheckpointError, MissingFileError
from kllama.text.inputs import as_rows, as_texts
from kllama.text.formats.tokenizer_json import open_tokenizer, rust_errors

ASSET = "tokenizer.json"


@keras.saving.register_keras_serializable(package="kllama")
class LlamaTokenizer(keras_hub.tokenizers.Tokenizer):
    """Split text into the token ids of a Llama checkpoint, and join ids into text.

    Args:
        tokenizer: path of a `tokenizer.json`, its text, its parsed dict, or a `tokenizers.Tokenizer` (copied). `None`
            leaves the tokenizer without a vocabulary until `load_assets`.
        start_token: str or `None`. The token that the preprocessor puts before a text.
        end_token: str or `None`. The token that the preprocessor puts after a text.
        pad_token: str or `None`. The token that fills a row. With `None` rows are filled with id 0, which may well be
            a real token: the padding mask alone says what is padding.
        parse_special: bool. `False` takes a special token that is spelt in a text for plain text; `True` takes it for
            the token. `start_token` and `end_token` count as special whatever the file says.
        dtype: `"int32"` or `"int64"`. The dtype of the ids of a single text.
        **kwargs: `name`, `trainable` and `config_file` of `keras_hub.tokenizers.Tokenizer`.

    Raises:
        CheckpointError: the vocabulary is damaged, or lacks `start_token`, `end_token` or `pad_token`.
        MissingFileError: `tokenizer` is a path at which there is no file.

    Example:
    ```python
    tokenizer = LlamaTokenizer("tokenizer.json", start_token="<s>", end_token="</s>")
    tokenizer("Once upon a time")  # array of ids (T,)
    tokenizer(["Once", "upon"])  # a list of lists of ids
    tokenizer.detokenize(tokenizer("Once upon a time"))  # "Once upon a time"
    ```
    """

    # models/ sets this to LlamaBackbone: KerasHub finds a tokenizer by its backbone, and imports go downward only.
    backbone_cls = None

    def __init__(
        self,
        tokenizer: str | os.PathLike | Mapping | tokenizers.Tokenizer | None = None,
        *,
        start_token: str | None = None,
        end_token: str | None = None,
        pad_token: str | None = None,
        parse_special: bool = False,
        dtype="int32",
        **kwargs,
    ):
        super().__init__(dtype=dtype, **kwargs)
        if self.compute_dtype not in ("int32", "int64"):
            raise ValueError(f"dtype = {self.compute_dtype!r}; expected 'int32' or 'int64'.")
        for name, token in (("start_token", start_token), ("end_token", end_token), ("pad_token", pad_token)):
            if not isinstance(token, str | None):
                raise TypeError(f"{name} = {token!r}; expected a str or None.")
        if not isinstance(parse_special, bool):
            raise TypeError(f"parse_special = {parse_special!r}; expected True or False.")
        self.start_token = start_token
        self.end_token = end_token
        self.pad_token = pad_token
        self.parse_special = parse_special
        self.file_assets = [ASSET]
        self._vocabulary = None
        self.built = True
        if tokenizer is not None:
            self._set_vocabulary(open_tokenizer(tokenizer))

    def call(self, inputs, training=None):
        return self.tokenize(inputs)

    def tokenize(self, inputs) -> np.ndarray | list[list[int]]:
        """Split text into token ids, adding none.

        Lone surrogates become U+FFFD. Inside a `tf.data` pipeline or a `tf.function` the ids are the same.

        Args:
            inputs: a str, or a list, tuple or array of str. A string tensor inside a TensorFlow graph.

        Returns:
            An array of ids `(T,)` for one text, a list of lists of ids for a batch. Inside a TensorFlow graph a tensor
            `(T,)`, or a ragged tensor `(B, None)`.

        Raises:
            TypeError: an input is not text; the message has its row.
            CheckpointError: the file's own rules fail on the text.
        """
        if in_tf_function():
            from kllama.backend import tf_data

            return tf_data.encode_ragged(self._encode, inputs, self.compute_dtype)
        texts, batched = as_texts(inputs)
        rows = self._encode(texts)
        return rows if batched else np.array(rows[0], self.compute_dtype)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoder = self._loaded().encoder
        with rust_errors(f"{ASSET}: the rules of this tokenizer fail on the text"):
            encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def detokenize(self, inputs, *, skip_special_tokens: bool = False) -> str | list[str]:
        """Join token ids into text, every space as the ids have it.

        Args:
            inputs: ids as an int, a list, an array or a backend tensor of shape `(T,)`; or a batch of such rows.
            skip_special_tokens: bool. Leave special tokens out of the text.

        Returns:
            A str, or a list of str for a batch. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            TypeError: an id is not an integer.
            ValueError: no token has the id.
        """
        rows, batched = as_rows(inputs)
        vocabulary = self._loaded()
        for row in rows:
            for token_id in row:
                vocabulary.token(token_id)
        with rust_errors(f"{ASSET}: the decoder of this tokenizer fails on the ids"):
            texts = vocabulary.encoder.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        return texts if batched else texts[0]

    def vocabulary_size(self) -> int:
        """Return the number of ids: the largest one plus 1, added and reserved tokens included."""
        return len(self._loaded().tokens)

    def get_vocabulary(self) -> list[str | None]:
        """Return the tokens in the order of their ids, `None` where no token has the id."""
        return list(self._loaded().tokens)

    def id_to_token(self, id: int) -> str:
        """Return the token that has an id.

        Raises:
            ValueError: no token has it.
        """
        return self._loaded().token(operator.index(id))

    def token_to_id(self, token: str) -> int:
        """Return the id of a token.

        Raises:
            ValueError: the token is not in the vocabulary.
        """
        if (token_id := self._loaded().encoder.token_to_id(token)) is None:
            raise ValueError(f"token = {token!r}; expected a token of the vocabulary.")
        return token_id

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens, in the order of their ids."""
        return [self.id_to_token(token_id) for token_id in self.special_token_ids]

    @property
    def special_token_ids(self) -> list[int]:
        """The ids of the special tokens, ascending."""
        return list(self._loaded().special_ids)

    @property
    def start_token_id(self) -> int | None:
        """The id of `start_token`, `None` without one."""
        return None if self.start_token is None else self.token_to_id(self.start_token)

    @property
    def end_token_id(self) -> int | None:
        """The id of `end_token`, `None` without one."""
        return None if self.end_token is None else self.token_to_id(self.end_token)

    @property
    def pad_token_id(self) -> int:
        """The id of `pad_token`, 0 without one: a filler, never to be read as a mask."""
        return 0 if self.pad_token is None else self.token_to_id(self.pad_token)

    def save_assets(self, dir_path: str) -> None:
        """Write the vocabulary and its rules to `tokenizer.json` in a directory."""
        with open(os.path.join(dir_path, ASSET), "w", encoding="utf-8") as file:
            file.write(self._loaded().encoder.to_str())

    def load_assets(self, dir_path: str) -> None:
        """Read the vocabulary and its rules from `tokenizer.json` in a directory."""
        if dir_path is None:  # What Keras passes when the archive has nothing for this layer.
            raise MissingFileError(f"{ASSET}: not in the saved model; expected among the assets of {self.name!r}.")
        self._set_vocabulary(open_tokenizer(os.path.join(dir_path, ASSET)))

    def get_config(self) -> dict:
        config = super().get_config()
        config.update(
            {
                "start_token": self.start_token,
                "end_token": self.end_token,
                "pad_token": self.pad_token,
                "parse_special": self.parse_special,
            }
        )
        return config

    @classmethod
    def from_config(cls, config: dict) -> "LlamaTokenizer":
        # A config comes out of a file. It must not name another file to read: the vocabulary is an asset.
        if "tokenizer" in config:
            raise CheckpointError(
                f"{cls.__name__} config: tokenizer = {reprlib.repr(config['tokenizer'])}; expected no such key. "
                f"The vocabulary is read from the assets, {ASSET}."
            )
        return super().from_config(config)

    @classmethod
    def from_preset(cls, preset: str | os.PathLike, **kwargs) -> "LlamaTokenizer":
        """Build the tokenizer of a checkpoint.

        Args:
            preset: the name of a built-in preset, or the path of a preset directory or of a Hugging Face directory.
            **kwargs: constructor arguments that replace the checkpoint's, such as `parse_special`.

        Raises:
            MissingFileError: if there is no such preset, or it carries no tokenizer.
            CheckpointError: if a file is damaged.
        """
        return cls.from_checkpoint(open_checkpoint(preset), **kwargs)

    @classmethod
    def from_checkpoint(cls, checkpoint, **kwargs) -> "LlamaTokenizer":
        """Build the tokenizer of a checkpoint that `kllama.checkpoints.formats.open_checkpoint` has opened."""
        if checkpoint.tokenizer_config is None:
            raise MissingFileError(f"{checkpoint.path}: no tokenizer; expected {ASSET}.", str(checkpoint.path / ASSET))
        return cls(**{**checkpoint.tokenizer_config, **kwargs})

    def _set_vocabulary(self, encoder: tokenizers.Tokenizer) -> None:
        named = {"start_token": self.start_token, "end_token": self.end_token, "pad_token": self.pad_token}
        for name, token in named.items():
            if token is not None and encoder.token_to_id(token) is None:
                size = encoder.get_vocab_size()
                raise CheckpointError(f"{name} = {token!r}; expected one of the {size} tokens of the vocabulary.")
        added = {token.content: token for token in encoder.get_added_tokens_decoder().values()}
        for token in filter(None, (self.start_token, self.end_token)):  # the pad token may well be an ordinary one
            encoder.add_special_tokens([added.get(token, tokenizers.AddedToken(token, normalized=False))])
        encoder.encode_special_tokens = not self.parse_special
        self._vocabulary = _Vocabulary.of(encoder)

    def _loaded(self) -> "_Vocabulary":
        if self._vocabulary is None:
            raise ValueError(f"{self.name}: tokenizer = None; expected a vocabulary. Call load_assets() first.")
        return self._vocabulary


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """What one `tokenizer.json` gives. Opaque to Keras, which would track a plain list of all tokens."""

    encoder: tokenizers.Tokenizer
    tokens: list[str | None]  # by id; None in a hole
    special_ids: list[int]  # ascending

    @classmethod
    def of(cls, encoder: tokenizers.Tokenizer) -> "_Vocabulary":
        ids = encoder.get_vocab()
        tokens = [None] * (max(ids.values()) + 1)
        for token, token_id in ids.items():
            tokens[token_id] = token
        added = encoder.get_added_tokens_decoder()
        return cls(encoder, tokens, sorted(token_id for token_id, token in added.items() if token.special))

    def token(self, token_id: int) -> str:
        if not 0 <= token_id < len(self.tokens) or self.tokens[token_id] is None:
            gap = ", a gap of the vocabulary" if 0 <= token_id < len(self.tokens) else ""
            raise ValueError(f"id = {token_id}{gap}; expected the id of a token, 0 to {len(self.tokens) - 1}.")
        return self.tokens[token_id]
