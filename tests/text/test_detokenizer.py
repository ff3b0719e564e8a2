"""The streaming detokenizer against the tokenizers library's own decoding of all ids at once."""

import functools
import os
import random
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders

from kllama.text.detokenizer import StreamingDetokenizer

pytestmark = pytest.mark.backend_independent

BYTE_LEVEL = ["tokenizers/llama3_2", "tokenizers/gpt2", "models/smollm2-135m-instruct"]
BYTE_FALLBACK = ["models/stories15M", "models/stories260K"]
NUM_SEQUENCES = 2000
TEXTS = [
    " Once upon a time,  there\n\n was",
    "naïve café, 日本語 のテキスト, Ελληνικά, हिन्दी",
    "👩‍👩‍👧 🇩🇪 😀 ﷽ \u200bé e\u0301",
    "   <s> </s><|eot_id|> <0x41> Ġ ▁ ▁▁x",
    # Last, as one test leaves it out: three bytes that make U+FFFD give one where they are text and three where not.
    "é � x",
]
# What may follow: nothing, text, bytes that are not UTF-8 after any others, and every way to go on with a character.
CONTINUATIONS = [[], [0x41], [0xC3, 0xC3]] + [[a, 0x80, 0x80][:n] for a in range(0x80, 0xC0) for n in (1, 2, 3)]


@functools.cache
def opened(assets, folder) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(assets / folder / "tokenizer.json"))


@functools.cache
def byte_ids(encoder) -> dict[int, int]:
    """The ids of the tokens of a single byte, by the byte."""
    tokens = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    if encoder.token_to_id(tokens[0]) is None:
        text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 64), *range(0x10000, 0x110000, 4096)]))
        [(characters, _)] = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
        tokens = dict(zip(text.encode(), characters, strict=True))
    ids = {byte: encoder.token_to_id(token) for byte, token in tokens.items()}
    return {byte: token_id for byte, token_id in ids.items() if token_id is not None}


def random_ids(encoder, rng, texts=TEXTS) -> list[int]:
    """Any ids, with many special and byte tokens among them, and a cut from the middle of a text."""
    special, single = list(encoder.get_added_tokens_decoder()), list(byte_ids(encoder).values())
    ids = []
    for _ in range(rng.randint(0, 6)):
        kind = rng.choice(("special", "bytes", "any", "text"))
        text = encoder.encode(rng.choice(texts), add_special_tokens=False).ids if kind == "text" else []
        start = rng.randint(0, len(text))
        ids += {
            "special": rng.choices(special, k=1),
            "bytes": rng.choices(single, k=rng.randint(1, 6)),
            "any": [rng.randrange(encoder.get_vocab_size()) for _ in range(rng.randint(1, 4))],
            "text": text[start : start + rng.randint(1, 12)],
        }[kind]
    return ids


def pieces(encoder, ids, **kwargs) -> list[str]:
    detokenizer = StreamingDetokenizer(encoder, **kwargs)
    return [*(detokenizer.add(token_id) for token_id in ids), detokenizer.finish()]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("folder", BYTE_LEVEL + BYTE_FALLBACK)
def test_pieces_join_to_the_whole(assets, folder, skip):
    encoder, rng = opened(assets, folder), random.Random(1)
    for _ in range(NUM_SEQUENCES):
        ids = random_ids(encoder, rng)
        streamed = "".join(pieces(encoder, ids, skip_special_tokens=skip))
        assert streamed == encoder.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize("folder", BYTE_LEVEL + BYTE_FALLBACK)
def test_text_comes_as_soon_as_nothing_can_change_it(assets, folder):
    """The text so far is the longest common prefix of the whole texts of all that may follow."""
    encoder, rng = opened(assets, folder), random.Random(2)
    of_byte = byte_ids(encoder)
    continuations = [[of_byte[byte] for byte in ending if byte in of_byte] for ending in CONTINUATIONS]
    word = encoder.encode("a", add_special_tokens=False).ids
    detokenizer = StreamingDetokenizer(encoder)
    for _ in range(40):
        text, ids = "", []
        for token_id in random_ids(encoder, rng, TEXTS[:-1]):
            text += detokenizer.add(token_id)
            ids.append(token_id)
            rows = [ids + ending + tail for ending in continuations for tail in ([], word)]
            assert text == os.path.commonprefix(encoder.decode_batch(rows, skip_special_tokens=False)), ids
        assert text + detokenizer.finish() == encoder.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["▁a", "▁b"], ["a", " b", ""]),
        (["▁", "▁", "a"], ["", " ", "a", ""]),
        (["<0xE2>", "<0x82>", "<0xAC>", "a"], ["", "", "", "€a", ""]),
        (["<0xE2>", "<0x82>"], ["", "", "\ufffd\ufffd"]),
        (["<0xE2>", "a"], ["", "\ufffda", ""]),
        # Whatever follows, this run is no longer UTF-8: nothing is held back.
        (["<0x41>", "<0xFF>", "<0x41>", "a"], ["", "\ufffd\ufffd", "\ufffd", "a", ""]),
    ],
)
def test_runs_of_byte_tokens(tokens, expected):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    encoder, ids = tiny(tokens, decoders.Sequence(steps))
    assert pieces(encoder, ids) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["Ġa", "âĤ", "¬", "b"], [" a", "", "€", "b", ""]),
        (["âĤ"], ["", "\ufffd"]),
        (["âĤ", "b"], ["", "\ufffdb", ""]),
        # Not all of its characters stand for bytes: the token is text, and U+00E9 no byte in it.
        (["日é", "é"], ["日é", "", "\ufffd"]),
    ],
)
def test_byte_level(tokens, expected):
    encoder, ids = tiny(tokens, decoders.ByteLevel())
    assert pieces(encoder, ids) == expected


