"""Training a tokenizer: what is learned, that text comes back, and that the same texts give the same vocabulary."""

import functools
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import time

import pytest
import tokenizers

from kllama.text.tokenizer_training import BYTE_TOKENS, MARK, train_tokenizer

pytestmark = pytest.mark.backend_independent

WAYS = [("byte_bpe", {}), ("byte_bpe", {"pattern": "gpt2"}), ("sentencepiece_bpe", {})]
TEXTS = [
    "Once upon a time, in 1984, there was a little café.\n\nIt didn't   open; <s>it stayed</s> shut!",
    "日本語のテキスト。 Ελληνικά and हिन्दी, 😀😀 (twice),\tand    code:\n    def f(x):\n        return x**2",
    "Once more: there was, there was, there was. It stayed shut! 2024-01-01 and 12345",
]
ALPHABET = "aeothrsinw .,'()1203\n\t\u00a0\u200bé日語Ελहि😀�\x00<>/s▁" + " " * 8


@functools.cache
def trained(kind, pattern=None) -> tokenizers.Tokenizer:
    encoder = train_tokenizer(iter(TEXTS * 3), 400, kind, pattern=pattern)
    encoder.encode_special_tokens = True  # as LlamaTokenizer has it
    return encoder


def in_order(encoder) -> list[str]:
    vocabulary = encoder.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


@pytest.mark.parametrize(("kind", "options"), WAYS)
def test_text_comes_back(kind, options):
    encoder, rng = trained(kind, **options), random.Random(1)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 30))) for _ in range(2000)]
    for text in [*TEXTS, "", " ", "<s>", "</s> <unk><0x41>", *texts]:
        ids = encoder.encode(text, add_special_tokens=False).ids
        expected = text if kind == "byte_bpe" else text.replace(MARK, " ")
        assert encoder.decode(ids, skip_special_tokens=False) == expected
        assert not set(ids) & set(encoder.get_added_tokens_decoder())


@pytest.mark.parametrize(("kind", "options"), WAYS)
def test_the_vocabulary_has_the_size_asked_for(kind, options):
    for size in (260, 261, 300, 350):
        encoder = train_tokenizer(TEXTS, size, kind, **options)
        assert sorted(encoder.get_vocab().values()) == list(range(size))


def test_ids_of_bytes():
    tokens = in_order(trained("byte_bpe"))
    assert tokens[:2] == ["<s>", "</s>"]
    assert set(tokens[2:258]) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    other = train_tokenizer(TEXTS, 300, special_tokens=["<|end|>"])
    assert in_order(other)[0] == "<|end|>" and len(other.get_added_tokens_decoder()) == 1


def test_ids_of_sentencepiece():
    encoder = trained("sentencepiece_bpe")
    tokens = in_order(encoder)
    assert tokens[:259] == ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
    assert [token.content for token in encoder.get_added_tokens_decoder().values()] == ["<unk>", "<s>", "</s>"]
    assert in_order(train_tokenizer(TEXTS, 300, "sentencepiece_bpe", special_tokens=["<|end|>"]))[1] == "<|end|>"


def test_pieces_of_sentencepiece_stay_within_a_word():
    pieces = in_order(trained("sentencepiece_bpe"))[259:]
    assert {"▁Once", "▁there", "(", "4", "▁▁", "日", "の"} <= set(pieces)
    # A mark stands at the start, or there are only marks; digits stand alone; letters and signs do not mix.
    word = re.compile(r"▁+|\d|▁?([^\W\d_]|[\u0900-\u097f])+|▁?[^\w▁\s]+|\s")
    assert not [piece for piece in pieces if not word.fullmatch(piece) or len(piece) > 16]
    assert not [piece for piece in pieces if "\n" in piece or "\t" in piece]


