"""Apply `legacy` and `add_prefix_space` to the rules of a vocabulary, whatever file they came from.

Both ask where a text gets the mark of a word start that it does not spell. A mark is put by a normalizer (`Prepend`:
every stretch of text between special tokens is a sentence of its own, as SentencePiece sees it) or by a pre-tokenizer
(`Metaspace`: only the text as a whole, and only if it does not begin with a space). Byte-level vocabularies know
`add_prefix_space` alone. The readers call this file.
"""

from typing import NamedTuple

from kllama.text.formats.rules import flat, replace, sequence, strip_start


class _Mark(NamedTuple):
    """How rules put the mark of a word start."""

    character: str
    scheme: str  # of Metaspace: "always", "first" or "never"; "sentence" is Prepend, "none" is its absence


def with_options(rules: dict, legacy: bool | None, add_prefix_space: bool | None, source: object) -> dict:
    """Return rules that put the mark of a word start as asked. To ask twice changes nothing.

    Args:
        rules: JSON of the parts of an encoder, in the library's own spelling.
        legacy: `True` puts the mark before every stretch between special tokens, `False` before the text only, `None`
            leaves that to the rules.
        add_prefix_space: whether there is a mark at all, `None` leaves that to the rules.
        source: the file, for the message.

    Raises:
        TypeError: an option is not a bool.
        ValueError: the rules have nothing that an option could change.
    """
    for name, value in (("legacy", legacy), ("add_prefix_space", add_prefix_space)):
        if not isinstance(value, bool | None):
            raise TypeError(f"{name} = {value!r}; expected True, False or None.")
    if legacy is None and add_prefix_space is None:
        return rules
    mark = _find_mark(rules)
    if mark is not None:
        wanted = _Mark(mark.character, _wanted_scheme(mark.scheme, legacy, add_prefix_space))
        return rules if wanted == mark else _with_mark(rules, mark, wanted)
    if legacy is not None:
        raise ValueError(f"legacy = {legacy}; expected None: the rules of {source} put no mark of a word start.")
    return _with_byte_level(rules, add_prefix_space, source)


def _find_mark(rules: dict) -> _Mark | None:
    for part in flat(rules["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Metaspace":
            return _Mark(part["replacement"], part["prepend_scheme"])
    normalizers = flat(rules["normalizer"], "normalizers")
    prepended = [part["prepend"] for part in normalizers if part["type"] == "Prepend"]
    for part in normalizers:
        if part["type"] == "Replace" and part["pattern"] == {"String": " "} and len(part["content"]) == 1:
            return _Mark(part["content"], "sentence" if part["content"] in prepended else "none")
    return _Mark(" ", "sentence") if " " in prepended else None


def _wanted_scheme(scheme: str, legacy: bool | None, add_prefix_space: bool | None) -> str:
    by_sentence = scheme in ("sentence", "none") if legacy is None else legacy
    adds = scheme not in ("never", "none") if add_prefix_space is None else add_prefix_space
    if by_sentence:
        return "sentence" if adds else "none"
    if not adds:
        return "never"
    return "always" if scheme == "always" and legacy is None else "first"


def _with_mark(rules: dict, mark: _Mark, wanted: _Mark) -> dict:
    return {
        **rules,
        "normalizer": sequence(_normalizers(rules, mark, wanted), "normalizers"),
        "pre_tokenizer": sequence(_pre_tokenizers(rules, mark, wanted), "pretokenizers"),
        "decoder": sequence(_decoders(rules, wanted), "decoders"),
    }


def _normalizers(rules: dict, mark: _Mark, wanted: _Mark) -> list[dict]:
    """Take the parts that put the old mark out, and put those of the new one at the place of the first."""
    prepend = {"type": "Prepend", "prepend": mark.character}
    escape = replace({"String": " "}, mark.character)
    parts = flat(rules["normalizer"], "normalizers")
    place = next((place for place, part in enumerate(parts) if part in (prepend, escape)), len(parts))
    new = {"sentence": [prepend, escape], "none": [escape]}.get(wanted.scheme, [])
    return [*parts[:place], *new, *(part for part in parts[place:] if part not in (prepend, escape))]


def _pre_tokenizers(rules: dict, mark: _Mark, wanted: _Mark) -> list[dict]:
    parts = flat(rules["pre_tokenizer"], "pretokenizers")
    old = next((part for part in parts if part["type"] == "Metaspace"), None)
    if wanted.scheme not in ("sentence", "none"):
        new = {"type": "Metaspace", "replacement": mark.character, "split": bool(old and old["split"])}
        new["prepend_scheme"] = wanted.scheme
        return [new, *parts] if old is None else [new if part is old else part for part in parts]
    if old is None:
        return parts
    at_marks = {"type": "Split", "pattern": {"String": mark.character}, "behavior": "MergedWithNext", "invert": False}
    new = [at_marks] if old["split"] else []
    return [item for part in parts for item in (new if part is old else [part])]


def _decoders(rules: dict, wanted: _Mark) -> list[dict]:
    """Let the decoder take one leading space away if, and only if, a mark was put there."""
    adds = wanted.scheme not in ("never", "none")
    parts = flat(rules["decoder"], "decoders")
    scheme = {"sentence": "always", "none": "never"}.get(wanted.scheme, wanted.scheme)
    parts = [{**part, "prepend_scheme": scheme} if part["type"] == "Metaspace" else part for part in parts]
    strip = strip_start()
    strips = any(part["type"] == "Metaspace" or (part["type"] == "Strip" and part["start"]) for part in parts)
    if adds:
        return parts if strips or not parts else [*parts, strip]
    return [part for part in parts if part != strip]


def _with_byte_level(rules: dict, add_prefix_space: bool, source: object) -> dict:
    parts = flat(rules["pre_tokenizer"], "pretokenizers")
    levels = [part for part in parts if part["type"] == "ByteLevel"]
    # A later one would put a space before every word that an earlier pre-tokenizer has split off.
    if not levels or (add_prefix_space and parts[0] is not levels[0]):
        raise ValueError(
            f"add_prefix_space = {add_prefix_space}; expected None{' or False' if levels else ''}: the rules of "
            f"{source} have no place for such a space."
        )
    if all(part["add_prefix_space"] == (add_prefix_space and part is parts[0]) for part in levels):
        return rules
    parts = [
        {**part, "add_prefix_space": add_prefix_space and part is parts[0]} if part in levels else part
        for part in parts
    ]
    return {**rules, "pre_tokenizer": sequence(parts, "pretokenizers")}
