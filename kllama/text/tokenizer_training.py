"""Train a tokenizer on texts: byte-level BPE as Llama 3 has it, or sentencepiece BPE as Llama 2 has it.

The `tokenizers` library learns the merges. Here it is decided what it learns them from, which ids the tokens get, and
by which rules the trained tokenizer splits and joins text. Start and end tokens are not put around texts here.
`LlamaTokenizer.train` calls it.
"""

import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from kllama.text.formats.merges import ranked_merges
from kllama.text.formats.opened import MAX_VOCABULARY_SIZE
from kllama.text.formats.patterns import GPT2, LLAMA3
from kllama.text.formats.rules import MARK
from kllama.text.inputs import without_surrogates

KINDS = ("byte_bpe", "sentencepiece_bpe")

# Where byte-level BPE cuts a text into the words that merges stay within.
PATTERNS = {"llama3": LLAMA3, "gpt2": GPT2}

UNKNOWN = "<unk>"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Characters beyond this share of the text are left to the byte tokens, and pieces have at most so many characters.
CHARACTER_COVERAGE = 0.99995
MAX_PIECE_LENGTH = 16
# A longer word is learned from in parts of so many characters: the trainer's work grows with the square of the length.
MAX_WORD_LENGTH = 1024
# Llama 2's words: letters, or signs, with at most one mark before them; a digit; a run of marks. Control characters
# belong to none. The last mark of a run goes to the word after it.
_SENTENCEPIECE_WORD = r"▁+(?=▁)|▁?[\p{L}\p{M}]+|\p{Nd}|▁?[^\s\p{L}\p{M}\p{Nd}▁]+|\s|▁+"
_CHUNK = re.compile(r"▁*[^▁\x00-\x1f\x7f]+|▁+")
_BLOCK = 4096  # how many times a word is repeated in one string for the trainer


