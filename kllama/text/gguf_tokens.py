"""A tokenizer as the keys of a GGUF file, from which llama.cpp makes the ids that kllama makes.

llama.cpp has two tokenizers for Llamas. "llama" is SentencePiece's, see `gguf_pieces.py`. "gpt2" applies a list of
merges to the stretches that a named pattern cuts out of a text. A vocabulary that neither can run is refused; where
only some texts get other ids there, a warning says which. The export of models calls it. It writes no file.
"""

import json
import re
import warnings
from collections.abc import Iterable

import tokenizers

from kllama.checkpoints.files.reader import listed
from kllama.errors import UnsupportedError
from kllama.text.chat.template import BUILT_IN, FOLDER
from kllama.text.formats.gguf_pre_tokenizers import PRE_TOKENIZERS
from kllama.text.formats.patterns import GPT2
from kllama.text.formats.rules import byte_level, flat, read_rules, split
from kllama.text.gguf_pieces import BYTES, TokenType, cannot_run, sentencepiece_keys
from kllama.text.tokenizer import LlamaTokenizer

_MOST_STOPS = 3
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def gguf_tokens(
    tokenizer: LlamaTokenizer, num_rows: int, add_start_token: bool, stop_token_ids: Iterable[int] = ()
) -> dict[str, object]:
    """Give the keys and values that describe a tokenizer in a GGUF file.

    Args:
        tokenizer: with at most as many tokens as the model has rows.
        num_rows: rows of the model's embedding table. Those beyond the vocabulary get names that no text spells.
        add_start_token: whether a text begins with the start token. No end token is put after a text: llama.cpp would
            put it after prompts.
        stop_token_ids: what ends a generated text besides the end token; a GGUF file has room for two of them.

    Returns:
        Values by key: str, bool, int, and lists of str, of int or of float.

    Raises:
        UnsupportedError: a vocabulary whose ids llama.cpp cannot make.
    """
    encoder = tokenizer._loaded().encoder
    model, rules = json.loads(encoder.to_str())["model"], read_rules(encoder)
    if model["type"] != "BPE" or any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise cannot_run("model", model["type"], "byte-pair encoding without marks at the ends of words")
    tokens = _named(tokenizer.get_vocabulary(), num_rows)
    types = _types(tokens, tokenizer, model)
    _check_added(encoder)
    if tokenizer._loaded().is_byte_level:
        keys = {"tokens": tokens, "token_type": types, **_byte_level_keys(model, rules)}
    else:
        keys = sentencepiece_keys(encoder, tokens, types, model, rules)
    keys = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    keys |= _special_ids(tokenizer, model, stop_token_ids)
    keys |= {"tokenizer.ggml.add_bos_token": add_start_token, "tokenizer.ggml.add_eos_token": False}
    return keys | _templates(tokenizer.chat_template)


def _named(vocabulary: list[str | None], num_rows: int) -> list[str]:
    """Give every row of the model a token; those without one a name, which no other token has."""
    taken = set(vocabulary)
    tokens = [*vocabulary, *[None] * (num_rows - len(vocabulary))]
    for token_id, token in enumerate(tokens):
        if token is None:
            token = f"[PAD{token_id}]"
            while token in taken:
                token += "_"
            tokens[token_id] = token
    return tokens


