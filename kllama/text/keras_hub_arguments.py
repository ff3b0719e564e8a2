"""KerasHub's spelling of the tokenizer's arguments, translated to kllama's.

KerasHub has one class for SentencePiece (`proto`) and one for Llama 3 (`vocabulary` and `merges`); kllama has one class
for both, which takes their keywords. Nothing is read here, and nothing of what callers pass is changed.
`LlamaTokenizer` calls it.
"""

import reprlib
from collections.abc import Collection, Mapping
from typing import NamedTuple

from kllama.text.formats.vocab_and_merges import LLAMA3_END, LLAMA3_START, VocabularyAndMerges

# The arguments that hold a vocabulary, or name the file of one.
SOURCES = ("tokenizer", "proto", "vocabulary", "merges")
# KerasHub's name of a token, and kllama's.
_TOKENS = {"bos_token": "start_token", "eos_token": "end_token"}
# What KerasHub's tokenizers do, and kllama's leaves to others: the value that asks for nothing, and where it is done.
_DONE_ELSEWHERE = {
    "sequence_length": (None, "Pass sequence_length to the preprocessor, which cuts and pads."),
    "add_bos": (False, "Pass add_start_token=True to the preprocessor."),
    "add_eos": (False, "Pass add_end_token=True to the preprocessor."),
    "unsplittable_tokens": (
        None,
        "Pass parse_special=True, so that special tokens spelt in a text are found there, or call add_tokens().",
    ),
}


class TokenizerArguments(NamedTuple):
    """What KerasHub's spelling comes to.

    Attributes:
        source: what `open_vocabulary` takes, or None.
        start_token: a str, an id, `None`, or `"auto"`.
        end_token: the same.
        others: the keywords that are not KerasHub's.
    """

    source: object
    start_token: str | int | None
    end_token: str | int | None
    others: dict


def translate(tokenizer, merges, start_token, end_token, keywords: Mapping) -> TokenizerArguments:
    """Translate the arguments of a tokenizer.

    Args:
        tokenizer: the first argument: the vocabulary.
        merges: the second one: None, or what makes the first one the vocabulary of KerasHub's Llama 3 tokenizer.
        start_token: `"auto"` if it is not given.
        end_token: the same.
        keywords: all other keywords that the constructor does not know itself.

    Raises:
        ValueError: two arguments contradict each other, or one lacks another or has no place here.
    """
    named = with_own_names({"start_token": start_token, "end_token": end_token, **keywords})
    start_token, end_token = named.pop("start_token"), named.pop("end_token")
    special = named.pop("misc_special_tokens", None)
    sources = {"tokenizer": tokenizer, "proto": named.pop("proto", None), "vocabulary": named.pop("vocabulary", None)}
    sources = {name: source for name, source in sources.items() if source is not None}
    _refuse_what_is_done_elsewhere(named)
    _check_sources(list(sources), merges, special)
    source = next(iter(sources.values()), None)
    if merges is not None:
        start_token, end_token = _unless_given(start_token, LLAMA3_START), _unless_given(end_token, LLAMA3_END)
        begins_with = start_token if isinstance(start_token, str) else None
        source = VocabularyAndMerges(source, merges, begins_with, _as_tokens(special))
    elif "proto" in sources:  # KerasHub's class has these two, and refuses a model without them.
        start_token, end_token = _unless_given(start_token, "<s>"), _unless_given(end_token, "</s>")
    return TokenizerArguments(source, start_token, end_token, named)


def with_own_names(keywords: Mapping) -> dict:
    """Return keywords with `bos_token` and `eos_token` called as kllama calls them.

    Raises:
        ValueError: a token is given under both names, and they differ.
    """
    named = dict(keywords)
    for theirs, ours in _TOKENS.items():
        if theirs not in named:
            continue
        token = named.pop(theirs)
        if named.get(ours, "auto") not in ("auto", token):
            raise ValueError(f"{theirs} = {token!r} and {ours} = {named[ours]!r}; expected one of the two.")
        named[ours] = token
    return named


def _unless_given(token, default: str):
    return default if token == "auto" else token


def _refuse_what_is_done_elsewhere(named: dict) -> None:
    for name, (nothing, advice) in _DONE_ELSEWHERE.items():
        value = named.pop(name, nothing)
        if value is not nothing:
            raise ValueError(f"{name} = {reprlib.repr(value)}; expected {nothing}. {advice}")


def _check_sources(names: list[str], merges, special) -> None:
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are both given; expected one vocabulary.")
    if merges is not None and not names:
        raise ValueError("merges without vocabulary; expected both.")
    if merges is not None and names == ["proto"]:
        raise ValueError("proto and merges are both given; expected one of them: a SentencePiece model has its own.")
    if merges is None and names == ["vocabulary"]:
        raise ValueError("vocabulary without merges; expected both, merges=[] for a vocabulary that has none.")
    if merges is None and special is not None:
        raise ValueError(
            f"misc_special_tokens = {reprlib.repr(special)} without vocabulary and merges; expected them together. Any "
            "other vocabulary names its special tokens itself, and add_tokens(special=True) adds some."
        )


def _as_tokens(special) -> tuple[str, ...]:
    if special is None:
        return ()
    if isinstance(special, str) or not isinstance(special, Collection):
        raise TypeError(f"misc_special_tokens = {reprlib.repr(special)}; expected a set or a list of str.")
    if wrong := [token for token in special if not isinstance(token, str)]:
        raise TypeError(f"misc_special_tokens has {reprlib.repr(wrong[0])}; expected a str.")
    return tuple(special)
