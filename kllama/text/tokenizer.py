"""The tokenizer: text to token ids and back, by the rules of the vocabulary it was given.

The Rust `tokenizers` library runs the rules: normalizer, pre-tokenizer, model, added tokens and decoder; no rule is
written again here. Every format a vocabulary comes in becomes a `tokenizers.Tokenizer` first (`formats/`). Start and
end tokens, padding and masks are the preprocessor's. The two classes it derives from look tokens up
(`vocabulary_tokenizer`) and write conversations (`chat/tokenizer`).
"""

import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import keras
import numpy as np
import tokenizers
from keras_hub.src.utils.tensor_utils import in_tf_function

from kllama.arguments import check_flag
from kllama.checkpoints.files.undisturbed import undisturbed
from kllama.checkpoints.formats import open_tokenizer
from kllama.checkpoints.presets.directory import layer_files, staged_preset
from kllama.errors import CheckpointError, MissingFileError
from kllama.text.chat.tokenizer import ChatTokenizer
from kllama.text.detokenizer import StreamingDetokenizer
from kllama.text.formats.recognise import open_vocabulary
from kllama.text.formats.rules import rust_errors
from kllama.text.huggingface_export import export_tokenizer
from kllama.text.inputs import as_rows, as_texts
from kllama.text.keras_hub_arguments import SOURCES, translate, with_own_names
from kllama.text.tokenizer_training import train_tokenizer
from kllama.text.vocabulary import Vocabulary

ASSET = "tokenizer.json"


class _OfTheClass(classmethod):
    """A class method whose name means on instances what it means in their bases: a module of PyTorch has a `train`."""

    def __get__(self, instance, owner=None):
        inherited = None if instance is None else getattr(super(LlamaTokenizer, instance), "train", None)
        return super().__get__(None, owner) if inherited is None else inherited


