"""A vocabulary in memory: the Rust tokenizer that runs its rules, and what is asked about its tokens and ids.

It checks ids, names special tokens and appends tokens. It knows no file and no Keras. `LlamaTokenizer` holds one.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

import tokenizers

from kllama.checkpoints.files.reader import listed
from kllama.errors import CheckpointError
from kllama.text.chat.encoder import ChatEncoder
from kllama.text.formats.added_tokens import added_token, check_added_id
from kllama.text.formats.rules import decoder_parts


class Vocabulary:
    """The tokens of one tokenizer by id. Opaque to Keras, which would track a plain list of all tokens.

    Args:
        encoder: the Rust tokenizer; it is changed by `make_special` and `append`.
        adds_start_token: whether its rules put a start token before each text, None where they do not say.
        parse_special: whether a special token that is spelt in a text is the token, rather than text.

    Attributes:
        encoder: the same.
        adds_start_token: the same.
        parse_special: the same.
        tokens: list of str by id, None where no token has the id.
        special_ids: list of the ids of special tokens, ascending.
        is_byte_level: whether the characters of a token stand for bytes, é for 0xE9.
        literal_ids: ids of added tokens that stand for their own spelling, and that a byte-level decoder would misread.
    """

    def __init__(self, encoder: tokenizers.Tokenizer, adds_start_token: bool | None, parse_special: bool):
        self.encoder = encoder
        self.adds_start_token = adds_start_token
        self.parse_special = parse_special
        self.encoder.encode_special_tokens = not parse_special
        self._read()

    def __reduce__(self):
        # The library forgets `encode_special_tokens` in a copy, in a process of a data loader for one.
        return Vocabulary, (self.encoder, self.adds_start_token, self.parse_special)

    @functools.cached_property
    def chat_encoder(self) -> ChatEncoder:
        """The encoder of conversations; it is a copy of the vocabulary, made when the first one is encoded."""
        return ChatEncoder(self.encoder)

    def _read(self) -> None:
        self.__dict__.pop("chat_encoder", None)
        ids = self.encoder.get_vocab()
        self.tokens = [None] * (max(ids.values()) + 1)
        for token, token_id in ids.items():
            self.tokens[token_id] = token
        self._gaps = {token_id for token_id, token in enumerate(self.tokens) if token is None}
        added = self.encoder.get_added_tokens_decoder()
        self.special_ids = sorted(token_id for token_id, token in added.items() if token.special)
        self.is_byte_level = any(part["type"] == "ByteLevel" for part in decoder_parts(self.encoder))
        self.literal_ids = set()
        if self.is_byte_level:
            misread = {token_id: token.content for token_id, token in added.items() if self._is_misread(token_id)}
            self.literal_ids = {token_id for token_id, token in misread.items() if not self._is_formed(token)}

    def _is_misread(self, token_id: int) -> bool:
        """Whether a token stands for other text than it is spelt with."""
        return self.encoder.decode([token_id], skip_special_tokens=False) != self.tokens[token_id]

    def _is_formed(self, token: str) -> bool:
        """Whether the model itself makes this token, from bytes of text that its characters stand for."""
        model = self.encoder.model
        token_id = model.token_to_id(token)
        return token_id is not None and [part.id for part in model.tokenize(token)] == [token_id]

    def check_spelling(self, token: str, name: str) -> None:
        """Refuse to add a text to a byte-level vocabulary that has its spelling for other text, as é for the byte 0xE9.

        There is one token to a spelling. To take it for the text would turn every such byte into the text.

        Args:
            token: the text.
            name: the argument, for the message.

        Raises:
            ValueError: with the tokens that the text has already.
        """
        if not self.is_byte_level or not self._is_formed(token) or not self._is_misread(self.token_to_id(token)):
            return
        ids = self.encoder.encode(token, add_special_tokens=False).ids
        raise ValueError(
            f"{name} = {token!r}; expected another token: this byte-level vocabulary spells bytes so, token "
            f"{self.token_to_id(token)}. Leave it out, or add a longer one; a text that holds it has the ids {ids}."
        )

    def token(self, token_id: int) -> str:
        """Return the token that has an id, or raise a ValueError."""
        if not 0 <= token_id < len(self.tokens) or self.tokens[token_id] is None:
            gap = ", a gap of the vocabulary" if 0 <= token_id < len(self.tokens) else ""
            raise ValueError(f"id = {token_id}{gap}; expected the id of a token, 0 to {len(self.tokens) - 1}.")
        return self.tokens[token_id]

    def token_to_id(self, token: str) -> int | None:
        """Return the id of the token of this exact spelling, `None` without one."""
        return self.encoder.token_to_id(token)

    def check(self, ids: Sequence[int]) -> None:
        """Raise a ValueError for the first id that no token has."""
        distinct = set(ids)
        if not ids or (min(distinct) >= 0 and max(distinct) < len(self.tokens) and self._gaps.isdisjoint(distinct)):
            return
        for token_id in ids:
            self.token(token_id)

    def decode(self, rows: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        """Join rows of ids into texts; the ids have been checked."""
        if self.literal_ids:
            return [self._decode_around_literals(row, skip_special_tokens) for row in rows]
        return self.encoder.decode_batch(rows, skip_special_tokens=skip_special_tokens)

    def _decode_around_literals(self, row: list[int], skip_special_tokens: bool) -> str:
        skipped = set(self.special_ids) if skip_special_tokens else ()
        kept = (token_id for token_id in row if token_id not in skipped)
        text = []
        for is_literal, ids in itertools.groupby(kept, key=self.literal_ids.__contains__):
            if is_literal:
                text += [self.tokens[token_id] for token_id in ids]
            else:
                text.append(self.encoder.decode(list(ids), skip_special_tokens=False))
        return "".join(text)

    def check_rows(self, num_rows: int) -> None:
        """Raise a CheckpointError for tokens that have no row in an embedding table of a model."""
        outside = [f"{self.tokens[token_id]!r} = {token_id}" for token_id in range(num_rows, len(self.tokens))]
        if outside:
            raise CheckpointError(f"ids without an embedding row: {listed(outside)}; expected below {num_rows}.")

    def name(self, role: str, token: str | int | None, auto: str | None) -> str | None:
        """Return the text of the token that plays a role.

        Args:
            role: the argument that names it, for the message.
            token: its text or its id, None for no such token, "auto" for the next argument.
            auto: what the file of the vocabulary names.

        Raises:
            CheckpointError: there is no such token.
        """
        token = auto if token == "auto" else token
        size = len(self.tokens)
        if isinstance(token, int):
            if not 0 <= token < size or self.tokens[token] is None:
                raise CheckpointError(f"{role} = {token}; expected the id of one of the {size} tokens.")
            return self.tokens[token]
        if token is not None and self.token_to_id(token) is None:
            raise CheckpointError(f"{role} = {token!r}; expected one of the {size} tokens of the vocabulary.")
        return token

    def make_special(self, tokens: Iterable[str]) -> None:
        """Count tokens of the vocabulary as special, whatever its file says; their other flags stay."""
        added = {token.content: token for token in self.encoder.get_added_tokens_decoder().values()}
        tokens = [added.get(token, tokenizers.AddedToken(token, normalized=False)) for token in tokens]
        tokens = [token for token in tokens if not token.special]
        if tokens:
            self.encoder.add_special_tokens(tokens)
            self._read()

    def append(self, tokens: Sequence[tokenizers.AddedToken]) -> int:
        """Add tokens at the end, in their order, and return how many were new. One that is there takes the flags.

        Raises:
            ValueError: a token is new, the ids have gaps, and the library would fill them.
        """
        if self._gaps and any(self.token_to_id(token.content) is None for token in tokens):
            raise ValueError(
                f"the vocabulary has no token for {len(self._gaps)} of its ids, such as {min(self._gaps)}; expected "
                "ids without a gap. Tokens can only be added at the end of such a vocabulary."
            )
        size = len(self.tokens)
        self.encoder.add_tokens(tokens)
        self._read()
        return len(self.tokens) - size

    def append_described(self, tokens: Sequence[Mapping], source: object) -> None:
        """Add tokens that a file lists with their ids.

        Args:
            tokens: dicts of `"id"`, `"content"` and flags of `tokenizers.AddedToken`, in the order of the ids. Flags
                that are missing are false, `"normalized"` is true for a token that is not special.
            source: the file, for messages.

        Raises:
            CheckpointError: a token has another id than the file says, or ids of the vocabulary have gaps.
        """
        try:
            self.append([added_token(token) for token in tokens])
        except ValueError as error:
            raise CheckpointError(f"{source}: added tokens: {error}") from error
        for token in tokens:
            check_added_id(self.encoder, token["content"], token["id"], source)
