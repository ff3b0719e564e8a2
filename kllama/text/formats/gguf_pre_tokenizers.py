"""What `tokenizer.ggml.pre` of a GGUF file means: the one word that says how a byte-level vocabulary splits a text.

A GGUF file holds no pattern, only the name of one, which llama.cpp's converter finds by comparing ids. A wrong split
gives wrong ids and no error, so only the names stand here whose rules are known for sure. `gguf_vocabulary.py` reads
the table, the GGUF export reads it backwards.
"""

from typing import NamedTuple

from kllama.text.formats.patterns import LLAMA3, QWEN2, TEKKEN
from kllama.text.formats.rules import byte_level, sequence, split


class PreTokenizer(NamedTuple):
    """How a text becomes the stretches that are merged, spelt as in a `tokenizer.json`.

    Attributes:
        pre_tokenizer: the pre-tokenizer, which ends in the one that writes bytes as characters.
        normalizer: the normalizer, `None` for none.
        ignore_merges: whether a stretch that is a token is taken whole, whatever merges give.
        adds_start_token: whether a text begins with the start token in a file that does not say.
    """

    pre_tokenizer: dict
    normalizer: dict | None = None
    ignore_merges: bool = False
    adds_start_token: bool = False


def _split_by(pattern: str) -> dict:
    return sequence([split(pattern), byte_level()], "pretokenizers")


_GPT2 = byte_level(use_regex=True)
_EACH_DIGIT = {"type": "Digits", "individual_digits": True}
_DIGITS = sequence([_EACH_DIGIT, _GPT2], "pretokenizers")
_DEEPSEEK_CODER = sequence(
    [
        split("[\r\n]"),
        split(r"\s?\p{L}+"),
        split(r"\s?\p{P}+"),
        split("[一-龥ࠀ-一가-퟿]+"),
        _EACH_DIGIT,
        byte_level(),
    ],
    "pretokenizers",
)
_LLAMA3 = PreTokenizer(_split_by(LLAMA3), ignore_merges=True, adds_start_token=True)
_QWEN2 = PreTokenizer(_split_by(QWEN2), normalizer={"type": "NFC"})

# Those of the tokenizers that the names are of. llama.cpp does the same but for Qwen2, whose NFC it leaves out.
# "default" is not among them: it is what a converter wrote that did not know the tokenizer.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(_GPT2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": PreTokenizer(_split_by(LLAMA3)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,  # differs in its special tokens alone
    "tekken": PreTokenizer(_split_by(TEKKEN), ignore_merges=True, adds_start_token=True),
    "smollm": PreTokenizer(_DIGITS),
    "starcoder": PreTokenizer(_DIGITS),
    "refact": PreTokenizer(_DIGITS),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
}
"""The rules by name. Of names with the same rules, the first is the one to write."""