@keras.saving.register_keras_serializable(package="kllama")
class LlamaTokenizer(ChatTokenizer):
    """Split text into the token ids of a Llama checkpoint, and join ids into text.

    Args:
        tokenizer: the vocabulary with its rules: path of a `tokenizer.json`, a SentencePiece `tokenizer.model` (Llama
            2, Mistral), a tiktoken `tokenizer.model` (Llama 3), a `vocab.json` beside its `merges.txt` (GPT-2), a
            llama2.c `tokenizer.bin`, one of KerasHub's tokenizer assets, or a directory of these; told apart by
            content. Or the text or the parsed dict of a `tokenizer.json`, a `tokenizers.Tokenizer` (copied), or the
            bytes of a SentencePiece model. `None` leaves the tokenizer without a vocabulary until `load_assets`.
        merges: for a vocabulary as KerasHub's Llama 3 tokenizer takes it: `tokenizer` is then a dict of ids by token,
            or the path of a JSON file of them, and this a list of texts of two tokens with a space between, or the
            path of a file of them.
        start_token: the token that the preprocessor puts before a text: a str, or its id. `None` for no such token,
            `"auto"` for what the vocabulary itself names (a `tokenizer.json` does so in its post-processor).
        end_token: the token that the preprocessor puts after a text: as `start_token`.
        pad_token: str or `None`. The token that fills a row. With `None` rows are filled with id 0, which may well be
            a real token: the padding mask alone says what is padding.
        parse_special: bool. `False` takes a special token that is spelt in a text for plain text; `True` takes it for
            the token. `start_token` and `end_token` count as special whatever the file says.
        legacy: bool. What a SentencePiece vocabulary does with text after a special token: `True` starts a new
            sentence there, with its mark of a word start, as SentencePiece itself and Meta's code do; `False` goes on
            with the text, as transformers does when `legacy` is false. `None` keeps the rules of the file, `True` for a
            `tokenizer.model`.
        add_prefix_space: bool. Whether a text is taken as if it began with a space. `None` keeps the rules of the file.
        chat_template: how `apply_chat_template` writes a conversation: Jinja text, the name of a built-in template
            (`kllama.text.chat.template.BUILT_IN`), or a dict of several by name, of which `"default"` is used, or
            `"tool_use"` where there are tools.
        dtype: `"int32"` or `"int64"`. The dtype of the ids of a single text.
        **kwargs: `name`, `trainable` and `config_file` of `keras_hub.tokenizers.Tokenizer`; and KerasHub's names:
            `proto` for a SentencePiece `tokenizer`, with the tokens `<s>` and `</s>`; `vocabulary` for a `tokenizer`
            with `merges`, with the tokens `<|begin_of_text|>` and `<|end_of_text|>`; `bos_token` and `eos_token` for
            `start_token` and `end_token`; and `misc_special_tokens`, several of the vocabulary that are special
            beside those that are spelt `<|...|>`.

    Raises:
        CheckpointError: the vocabulary is damaged, or lacks `start_token`, `end_token` or `pad_token`.
        MissingFileError: `tokenizer` is a path at which there is no file.
        UnsupportedError: a vocabulary of a kind that kllama does not read.
        ValueError: `legacy` or `add_prefix_space` for a vocabulary that knows no such rule, or two arguments that
            contradict each other.

    Example:
    ```python
    tokenizer = LlamaTokenizer("tokenizer.model")
    tokenizer("Once upon a time")  # array of ids (T,)
    tokenizer(["Once", "upon"])  # a list of lists of ids
    tokenizer.detokenize(tokenizer("Once upon a time"))  # "Once upon a time"

    LlamaTokenizer(proto="vocabulary.spm")  # as KerasHub's LlamaTokenizer
    LlamaTokenizer(vocabulary="vocabulary.json", merges="merges.txt", eos_token="<|eot_id|>")  # as its Llama3Tokenizer
    ```
    """

    # models/ sets this to LlamaBackbone: KerasHub finds a tokenizer by its backbone, and imports go downward only.
    backbone_cls = None

    def __init__(
        self,
        tokenizer: str | os.PathLike | bytes | Mapping | tokenizers.Tokenizer | None = None,
        merges: Sequence[str] | str | os.PathLike | None = None,
        *,
        start_token: str | int | None = "auto",
        end_token: str | int | None = "auto",
        pad_token: str | None = None,
        parse_special: bool = False,
        legacy: bool | None = None,
        add_prefix_space: bool | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        dtype="int32",
        **kwargs,
    ):
        source, start_token, end_token, kwargs = translate(tokenizer, merges, start_token, end_token, kwargs)
        super().__init__(
            start_token=start_token,
            end_token=end_token,
            pad_token=pad_token,
            chat_template=chat_template,
            dtype=dtype,
            **kwargs,
        )
        if self.compute_dtype not in ("int32", "int64"):
            raise ValueError(
                f"dtype = {self.compute_dtype!r}; expected 'int32' or 'int64'. id_to_token() gives the token of an id."
            )
        check_flag("parse_special", parse_special)
        for name, flag in (("legacy", legacy), ("add_prefix_space", add_prefix_space)):
            if not isinstance(flag, bool | None):
                raise TypeError(f"{name} = {flag!r}; expected True, False or None.")
        self.parse_special = parse_special
        self.legacy = legacy
        self.add_prefix_space = add_prefix_space
        self.file_assets = [ASSET]
        self.built = True
        if source is not None:
            self._set_vocabulary(source)

    @_OfTheClass
    def train(
        cls,
        texts: Iterable[str],
        vocabulary_size: int,
        kind: str = "byte_bpe",
        *,
        start_token: str | None = "<s>",
        end_token: str | None = "</s>",
        special_tokens: Sequence[str] = (),
        pattern: str | None = None,
        **kwargs,
    ) -> "LlamaTokenizer":
        """Train a tokenizer on texts, with a vocabulary of exactly the given size.

        The same texts give the same vocabulary, on any machine. A special token that a text spells out is left out of
        what is learned.

        Args:
            texts: any iterable of str, read once; a generator will do.
            vocabulary_size: int. The number of ids, special tokens included; at most 2 ** 22.
            kind: `"byte_bpe"`, as Llama 3 has it: the special tokens, the 256 bytes, and the merges; every text comes
                back as it was. Or `"sentencepiece_bpe"`, as Llama 2 has it: `<unk>`, the special tokens, the 256 bytes,
                the characters of the texts, and the merges; "▁" becomes a space.
            start_token: str or `None`, which gets the first id.
            end_token: str or `None`, which gets the next one.
            special_tokens: further special tokens, in the order of their ids.
            pattern: `"llama3"` (also `None`) or `"gpt2"`. How `"byte_bpe"` cuts text into words.
            **kwargs: further constructor arguments, such as `chat_template`.

        Returns:
            A `LlamaTokenizer`.

        Raises:
            TypeError: a text is not a str; the message has its row.
            ValueError: `vocabulary_size` is less than the tokens that are always there, or more than the texts have
                pieces for; the message has the number that is possible.

        Example:
        ```python
        tokenizer = LlamaTokenizer.train(["Once upon a time", "Once more"], 270)
        tokenizer.detokenize(tokenizer("upon a time"))  # "upon a time"
        ```
        """
        named = [token for token in (start_token, end_token) if token is not None]
        encoder = train_tokenizer(
            texts, vocabulary_size, kind, special_tokens=[*named, *special_tokens], pattern=pattern
        )
        return cls(encoder, start_token=start_token, end_token=end_token, **kwargs)

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
            inputs: ids as an int, a list, an array or a backend tensor of shape `(T,)`; or a batch of such rows, which
                may be a ragged tensor of TensorFlow.
            skip_special_tokens: bool. Leave special tokens out of the text.

        Returns:
            A str, or a list of str for a batch; inside a TensorFlow graph a string tensor. Bytes that are not UTF-8
            become U+FFFD.

        Raises:
            TypeError: an id is not an integer.
            ValueError: no token has the id.
        """

        def decode(rows):
            return self._decode(rows, skip_special_tokens)

        if in_tf_function():
            from kllama.backend import tf_data

            return tf_data.decode(decode, inputs)
        rows, batched = as_rows(inputs)
        return decode(rows) if batched else decode(rows)[0]

    def _decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        vocabulary = self._loaded()
        for row in rows:
            vocabulary.check(row)
        with rust_errors(f"{ASSET}: the decoder of this tokenizer fails on the ids"):
            return vocabulary.decode(rows, skip_special_tokens=skip_special_tokens)

    def detokenize_stream(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> Iterator[str]:
        """Join token ids into text while they come in.

        Args:
            ids: ints, from a generator for one.
            skip_special_tokens: bool. Leave special tokens out of the text.

        Yields:
            Pieces of text, each as soon as no further id can change it: never half a character, and joined exactly
            `detokenize` of all the ids.

        Raises:
            TypeError: an id is not an integer.
            ValueError: no token has the id.

        Example:
        ```python
        for piece in tokenizer.detokenize_stream(ids):
            print(piece, end="", flush=True)
        ```
        """
        detokenizer = self.streaming_detokenizer(skip_special_tokens=skip_special_tokens)
        for token_id in ids:
            if piece := detokenizer.add(token_id):
                yield piece
        if piece := detokenizer.finish():
            yield piece

    def streaming_detokenizer(self, *, skip_special_tokens: bool = False) -> StreamingDetokenizer:
        """Give what `detokenize_stream` joins ids with, for a caller who has them one at a time."""
        vocabulary = self._loaded()
        return StreamingDetokenizer(
            vocabulary.encoder, skip_special_tokens=skip_special_tokens, literal_ids=vocabulary.literal_ids
        )

    def save_assets(self, dir_path: str) -> None:
        """Write the vocabulary and its rules to `tokenizer.json` in a directory."""
        with open(os.path.join(dir_path, ASSET), "w", encoding="utf-8") as file:
            file.write(self._loaded().encoder.to_str())

    def load_assets(self, dir_path: str) -> None:
        """Read the vocabulary and its rules from `tokenizer.json` in a directory."""
        if dir_path is None:  # What Keras passes when the archive has nothing for this layer.
            raise MissingFileError(f"{ASSET}: not in the saved model; expected among the assets of {self.name!r}.")
        self._set_vocabulary(os.path.join(dir_path, ASSET))

    def export_to_transformers(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write the tokenizer as a Hugging Face directory, which `AutoTokenizer` of transformers 4 and 5 opens.

        It puts the start token before each text where the vocabulary's own rules do; the method of the preprocessor,
        where its `add_start_token` says so.

        Args:
            path: the directory.
            overwrite: whether a directory that holds something is replaced, whole.

        Raises:
            ValueError: the directory holds something and `overwrite` is false, there is no vocabulary, or the name of a
                chat template is no name of a file.
            ResourceError: the disk is full or failing.
        """
        export_tokenizer(self, path, add_start_token=self.adds_start_token, overwrite=overwrite)

    def get_config(self) -> dict:
        config = super().get_config()
        config.update(
            {
                "start_token": self.start_token,
                "end_token": self.end_token,
                "pad_token": self.pad_token,
                "parse_special": self.parse_special,
                "legacy": self.legacy,
                "add_prefix_space": self.add_prefix_space,
                "chat_template": self.chat_template,
            }
        )
        return config

    @classmethod
    def from_config(cls, config: dict) -> "LlamaTokenizer":
        # A config comes out of a file. It must not name another file to read: the vocabulary is an asset.
        for name in SOURCES:
            if config.get(name) is not None:
                raise CheckpointError(
                    f"{cls.__name__} config: {name} = {reprlib.repr(config[name])}; expected no such key. The "
                    f"vocabulary is read from the assets, {ASSET}."
                )
        return super().from_config(config)

    def save_to_preset(self, preset_dir, *, overwrite: bool = False):
        """Save the tokenizer to a directory that `from_preset` loads; what else a preset has there is kept.

        Args:
            preset_dir: the directory, which is whole at every instant.
            overwrite: whether it may hold files that no preset has; they are kept.

        Raises:
            ValueError: the directory holds files that no preset has.
            ResourceError: the disk is full or fails, or the directory may not be written to.
        """
        with staged_preset(preset_dir, layer_files(self.config_file), overwrite) as staging:
            super().save_to_preset(str(staging))

    @classmethod
    @undisturbed
    def from_preset(cls, preset: str | os.PathLike, **kwargs) -> "LlamaTokenizer":
        """Build the tokenizer of a checkpoint.

        Args:
            preset: the name of a preset, a `kaggle://` handle, or the path of a checkpoint of any format, of a
                directory that holds tokenizer files alone, or of the file of a vocabulary.
            **kwargs: constructor arguments that replace the checkpoint's, such as `parse_special`.

        Raises:
            MissingFileError: if there is no such preset, or it carries no tokenizer.
            ResourceError: if a download fails.
            CheckpointError: if a file is damaged.
        """
        return cls.from_checkpoint(open_tokenizer(preset), **kwargs)

    @classmethod
    def from_checkpoint(cls, checkpoint, **kwargs) -> "LlamaTokenizer":
        """Build the tokenizer of a checkpoint that `kllama.checkpoints.formats` has opened."""
        if given := [name for name in SOURCES if name in kwargs]:
            raise ValueError(
                f"{' and '.join(given)} with a checkpoint; expected its own vocabulary, or a constructor call."
            )
        if checkpoint.tokenizer_config is None:
            raise MissingFileError(f"{checkpoint.path}: no tokenizer; expected {ASSET}.", str(checkpoint.path / ASSET))
        config = {**checkpoint.tokenizer_config, **with_own_names(kwargs)}
        source, added = config.pop("tokenizer"), config.pop("added_tokens", None)
        try:
            tokenizer = cls(**config)
            tokenizer._set_vocabulary(source, added)
            if "vocabulary_size" in checkpoint.backbone_config:
                tokenizer._loaded().check_rows(checkpoint.backbone_config["vocabulary_size"])
        except CheckpointError as error:
            if not str(error).startswith(str(checkpoint.path)):
                error.args = (f"{checkpoint.path}: {error}",)
            raise
        return tokenizer

    def _set_vocabulary(self, source, added=None) -> None:
        """Open the vocabulary, append tokens that other files add to it, and find the named ones among all of them."""
        opened = open_vocabulary(source, legacy=self.legacy, add_prefix_space=self.add_prefix_space)
        self._vocabulary = vocabulary = Vocabulary(opened.encoder, opened.adds_start_token, self.parse_special)
        if added is not None:
            vocabulary.append_described(added.tokens, added.source)
        self.start_token = vocabulary.name("start_token", self.start_token, opened.start_token)
        self.end_token = vocabulary.name("end_token", self.end_token, opened.end_token)
        vocabulary.name("pad_token", self.pad_token, None)
        vocabulary.make_special(filter(None, (self.start_token, self.end_token)))  # the pad token may be ordinary