@pytest.mark.parametrize(("pattern", "digits"), [("llama3", ["123", "456"]), ("gpt2", ["123456"])])
def test_pieces_of_bytes_stay_within_a_word(pattern, digits):
    encoder = trained("byte_bpe", pattern)
    words = [word for text in TEXTS for word, _ in encoder.pre_tokenizer.pre_tokenize_str(text)]
    assert not [piece for piece in in_order(encoder)[258:] if not any(piece in word for word in words)]
    size = 258 + sum(len(token) - 1 for token in digits)
    assert train_tokenizer(["123456"] * 2, size, pattern=pattern).encode("123456").tokens == digits


def test_a_run_of_spaces_leaves_its_last_to_the_word():
    encode = trained("sentencepiece_bpe").encode
    assert encode("   there", add_special_tokens=False).tokens == ["▁▁▁", "▁there"]


def test_the_split_of_sentencepiece_changes_no_id():
    encoder, rng = trained("sentencepiece_bpe"), random.Random(2)
    whole = tokenizers.Tokenizer.from_str(json.dumps(json.loads(encoder.to_str()) | {"pre_tokenizer": None}))
    whole.encode_special_tokens = True
    for text in [*TEXTS, *("".join(rng.choices(ALPHABET, k=rng.randint(0, 30))) for _ in range(2000))]:
        assert encoder.encode(text, add_special_tokens=False).ids == whole.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece_bpe"])
def test_special_tokens_in_texts_are_not_learned(kind):
    encoder = train_tokenizer(["a <s>b</s> c<s>b</s>"] * 9 + ["abcdefghij klmnop"], 266, kind)
    encoder.encode_special_tokens = True
    assert "<s>" not in encoder.encode("<s>b</s>", add_special_tokens=False).tokens
    assert not [token for token in in_order(encoder)[258:] if "<s" in token]


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece_bpe"])
def test_too_small_a_text_names_the_size_that_works(kind):
    for text in ("", "hello hello", TEXTS[1]):
        with pytest.raises(ValueError, match=r"^vocabulary_size = 9999; expected at most (\d+)") as error:
            train_tokenizer([text], 9999, kind)
        size = int(re.search(r"pass (\d+)", str(error.value))[1])
        assert train_tokenizer([text], size, kind).get_vocab_size() == size


def test_special_tokens_that_look_like_words_are_not_learned():
    encoder = train_tokenizer(["xPAD xPAD PADx PxAxD"] * 9, 265, "sentencepiece_bpe", special_tokens=["PAD"])
    encoder.encode_special_tokens = True
    assert "PAD" not in encoder.encode("xPAD", add_special_tokens=False).tokens


def test_pieces_of_sentencepiece_have_at_most_16_characters():
    fixed, characters, merges = 259, 14, 21  # As many merges as make the whole word one piece.
    with pytest.raises(ValueError, match="expected at most"):
        train_tokenizer(["incomprehensibilities"] * 3, fixed + characters + merges, "sentencepiece_bpe")


