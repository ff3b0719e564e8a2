"""Which regular expressions a tokenizer file may have."""

import json
import time

import pytest
import tokenizers

from kllama.errors import UnsupportedError
from kllama.text.formats.patterns import GPT2, KNOWN, LLAMA3, QWEN2, check_patterns, refusal
from kllama.text.formats.recognise import open_vocabulary
from kllama.text.formats.rules import split

pytestmark = pytest.mark.backend_independent

HOSTILE = [
    "(a+)+$",
    "(a|a)*",
    "(.*)*x",
    r"(a)\1",
    r"(?<n>a)\k<n>",
    r"(?<n>a\g<n>?)",
    "(?R)",
    "(?~ab)",
    "(*FAIL)",
    "(?x)a #",
    "((a?)b)*",
    "(?:a{1,3}){2,}",
    "(a?){9}",
    "a**",
    "a{2}+",
    "a+{3}",
    ".*.*.*.*x",
    "(?=.*.*)(?=.*.*)x",
    "a?" * 13 + "b",
    "(?:a|a)" * 13 + "b",
    "a{1000}",
    "a{1,99999999999}",
    "(" * 40 + "a" + ")" * 40,
    "[]a]+",
    "a+" + "b" * 1024,
    "|".join(["abcdefg"] * 5000),
    "(",
    ")",
    "[a",
    "a\\",
    "*a",
]
HARMLESS = [
    "",
    r"\u2581+".replace(r"\u2581", "\u2581"),
    r"\d{1,3}(?=(?:\d{3})\b)",
    "(?:abc)+x?",
    r"[^\]\[x]+|[a-z&&[^b]]*",
    "(?i:a|b)?c++",
    r"\A<(?=(?:s>|/s>)\z)",
    "|".join(f"word{n}" for n in range(1000)),
    r"\p{L}+\p{^Lu}*\x{1F600}?",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile(pattern):
    with pytest.raises(UnsupportedError, match="file: pattern = .*; expected the pattern of a known tokenizer"):
        check_patterns({"pre_tokenizer": {"pretokenizers": [split(pattern)]}}, "file")


@pytest.mark.parametrize("pattern", [*sorted(KNOWN), *HARMLESS])
def test_harmless(pattern):
    check_patterns([split(pattern)], "file")
    tokenizers.Regex(pattern)


def test_those_of_the_families_are_known():
    assert {GPT2, LLAMA3, QWEN2} <= KNOWN and r"\p{N}{1,3}|" in LLAMA3 and r"\p{N}|" in QWEN2


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, QWEN2, *HARMLESS])
def test_accepted_patterns_end(pattern):
    pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") if pattern else None
    start = time.perf_counter()
    for text in ("a" * 20_000 + "!", " " * 20_000 + "x", "ab " * 7000, "1" * 20_000):
        if pre_tokenizer:
            pre_tokenizer.pre_tokenize_str(text)
    assert time.perf_counter() - start < 10


def placed(place: str, pattern: str) -> dict:
    replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}
    nested = {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [replace]}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(pattern)]},
        "decoder": {"type": "Sequence", "decoders": [replace]},
    }
    return {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, place: nested[place]}


@pytest.mark.parametrize("place", ["normalizer", "pre_tokenizer", "decoder"])
def test_every_place(place):
    assert open_vocabulary(placed(place, "a+")).encoder.get_vocab_size() == 1
    content = placed(place, "(a+)+$")
    with pytest.raises(UnsupportedError, match="repeats a group"):
        open_vocabulary(content)
    with pytest.raises(UnsupportedError, match="repeats a group"):
        open_vocabulary(tokenizers.Tokenizer.from_str(json.dumps(content)))


def test_reasons():
    assert refusal("a+") is None and "character 0" in refusal("*a") and r"\1" in refusal(r"(a)\1")
