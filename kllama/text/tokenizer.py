"""The tokenizer: text to token ids and back, by the rules of the vocabulary it was given.

The Rust `tokenizers` library runs the rules: normalizer, pre-tokenizer, model, added tokens and decoder; no rule is
written again here. Every format a vocabulary comes in becomes a `tokenizers.Tokenizer` first (`formats/`). Start and
end tokens, padding and masks are the preprocessor's; templates are rendered by `chat`.
"""

import operator
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import keras
import keras_hub
import numpy as np
import tokenizers
from keras_hub.src.utils.tensor_utils import in_tf_function

from kllama.arguments import check_flag
from kllama.checkpoints.formats import open_tokenizer
from kllama.errors import CheckpointError, MissingFileError
from kllama.text.chat.template import BUILT_IN, ChatTemplate, open_template, suggest_template
from kllama.text.detokenizer import StreamingDetokenizer
from kllama.text.formats.recognise import open_vocabulary
from kllama.text.formats.rules import rust_errors
from kllama.text.inputs import as_rows, as_texts, without_surrogates
from kllama.text.tokenizer_training import train_tokenizer
from kllama.text.vocabulary import Vocabulary

ASSET = "tokenizer.json"


class _OfTheClass(classmethod):
    """A class method whose name means on instances what it means in their bases: a module of PyTorch has a `train`."""

    def __get__(self, instance, owner=None):
        inherited = None if instance is None else getattr(super(LlamaTokenizer, instance), "train", None)
        return super().__get__(None, owner) if inherited is None else inherited