def _types(tokens: list[str], tokenizer: LlamaTokenizer, model: dict) -> list[int]:
    vocabulary = tokenizer.get_vocabulary()
    types = [TokenType.NORMAL if token is not None else TokenType.UNUSED for token in vocabulary]
    types += [TokenType.UNUSED] * (len(tokens) - len(vocabulary))
    if model["byte_fallback"]:
        types = [TokenType.BYTE if token in BYTES else kind for token, kind in zip(tokens, types, strict=True)]
    for token_id, token in tokenizer._loaded().encoder.get_added_tokens_decoder().items():
        types[token_id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    if model["unk_token"] is not None:
        types[tokenizer.token_to_id(model["unk_token"])] = TokenType.UNKNOWN
    return types


def _check_added(encoder: tokenizers.Tokenizer) -> None:
    """Refuse words among the added tokens that take the spaces around them, or that are found in whole words only."""
    for token in encoder.get_added_tokens_decoder().values():
        if not token.special and (token.lstrip or token.rstrip or token.single_word):
            raise cannot_run("added token", token.content, "one without lstrip, rstrip and single_word")


def _special_ids(tokenizer: LlamaTokenizer, model: dict, stop_token_ids: Iterable[int]) -> dict[str, int]:
    """Name the tokens that mean something. Of a start or an end that has no name, llama.cpp makes up the id."""
    start, end = tokenizer.start_token_id, tokenizer.end_token_id
    turn_end = tokenizer.turn_end_token_id if tokenizer.chat_template is not None else None
    stops = [token_id for token_id in dict.fromkeys([end, turn_end, *stop_token_ids]) if token_id is not None]
    if not stops:
        raise UnsupportedError(
            "tokenizer: end_token = None and no stop ids; expected one: llama.cpp would end a text at a token of its "
            "own choice. Build the tokenizer with end_token=."
        )
    if len(stops) > _MOST_STOPS:
        warnings.warn(
            f"stop_token_ids: {listed(map(str, stops[_MOST_STOPS:]))} may not end a text in llama.cpp; a GGUF file "
            f"names at most {_MOST_STOPS} tokens that do.",
            stacklevel=2,
        )
    ids = dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), stops, strict=False))
    ids["bos_token_id"] = stops[0] if start is None else start
    if model["unk_token"] is not None:
        ids["unknown_token_id"] = tokenizer.token_to_id(model["unk_token"])
    if tokenizer.pad_token is not None:
        ids["padding_token_id"] = tokenizer.pad_token_id
    return {f"tokenizer.ggml.{name}": token_id for name, token_id in ids.items()}


def _templates(chat_template: str | dict[str, str] | None) -> dict[str, object]:
    if chat_template is None:
        return {}
    templates = {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template)
    keys = {}
    for name, text in templates.items():
        if text in BUILT_IN:
            text = (FOLDER / f"{text}.jinja").read_text(encoding="utf-8")
        keys["tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"] = _plain(text)
    others = [name for name in templates if name != "default"]
    return keys | ({"tokenizer.chat_templates": others} if others else {})


def _plain(template: str) -> str:
    """Take the blocks around what the assistant writes for blocks that are always there: not every Jinja has them."""
    return _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template)


# === Byte-level BPE ===


def _byte_level_keys(model: dict, rules: dict) -> dict[str, object]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise cannot_run("merges", [], "at least one")
    pre = _pre_tokenizer_name(rules, model["ignore_merges"])
    if PRE_TOKENIZERS[pre].normalizer is not None:
        warnings.warn(
            f"tokenizer: normalizer = {PRE_TOKENIZERS[pre].normalizer['type']}; llama.cpp does not normalize, so that "
            "text in another form than this gets other ids there.",
            stacklevel=2,
        )
    return {"model": "gpt2", "pre": pre, "merges": merges}


def _pre_tokenizer_name(rules: dict, ignore_merges: bool) -> str:
    """Find the name of the rules by which a vocabulary splits texts. There is no guess: a wrong one is silent."""
    wanted = _splitting(rules)
    for name, known in PRE_TOKENIZERS.items():
        there = _splitting({"normalizer": known.normalizer, "pre_tokenizer": known.pre_tokenizer})
        if there == wanted and known.ignore_merges == ignore_merges:
            return name
    raise cannot_run(
        f"pre_tokenizer with ignore_merges = {ignore_merges}",
        rules["pre_tokenizer"],
        f"the rules of one of {', '.join(PRE_TOKENIZERS)}",
    )


def _splitting(rules: dict) -> tuple[list[dict], list[dict]]:
    """Take out what decides where texts are split: not how the offsets of tokens are counted."""
    parts = []
    for part in flat(rules["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "ByteLevel":  # it has GPT-2's pattern built in
            words = [split(GPT2)] if part["use_regex"] else []
            parts += [*words, byte_level(part["add_prefix_space"])]
        else:
            parts.append(part)
    return flat(rules["normalizer"], "normalizers"), parts