def tiny(tokens, decoder) -> tuple[tokenizers.Tokenizer, list[int]]:
    """A tokenizer of these tokens, and their ids."""
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    if decoder is not None:
        encoder.decoder = decoder
    return encoder, [vocabulary[token] for token in tokens]


DECODERS = {
    "none": None,
    "empty": decoders.Sequence([]),
    "metaspace": decoders.Metaspace(),
    "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
    "regex": decoders.Sequence([decoders.Replace(Regex("[▁x]+"), " "), decoders.Strip(" ", 1, 0)]),
    "bytes_alone": decoders.ByteFallback(),
    "strip_two": decoders.Sequence([decoders.Sequence([decoders.Fuse()]), decoders.Strip("▁", 2, 0)]),
    "bytes_then_strip": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip("A", 1, 0)]),
    # Of these it is not known when their text is final.
    "strip_end": decoders.Sequence([decoders.Fuse(), decoders.Strip("▁", 0, 1)]),
    "replace_fused": decoders.Sequence([decoders.Fuse(), decoders.Replace("▁▁", "+")]),
    "wordpiece": decoders.WordPiece(prefix="▁"),
    "ctc": decoders.CTC(pad_token="a"),
    "suffix": decoders.BPEDecoder(suffix="▁"),
}
HELD_BACK = ("strip_end", "replace_fused", "wordpiece", "ctc", "suffix")


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_gives_the_whole(name):
    tokens = ["a", "▁a", "▁", "▁▁", "x▁x", "<0x41>", "<0x+A>", "<0xE2>", "<0x82>", "<0xAC>", "<0xZZ>", "b▁"]
    encoder, _ = tiny(tokens, DECODERS[name])
    rng, early = random.Random(3), ""
    for _ in range(300):
        ids = [rng.randrange(len(tokens)) for _ in range(rng.randint(1, 8))]
        *before, last = pieces(encoder, ids)
        assert "".join(before) + last == encoder.decode(ids, skip_special_tokens=False), ids
        early += "".join(before)
    assert (early == "") == (name in HELD_BACK)


@pytest.mark.parametrize("kind", ["words", "bytes"])
@pytest.mark.parametrize("folder", ["tokenizers/gpt2", "models/stories15M"])
def test_the_work_for_an_id_does_not_grow(assets, folder, kind):
    encoder, rng = opened(assets, folder), random.Random(4)
    single = byte_ids(encoder)
    ids = [single[0x41]] * 4000 if kind == "bytes" else [rng.randrange(encoder.get_vocab_size()) for _ in range(4000)]
    assert num_calls(encoder, ids) < 2.1 * num_calls(encoder, ids[:2000])


def num_calls(encoder, ids) -> int:
    """The number of calls, of Python and of C, that streaming takes. No call may be given more than one id's text."""
    detokenizer, calls = StreamingDetokenizer(encoder), 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")
        assert getattr(argument, "__qualname__", "") not in ("Tokenizer.decode", "Tokenizer.decode_batch")

    sys.setprofile(count)
    try:
        for token_id in ids:
            detokenizer.add(token_id)
    finally:
        sys.setprofile(None)
    return calls


def test_finish_begins_a_new_text():
    encoder, ids = tiny(["▁a", "▁b"], decoders.Metaspace())
    detokenizer = StreamingDetokenizer(encoder)
    for _ in range(2):
        assert detokenizer.add(ids[1]) + detokenizer.add(np.int32(ids[0])) + detokenizer.finish() == "b a"


def test_literal_tokens_are_text_as_they_are_spelt():
    encoder, _ = tiny(["Ġa", "âĤ", "¬"], decoders.ByteLevel())
    encoder.add_tokens(["é"])
    encoder.add_special_tokens(["à"])
    options = {"literal_ids": {3, 4}}
    assert pieces(encoder, [0, 3, 1, 2], **options) == [" a", "é", "", "€", ""]
    # A character does not go on behind a literal token: what there is of it is lost.
    assert pieces(encoder, [1, 4, 2, 3], **options) == ["", "\ufffdà", "\ufffd", "é", ""]
    assert pieces(encoder, [1, 4, 2], skip_special_tokens=True, **options) == ["", "", "€", ""]


def test_special_tokens_are_skipped_by_their_text():
    encoder, ids = tiny(["▁a", "▁b"], decoders.Metaspace())
    encoder.add_special_tokens(["▁a", "<s>"])
    encoder.add_tokens(["<kept>"])
    ids = [encoder.token_to_id(token) for token in ("<s>", "▁a", "▁b", "<kept>", "▁b")]
    assert "".join(pieces(encoder, ids, skip_special_tokens=True)) == "b<kept> b" == encoder.decode(ids)


@pytest.mark.parametrize(
    ("token_id", "error"),
    [(2, ValueError), (-1, ValueError), (2**40, ValueError), (0.0, TypeError), ("a", TypeError), (True, TypeError)],
)
def test_what_is_not_an_id_is_refused(token_id, error):
    encoder, _ = tiny(["a", "b"], None)
    with pytest.raises(error, match="^id = "):
        StreamingDetokenizer(encoder).add(token_id)