@keras.saving.register_keras_serializable(package="kllama")
class LlamaTokenizer(keras_hub.tokenizers.Tokenizer):
    """Split text into the token ids of a Llama checkpoint, and join ids into text.

    Args:
        tokenizer: the vocabulary with its rules: path of a `tokenizer.json`, a SentencePiece `tokenizer.model` (Llama
            2, Mistral), a tiktoken `tokenizer.model` (Llama 3), a `vocab.json` beside its `merges.txt` (GPT-2), a
            llama2.c `tokenizer.bin`, one of KerasHub's tokenizer assets, or a directory of these; told apart by
            content. Or the text or the parsed dict of a `tokenizer.json`, or a `tokenizers.Tokenizer` (copied). `None`
            leaves the tokenizer without a vocabulary until `load_assets`.
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
        **kwargs: `name`, `trainable` and `config_file` of `keras_hub.tokenizers.Tokenizer`.

    Raises:
        CheckpointError: the vocabulary is damaged, or lacks `start_token`, `end_token` or `pad_token`.
        MissingFileError: `tokenizer` is a path at which there is no file.
        UnsupportedError: a vocabulary of a kind that kllama does not read.
        ValueError: `legacy` or `add_prefix_space` for a vocabulary that knows no such rule.

    Example:
    ```python
    tokenizer = LlamaTokenizer("tokenizer.model")
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
        super().__init__(dtype=dtype, **kwargs)
        if self.compute_dtype not in ("int32", "int64"):
            raise ValueError(f"dtype = {self.compute_dtype!r}; expected 'int32' or 'int64'.")
        for name, token in (("start_token", start_token), ("end_token", end_token)):
            if isinstance(token, bool) or not isinstance(token, str | int | None):
                raise TypeError(f"{name} = {token!r}; expected a str, an id or None.")
        if not isinstance(pad_token, str | None):
            raise TypeError(f"pad_token = {pad_token!r}; expected a str or None.")
        if not isinstance(parse_special, bool):
            raise TypeError(f"parse_special = {parse_special!r}; expected True or False.")
        for name, flag in (("legacy", legacy), ("add_prefix_space", add_prefix_space)):
            if not isinstance(flag, bool | None):
                raise TypeError(f"{name} = {flag!r}; expected True, False or None.")
        self.start_token = start_token
        self.end_token = end_token
        self.pad_token = pad_token
        self.parse_special = parse_special
        self.legacy = legacy
        self.add_prefix_space = add_prefix_space
        self.chat_template = _checked_template(chat_template)
        self.file_assets = [ASSET]
        self._vocabulary = None
        self.built = True
        if tokenizer is not None:
            self._set_vocabulary(tokenizer)

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
            vocabulary.check(row)
        with rust_errors(f"{ASSET}: the decoder of this tokenizer fails on the ids"):
            texts = vocabulary.decode(rows, skip_special_tokens=skip_special_tokens)
        return texts if batched else texts[0]

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
        vocabulary = self._loaded()
        detokenizer = StreamingDetokenizer(
            vocabulary.encoder, skip_special_tokens=skip_special_tokens, literal_ids=vocabulary.literal_ids
        )
        for token_id in ids:
            if piece := detokenizer.add(token_id):
                yield piece
        if piece := detokenizer.finish():
            yield piece

    def apply_chat_template(
        self,
        messages: Sequence,
        *,
        tools: Sequence[Mapping] | None = None,
        documents: Sequence[Mapping] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_assistant_mask: bool = False,
        variables: Mapping | None = None,
    ):
        """Write conversations as the model was trained to see them, by `chat_template`.

        A special token that is spelt in a message is text, whatever `parse_special` says; only the template writes
        special tokens. No start token is added to what the template writes.

        Args:
            messages: one conversation, a list of `{"role", "content"}`, with `"tool_calls"` where the assistant calls
                functions; or a list of conversations.
            tools: JSON schemas of the functions that the model may call.
            documents: what the model is to answer from, for templates that know them.
            add_generation_prompt: bool. End with what opens an answer of the assistant.
            continue_final_message: bool. End with the content of the last message, for the model to go on with it.
            tokenize: bool. Return ids; `False` returns the text.
            return_assistant_mask: bool. Return also which tokens the assistant wrote, the token that ends its turn
                included: what to train on. Only with `tokenize`.
            variables: further variables of the template, such as `{"date_string": "26 Jul 2024"}`.

        Returns:
            For one conversation an array of ids `(T,)`, or a str; a list of lists of ids, or of str, for several. With
            `return_assistant_mask` a pair of the ids and bools of the same form.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: there is no template, the messages have the wrong form, or the template refuses them.
            CheckpointError: the template is damaged, fails, or is too expensive.

        Example:
        ```python
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        ```
        """
        check_flag("tokenize", tokenize)
        check_flag("return_assistant_mask", return_assistant_mask)
        if return_assistant_mask and not tokenize:
            raise ValueError("return_assistant_mask = True with tokenize = False; expected ids to mask.")
        batched = isinstance(messages, list | tuple) and bool(messages) and isinstance(messages[0], list | tuple)
        template = self._compiled_chat_template(has_tools=bool(tools))
        chats = [
            template.render(
                conversation,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                bos_token=self.start_token or "",
                eos_token=self.end_token or "",
                variables=variables,
                special_tokens=self.special_tokens,
                find_assistant=return_assistant_mask,
            )
            for conversation in (messages if batched else [messages])
        ]
        if not tokenize:
            texts = [chat.text for chat in chats]
            return texts if batched else texts[0]
        ids, masks = zip(*map(self._loaded().chat_encoder.encode, chats), strict=True)
        if not batched:
            ids, masks = np.array(ids[0], self.compute_dtype), masks[0] and np.array(masks[0])
        else:
            ids, masks = list(ids), list(masks)
        return (ids, masks) if return_assistant_mask else ids

    def _compiled_chat_template(self, has_tools: bool) -> ChatTemplate:
        source = self.chat_template
        if isinstance(source, Mapping):
            source = source.get("tool_use" if has_tools and "tool_use" in source else "default")
        if source is None:
            fits = suggest_template(self.special_tokens)
            hint = f" The special tokens here are those of {fits!r}." if fits else ""
            names = ", ".join(BUILT_IN)
            raise ValueError(f"chat_template = None; expected Jinja text, or a built-in template: {names}.{hint}")
        return open_template(source)

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

    @property
    def turn_end_token_id(self) -> int | None:
        """The id of the special token with which `chat_template` ends what the assistant says.

        `None` where it ends it with none, or does not show what the assistant says.
        """
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ids, mask = self.apply_chat_template(turns, return_assistant_mask=True)
        except CheckpointError:
            raise
        except ValueError:  # the template refuses these turns, or has no place for a mask
            return None
        last = int(ids[mask][-1]) if mask.any() else None
        return last if last in self.special_token_ids else None

    @property
    def adds_start_token(self) -> bool:
        """Whether the vocabulary's own rules put the start token before each text. `tokenize` itself adds none."""
        return bool(self._loaded().adds_start_token)

    def add_tokens(self, tokens: str | Sequence[str], special: bool = False) -> int:
        """Append tokens to the vocabulary: words of a new language, or marks of a new format.

        From then on a text that holds one is split there, before the rules of the vocabulary see the rest. Where
        several begin, the longest is taken; where that is a special token that text cannot spell, its whole spelling is
        left to the rules of the vocabulary, and no other added token is looked for in it. They are saved with the
        tokenizer. A model needs a row for each: see `LlamaCausalLM.resize_vocabulary`. In a SentencePiece vocabulary
        with `legacy` rules the text behind an added token starts a new sentence; for tokens that are parts of words,
        build the tokenizer with `legacy=False`.

        Args:
            tokens: a str or several. Those that the vocabulary has stay what they are, but become special if asked to.
                A byte-level vocabulary (Llama 3, GPT-2) spells bytes as characters: "é" is its name of the byte 0xE9.
                There is one token to a spelling, so that such a text cannot be added; longer ones like "été" can.
            special: bool. Whether they are special tokens, which text cannot spell unless `parse_special` is set, and
                which `detokenize` can skip.

        Returns:
            How many were new.

        Raises:
            TypeError: a token is not a str.
            ValueError: a token is empty, holds a lone surrogate, or is how a byte-level vocabulary spells other text.
                Or the ids of the vocabulary have gaps, so that it has no definite end.

        Example:
        ```python
        tokenizer.add_tokens(["<|tool|>"], special=True)  # 1
        ```
        """
        vocabulary = self._loaded()
        tokens = [tokens] if isinstance(tokens, str) else list(tokens)
        for index, token in enumerate(tokens):
            if not isinstance(token, str):
                raise TypeError(f"tokens[{index}] = {token!r}; expected a str.")
            if not token:
                raise ValueError(f"tokens[{index}] = ''; expected at least one character.")
            if without_surrogates(token) != token:
                raise ValueError(f"tokens[{index}] = {token!r}; expected text without surrogates.")
            vocabulary.check_spelling(token, f"tokens[{index}]")
        wanted = [token for token in tokens if special or vocabulary.token_to_id(token) is None]
        return vocabulary.append([tokenizers.AddedToken(t, normalized=False, special=special) for t in wanted])

    def save_assets(self, dir_path: str) -> None:
        """Write the vocabulary and its rules to `tokenizer.json` in a directory."""
        with open(os.path.join(dir_path, ASSET), "w", encoding="utf-8") as file:
            file.write(self._loaded().encoder.to_str())

    def load_assets(self, dir_path: str) -> None:
        """Read the vocabulary and its rules from `tokenizer.json` in a directory."""
        if dir_path is None:  # What Keras passes when the archive has nothing for this layer.
            raise MissingFileError(f"{ASSET}: not in the saved model; expected among the assets of {self.name!r}.")
        self._set_vocabulary(os.path.join(dir_path, ASSET))

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
            preset: the name of a built-in preset, or the path of a preset directory, of a Hugging Face directory, which
                may hold tokenizer files alone, or of the file of a vocabulary.
            **kwargs: constructor arguments that replace the checkpoint's, such as `parse_special`.

        Raises:
            MissingFileError: if there is no such preset, or it carries no tokenizer.
            CheckpointError: if a file is damaged.
        """
        return cls.from_checkpoint(open_tokenizer(preset), **kwargs)

    @classmethod
    def from_checkpoint(cls, checkpoint, **kwargs) -> "LlamaTokenizer":
        """Build the tokenizer of a checkpoint that `kllama.checkpoints.formats` has opened."""
        if checkpoint.tokenizer_config is None:
            raise MissingFileError(f"{checkpoint.path}: no tokenizer; expected {ASSET}.", str(checkpoint.path / ASSET))
        config = {**checkpoint.tokenizer_config, **kwargs}
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

    def _loaded(self) -> Vocabulary:
        if self._vocabulary is None:
            raise ValueError(f"{self.name}: tokenizer = None; expected a vocabulary. Call load_assets() first.")
        return self._vocabulary


def _checked_template(template):
    sources = template.values() if isinstance(template, Mapping) else [template]
    if not all(isinstance(source, str) for source in sources if template is not None):
        raise TypeError(f"chat_template = {reprlib.repr(template)}; expected a str, a dict of str by name, or None.")
    return dict(template) if isinstance(template, Mapping) else template