def test_rare_characters_are_bytes():
    encoder = train_tokenizer(["the cat sat. " * 5000 + "Ω"], 275, "sentencepiece_bpe")
    assert "Ω" not in encoder.get_vocab()
    assert encoder.decode(encoder.encode("cat Ω", add_special_tokens=False).ids) == "cat Ω"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("one text", 300), TypeError, "texts = 'one text'"),
        ((None, 300), TypeError, "texts = None"),
        ((["a", "b", 3], 300), TypeError, r"texts\[2\] = 3 \(int\)"),
        ((["a", b"b"], 300, "sentencepiece_bpe"), TypeError, r"texts\[1\] = b'b'"),
        ((["a"], 257), ValueError, "vocabulary_size = 257; expected at least 258"),
        ((["a"], 259, "sentencepiece_bpe"), ValueError, "vocabulary_size = 259; expected at least 260"),
        ((["a"], 10**12), ValueError, "vocabulary_size = 1000000000000; expected at most 4194304"),
        ((["a"], 300.0), TypeError, "vocabulary_size = 300.0"),
        ((["a"], True), TypeError, "vocabulary_size = True"),
        ((["a"], 300, "unigram"), ValueError, "kind = 'unigram'"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        train_tokenizer(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"special_tokens": "<s>"}, TypeError, "special_tokens = '<s>'"),
        ({"special_tokens": ["<s>", 1]}, TypeError, "special_tokens has 1"),
        ({"special_tokens": ["<s>", "<s>"]}, ValueError, "special_tokens has '<s>'"),
        ({"special_tokens": ["a"]}, ValueError, "special_tokens has 'a'"),
        ({"special_tokens": ["\ud800x"]}, ValueError, "special_tokens has '.*ud800x'; expected text without"),
        ({"special_tokens": ["<unk>"]}, ValueError, "special_tokens has '<unk>'"),
        ({"special_tokens": ["<0x41>"]}, ValueError, "special_tokens has '<0x41>'"),
        ({"special_tokens": ["Ã©"]}, ValueError, "special_tokens has 'Ã©', which is also how"),
        ({"pattern": "llama2"}, ValueError, "pattern = 'llama2'"),
        ({"pattern": "gpt2", "kind": "sentencepiece_bpe"}, ValueError, "pattern = 'gpt2' with kind"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        train_tokenizer(["café é é"] * 3, 258, **options)


def test_lone_surrogates_are_replaced():
    encoder = train_tokenizer(["a\ud800b"] * 5, 260)
    assert encoder.get_vocab() == train_tokenizer(["a\ufffdb"] * 5, 260).get_vocab()


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece_bpe"])
def test_the_work_for_a_long_word_is_linear(kind):
    # As one word it takes twenty seconds.
    text = "".join(random.Random(1).choices("abcdefghij", k=400_000))
    start = time.monotonic()
    encoder = train_tokenizer([text], 320, kind)
    assert time.monotonic() - start < 5
    assert encoder.decode(encoder.encode(text[:5000], add_special_tokens=False).ids) == text[:5000]


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece_bpe"])
def test_the_iterator_is_read_once_and_its_errors_come_through(kind):
    def read():
        yield "abc"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_tokenizer(read(), 260, kind)


PROGRAM = """
import hashlib, sys
from kllama.text.tokenizer_training import train_tokenizer
texts = [line for line in open(sys.argv[1], encoding="utf-8")][:1500]
for kind in ("byte_bpe", "sentencepiece_bpe"):
    print(hashlib.sha256(train_tokenizer(texts, 2000, kind).to_str().encode()).hexdigest())
"""


def test_the_same_texts_give_the_same_vocabulary_in_every_process(assets):
    path = assets / "text" / "tinystories_1mb.txt"
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path)],
            env=os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "KERAS_BACKEND": "jax"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed, threads in (("1", "1"), ("2", "5"))  # This process is the third.
    ]
    outputs = [program.communicate(timeout=120)[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0]
    texts = path.read_text(encoding="utf-8").splitlines(keepends=True)[:1500]
    here = [train_tokenizer(texts, 2000, kind).to_str() for kind in ("byte_bpe", "sentencepiece_bpe")]
    expected = [hashlib.sha256(text.encode()).hexdigest() for text in here]
    assert [output.split() for output in outputs] == [expected] * 2


@pytest.mark.parametrize("size", [1000, 4000])
def test_compression_is_that_of_sentencepiece(assets, size):
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = (assets / "text" / "tinystories_1mb.txt").read_text(encoding="utf-8").splitlines()
    training, held_out = [line for row, line in enumerate(lines) if row % 10 and line], lines[::10]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.99995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    encoder = train_tokenizer(training, size, "sentencepiece_bpe")
    num_tokens = sum(len(encoding.ids) for encoding in encoder.encode_batch_fast(held_out, add_special_tokens=False))
    assert num_tokens < 1.03 * sum(map(len, reference.encode(held_out)))