def train_tokenizer(
    texts: Iterable[str],
    vocabulary_size: int,
    kind: str = "byte_bpe",
    *,
    special_tokens: Sequence[str] = ("<s>", "</s>"),
    pattern: str | None = None,
) -> tokenizers.Tokenizer:
    """Learn a vocabulary of exactly the given size from texts.

    The same texts give the same vocabulary, on any machine. A special token that a text spells out is left out of
    what is learned, so that plain text never becomes a special token.

    Args:
        texts: any iterable of str, read once; a generator will do. Lone surrogates become U+FFFD.
        vocabulary_size: int. The number of ids, special tokens included.
        kind: `"byte_bpe"`, whose ids are the special tokens from 0 on, the 256 bytes, and the merges; or
            `"sentencepiece_bpe"`: `<unk>` 0, the special tokens from 1 on, the 256 bytes, the characters of the texts,
            and the merges. The first gives every text back as it was. The second takes "▁" for a space, and drops the
            space that it puts before a text.
        special_tokens: distinct str, such as the start and the end token.
        pattern: `"llama3"` (also `None`) or `"gpt2"`. How `"byte_bpe"` cuts text into words; `"sentencepiece_bpe"` has
            one way only, and takes none.

    Returns:
        A `tokenizers.Tokenizer`, without rules for start and end tokens.

    Raises:
        TypeError: a text is not a str; the message has its row.
        ValueError: `vocabulary_size` is less than the tokens that are always there, or more than the texts have pieces
            for, or than 2^22; the message has the number that is possible.

    Example:
    ```python
    encoder = train_tokenizer(["Once upon a time", "Once more"], 270)
    encoder.decode(encoder.encode("upon a time").ids)  # "upon a time"
    ```
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}; expected one of {KINDS}.")
    if isinstance(vocabulary_size, bool) or not isinstance(vocabulary_size, int):
        raise TypeError(f"vocabulary_size = {vocabulary_size!r}; expected an int.")
    if vocabulary_size > MAX_VOCABULARY_SIZE:  # The trainer makes room for all of it before it reads a text.
        raise ValueError(f"vocabulary_size = {vocabulary_size}; expected at most {MAX_VOCABULARY_SIZE}.")
    specials = _checked_specials(special_tokens)
    if kind == "byte_bpe":
        return _train_byte_bpe(_checked(texts), vocabulary_size, specials, _checked_pattern(pattern))
    if pattern is not None:
        raise ValueError(f"pattern = {pattern!r} with kind = {kind!r}; expected None: only byte_bpe takes a pattern.")
    return _train_sentencepiece_bpe(_checked(texts), vocabulary_size, specials)


def _checked_specials(special_tokens) -> list[str]:
    if isinstance(special_tokens, str) or not isinstance(special_tokens, Sequence):
        raise TypeError(f"special_tokens = {special_tokens!r}; expected a list of str.")
    for token in special_tokens:
        if not isinstance(token, str):
            raise TypeError(f"special_tokens has {token!r}; expected a str.")
        if without_surrogates(token) != token:
            raise ValueError(f"special_tokens has {token!r}; expected text without surrogates.")
        if len(token) < 2 or token in (UNKNOWN, *BYTE_TOKENS) or special_tokens.count(token) > 1:
            raise ValueError(
                f"special_tokens has {token!r}; expected distinct tokens of two or more characters, none of them "
                f"{UNKNOWN!r} or a byte such as {BYTE_TOKENS[0]!r}."
            )
    return list(special_tokens)


def _checked_pattern(pattern) -> str:
    if pattern not in (None, *PATTERNS):
        raise ValueError(f"pattern = {pattern!r}; expected one of {sorted(PATTERNS)}, or None for 'llama3'.")
    return PATTERNS[pattern or "llama3"]


def _checked(texts) -> Iterator[str]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"texts = {reprlib.repr(texts)} ({type(texts).__name__}); expected a list or iterator of str.")
    return _rows(texts)


def _rows(texts):
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{row}] = {reprlib.repr(text)} ({type(text).__name__}); expected a str.")
        yield without_surrogates(text)


def _check_room(vocabulary_size: int, num_fixed: int, what: str) -> None:
    if vocabulary_size < num_fixed:
        raise ValueError(f"vocabulary_size = {vocabulary_size}; expected at least {num_fixed}: {what}.")


def _check_learned(vocabulary_size: int, num_possible: int) -> None:
    if num_possible != vocabulary_size:
        raise ValueError(
            f"vocabulary_size = {vocabulary_size}; expected at most {num_possible}, as the texts have no more pieces "
            f"to learn. Give more text, or pass {num_possible}."
        )


def _check_collisions(specials: list[str], learned: Iterable[str]) -> None:
    # Otherwise plain text would be merged into the special token, whatever `parse_special` says.
    if taken := set(specials) & set(learned):
        raise ValueError(
            f"special_tokens has {min(taken)!r}, which is also how a piece of plain text is written; expected tokens "
            "that text has no other spelling of, such as '<s>'."
        )


def _spelling_of(specials: list[str]) -> re.Pattern:
    # Of two that begin alike the longer one; with none, nothing matches.
    return re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")


def _train_byte_bpe(texts, vocabulary_size, specials, pattern):
    _check_room(vocabulary_size, 256 + len(specials), f"256 bytes and {len(specials)} special tokens")
    encoder = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, _parts_of_long_words(), as_bytes])
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    spelling = _spelling_of(specials)
    encoder.train_from_iterator((part for text in texts for part in spelling.split(text)), trainer)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    merges = json.loads(encoder.to_str())["model"]["merges"]
    _check_collisions(specials, ("".join(merge) for merge in merges))
    _check_learned(vocabulary_size, encoder.get_vocab_size())
    return encoder


def _train_sentencepiece_bpe(texts, vocabulary_size, specials):
    fixed = [UNKNOWN, *specials, *BYTE_TOKENS]
    _check_room(vocabulary_size, len(fixed) + 1, f"256 bytes, {UNKNOWN!r}, {len(specials)} special tokens, {MARK!r}")
    room = vocabulary_size - len(fixed)
    words = _count_words(texts, _spelling_of([UNKNOWN, *specials]))
    pieces = _learn_pieces(words, _alphabet(words, room), room)
    _check_collisions(specials, pieces)
    _check_learned(vocabulary_size, len(fixed) + len(pieces))
    return _sentencepiece_encoder(fixed, pieces)


def _parts_of_long_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(f"(?m:.{{1,{MAX_WORD_LENGTH}}})"), "isolated")


def _count_words(texts, spelling) -> Counter:
    """Count what stands between spaces. The counts stay in memory, the texts do not."""
    words = Counter()
    for text in texts:
        marked = MARK + text.replace(" ", MARK)
        words.update(_CHUNK.findall(spelling.sub("\n", marked)))
    return words


def _alphabet(words: Counter, room: int) -> list[str]:
    """Return the most frequent characters, the mark first, as many as cover the text and find room."""
    counts = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    del counts[MARK]
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    alphabet, missing = [MARK], counts.total()
    allowed = missing * (1 - CHARACTER_COVERAGE)
    for character in ranked[: room - 1]:
        if missing <= allowed:
            break
        alphabet.append(character)
        missing -= counts[character]
    return alphabet


def _learn_pieces(words: Counter, alphabet: list[str], room: int) -> list[str]:
    """Return the characters of the alphabet, then the pieces merged from them, in the order of learning."""
    encoder = tokenizers.Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.CharDelimiterSplit("\n"),
            pre_tokenizers.Split(Regex(_SENTENCEPIECE_WORD), "isolated"),
            _parts_of_long_words(),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=room, initial_alphabet=alphabet, max_token_length=MAX_PIECE_LENGTH, show_progress=False
    )
    encoder.train_from_iterator(_repeated(words, alphabet), trainer)
    vocabulary = encoder.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _repeated(words: Counter, alphabet: list[str]) -> Iterator[str]:
    # The trainer counts words itself and takes no counts. A character outside the alphabet ends a word: the trainer
    # would leave it out and take its neighbours for neighbours.
    rare = re.compile(f"[^{re.escape(''.join(alphabet))}]")
    for word, count in words.items():
        line = rare.sub("\n", word) + "\n"
        for start in range(0, count, _BLOCK):
            yield line * min(_BLOCK, count - start)


def _sentencepiece_encoder(fixed: list[str], pieces: list[str]) -> tokenizers.Tokenizer:
    """Return the tokenizer of these tokens, in this order, with Llama 2's rules."""
    vocabulary = {token: token_id for token_id, token in enumerate([*fixed, *pieces])}
    encoder = tokenizers.Tokenizer(
        models.BPE(vocabulary, _all_merges(pieces), unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    encoder.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    # It changes no id: no piece reaches over it, and the library remembers the ids of short stretches.
    encoder.pre_tokenizer = pre_tokenizers.Split(Regex(f"{MARK}+"), "merged_with_next")
    encoder.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    encoder.add_special_tokens(fixed[: -len(BYTE_TOKENS)])
    return encoder


def _all_merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a piece: sentencepiece merges by the result, not by the pair.

    Runs of marks come last, as in Llama 2: the last mark of a run belongs to the word after it.
    """
    ranked = sorted(pieces, key=lambda piece: not piece.strip(MARK))  # A stable sort: else in the order of learning.
    return ranked_merges({piece: rank for rank, piece in enumerate(ranked)})
