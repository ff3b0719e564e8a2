"""What is asked about the tokens of a tokenizer: the lookups between tokens and ids, the special tokens, new tokens.

It opens no file and splits no text. `LlamaTokenizer` derives from it.
"""

import operator
from collections.abc import Sequence

import keras_hub
import tokenizers

from kllama.text.formats.vocab_and_merges import LLAMA3_END, LLAMA3_TURN_END
from kllama.text.inputs import without_surrogates
from kllama.text.vocabulary import Vocabulary


class VocabularyTokenizer(keras_hub.tokenizers.Tokenizer):
    """The part of a tokenizer that knows its vocabulary.

    Args:
        start_token: the token that begins a text: a str, its id, None, or `"auto"` until the vocabulary is there.
        end_token: the token that ends a text; the same.
        pad_token: str or `None`. The token that fills a row.
        **kwargs: arguments of `keras_hub.tokenizers.Tokenizer`.
    """

    def __init__(self, start_token, end_token, pad_token, **kwargs):
        super().__init__(**kwargs)
        for name, token in (("start_token", start_token), ("end_token", end_token)):
            if isinstance(token, bool) or not isinstance(token, str | int | None):
                raise TypeError(f"{name} = {token!r}; expected a str, an id or None.")
        if not isinstance(pad_token, str | None):
            raise TypeError(f"pad_token = {pad_token!r}; expected a str or None.")
        self.start_token = start_token
        self.end_token = end_token
        self.pad_token = pad_token
        self._vocabulary: Vocabulary | None = None

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
    def end_token2_id(self) -> int:
        """The id of `<|eot_id|>` where `end_token` is `<|end_of_text|>`: KerasHub's `generate` stops at either.

        Raises:
            AttributeError: any other tokenizer; KerasHub asks with `hasattr`.
        """
        if (
            self.end_token != LLAMA3_END
            or self._vocabulary is None
            or self._loaded().token_to_id(LLAMA3_TURN_END) is None
        ):
            raise AttributeError(f"end_token = {self.end_token!r}; this tokenizer has no second end token.")
        return self.token_to_id(LLAMA3_TURN_END)

    @property
    def pad_token_id(self) -> int:
        """The id of `pad_token`, 0 without one: a filler, never to be read as a mask."""
        return 0 if self.pad_token is None else self.token_to_id(self.pad_token)

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

    def _loaded(self) -> Vocabulary:
        if self._vocabulary is None:
            raise ValueError(f"{self.name}: tokenizer = None; expected a vocabulary. Call load_assets() first.")
        return self._vocabulary
