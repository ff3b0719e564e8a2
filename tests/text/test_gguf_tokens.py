"""Tokenizers as GGUF keys: checked against llama.cpp's rules, written down here, and against llama.cpp itself."""

import json
import random

import pytest
import tokenizers

from kllama.errors import UnsupportedError
from kllama.text.gguf_tokens import gguf_tokens
from kllama.text.tokenizer import LlamaTokenizer

pytestmark = pytest.mark.backend_independent

LETTERS = "  \n\t.,'!?aabcdehilnorst ABCTH0123456789éüß日本語한국🙂👍🏽▁<>s/|[]_\u200d\u0301\xa0ﬁ"
TEXT = ["Once upon a time there was a little girl.", "She had a banana, and a bandana for the bananas."] * 5


def texts(count, seed=0):
    source = random.Random(seed)
    return ["".join(source.choice(LETTERS) for _ in range(source.randrange(40))) for _ in range(count)]


@pytest.fixture
def mixed_texts(assets):
    return json.loads((assets / "goldens" / "tokenizers" / "mixed_text.json").read_text())["texts"] + texts(300)


def keys_of(tokenizer, num_rows=None, **kwargs):
    keys = gguf_tokens(tokenizer, num_rows or tokenizer.vocabulary_size(), True, **kwargs)
    return {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in keys.items()}


def changed(tokenizer, change, **kwargs):
    """The same tokenizer with a change of its tokenizer.json."""
    content = json.loads(tokenizer._loaded().encoder.to_str())
    change(content)
    encoder = tokenizers.Tokenizer.from_str(json.dumps(content))
    return LlamaTokenizer(encoder, start_token="<s>", end_token="</s>", **kwargs)


def sentencepiece_ids(keys, text):
    """What llama.cpp makes of a text with a SentencePiece vocabulary: the best neighbours first, then the leftmost."""
    ids = {token: token_id for token_id, token in enumerate(keys["tokens"])}
    text = " " * (keys["add_space_prefix"] and bool(text)) + text
    symbols = list(text.replace(" ", "▁"))
    while True:
        joined = [left + right for left, right in zip(symbols, symbols[1:], strict=False)]
        places = [place for place, piece in enumerate(joined) if piece in ids]
        if not places:
            break
        place = max(places, key=lambda place: (keys["scores"][ids[joined[place]]], -place))
        symbols[place : place + 2] = [joined[place]]
    as_bytes = [[f"<0x{byte:02X}>" for byte in symbol.encode()] for symbol in symbols]
    return [
        ids[part]
        for symbol, parts in zip(symbols, as_bytes, strict=True)
        for part in ([symbol] if symbol in ids else parts)
    ]


@pytest.fixture(scope="module")
def trained():
    return LlamaTokenizer.train(TEXT, 325, "sentencepiece_bpe")


@pytest.mark.parametrize("path", ["models/stories15M", "tokenizers/mistral_v3/tokenizer.model", None])
def test_scores_give_the_ids_of_the_merges(path, assets, trained, mixed_texts, recwarn):
    tokenizer = trained if path is None else LlamaTokenizer.from_preset(assets / path)
    keys = keys_of(tokenizer)
    # Mistral's has pieces that are cut out of a text before a space is put anywhere.
    said = ["[REFERENCE_DOC_1" in str(warning.message) for warning in recwarn if warning.category is UserWarning]
    assert said == [True] * (path is not None and "mistral" in path)
    for text in [*mixed_texts, *(" " * count + "a" for count in range(40))]:
        assert sentencepiece_ids(keys, text) == tokenizer.tokenize(text).tolist(), repr(text)


def test_pieces_of_llama2c_get_marks_for_spaces(assets):
    tokenizer = LlamaTokenizer(assets / "models" / "stories260K" / "llama2c" / "tok512.bin")
    reference = LlamaTokenizer.from_preset(assets / "models" / "stories260K")
    keys = keys_of(tokenizer)
    assert keys["tokens"] == keys_of(reference)["tokens"]
    for text in texts(100):
        if "▁" not in text:
            assert sentencepiece_ids(keys, text) == tokenizer.tokenize(text).tolist()


def test_a_vocabulary_without_a_space_before_the_text_says_so(trained):
    tokenizer = LlamaTokenizer(trained._loaded().encoder, end_token="</s>", add_prefix_space=False)
    keys = keys_of(tokenizer)
    assert keys["add_space_prefix"] is False
    assert sentencepiece_ids(keys, "a time") == tokenizer.tokenize("a time").tolist()


def test_tokens_and_kinds(trained):
    tokenizer = LlamaTokenizer(trained._loaded().encoder, start_token="<s>", end_token="</s>", pad_token="<unk>")
    tokenizer.add_tokens(["girl-friend"])
    tokenizer.add_tokens(["<turn>", "[PAD328]"], special=True)
    size = tokenizer.vocabulary_size()
    keys = keys_of(tokenizer, num_rows=size + 2)
    assert keys["tokens"][:size] == tokenizer.get_vocabulary()
    assert keys["tokens"][size:] == [f"[PAD{size}]_" if size == 328 else f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert keys["token_type"] == [2, 3, 3] + [6] * 256 + [1] * 66 + [4, 3, 3] + [5, 5]
    named = {name: keys[f"{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")}
    assert named == {"bos": 1, "eos": 2, "unknown": 0, "padding": 0}
    assert keys["add_bos_token"] is True and keys["add_eos_token"] is False


@pytest.mark.parametrize(
    ("pattern", "ignore_merges", "pre"),
    [("llama3", True, "llama-bpe"), ("llama3", False, "smaug-bpe"), ("gpt2", False, "gpt-2")],
)
def test_the_pattern_of_a_byte_level_vocabulary_is_named(pattern, ignore_merges, pre):
    tokenizer = LlamaTokenizer.train(TEXT, 290, pattern=pattern)

    def change(content):
        content["model"]["ignore_merges"] = ignore_merges

    keys = keys_of(changed(tokenizer, change))
    assert (keys["model"], keys["pre"]) == ("gpt2", pre)
    assert keys["merges"][0] == " ".join(json.loads(tokenizer._loaded().encoder.to_str())["model"]["merges"][0])


def test_a_real_byte_level_vocabulary(assets):
    keys = keys_of(LlamaTokenizer.from_preset(assets / "models" / "smollm2-135m-instruct"))
    assert (keys["pre"], keys["token_type"].count(3), len(keys["merges"])) == ("smollm", 17, 48900)


def test_a_normalizer_that_llama_cpp_lacks_is_said():
    from kllama.text.formats.patterns import LLAMA3, QWEN2

    def change(content):
        content["normalizer"] = {"type": "NFC"}
        (words, _) = content["pre_tokenizer"]["pretokenizers"]
        assert words["pattern"]["Regex"] == LLAMA3
        words["pattern"]["Regex"] = QWEN2

    with pytest.warns(UserWarning, match="does not normalize"):
        assert keys_of(changed(LlamaTokenizer.train(TEXT, 290), change))["pre"] == "qwen2"


def test_a_space_before_some_texts_only_is_said(trained):
    tokenizer = LlamaTokenizer(trained._loaded().encoder, end_token="</s>", legacy=False)
    with pytest.warns(UserWarning, match="prepend_scheme = first"):
        keys = keys_of(tokenizer)
    assert sentencepiece_ids(keys, "a time") == tokenizer.tokenize("a time").tolist()


def edit_model(**values):
    return lambda content: content["model"].update(values)


def drop_a_merge(content):
    """Of a piece that can be formed in two ways."""
    merges, ways = content["model"]["merges"], {}
    for merge in merges:
        ways.setdefault("".join(merge), []).append(merge)
    merges.remove(next(found for found in ways.values() if len(found) > 1)[1])


def part_merges(content):
    """Of a piece that can be formed in two ways, take the first to the front."""
    merges, ways = content["model"]["merges"], {}
    for merge in merges:
        ways.setdefault("".join(merge), []).append(merge)
    first = next(found for found in list(ways.values())[2:] if len(found) > 1)[0]
    merges.remove(first)
    merges.insert(0, first)


def alternate_runs(content):
    """Form the shorter run before the longer one, and let their merges alternate."""
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = vocabulary | {"n" * length: len(vocabulary) + length - 2 for length in (2, 3, 4)}
    runs = [(2, 1), (2, 2), (1, 2), (3, 1), (1, 3), (1, 1)]
    content["model"]["merges"] += [["n" * left, "n" * right] for left, right in runs]


def add_a_spelling(content):
    """Let merges come as far as two pieces that make the start token."""
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = vocabulary | {token: len(vocabulary) + i for i, token in enumerate(["<", "s>", ">"])}
    content["model"]["merges"].append(["s", ">"])


def split_words(content):
    content["pre_tokenizer"] = {"type": "Whitespace"}


def strip_spaces(content):
    content["normalizer"]["normalizers"].insert(0, {"type": "Strip", "strip_left": True, "strip_right": True})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (edit_model(byte_fallback=False), "byte_fallback = false"),
        (edit_model(ignore_merges=True), "pre_tokenizer = "),
        (drop_a_merge, "merges without"),
        (part_merges, "merges of"),
        (alternate_runs, "merges of"),
        (add_a_spelling, 'token = "<s>"'),
        (split_words, "pre_tokenizer = "),
        (strip_spaces, "normalizer = "),
    ],
)
def test_pieces_that_llama_cpp_cannot_run_are_refused(change, field, trained):
    tokenizer = changed(trained, change)
    with pytest.raises(UnsupportedError, match=rf"^tokenizer: {field}.*Export the model without its preprocessor"):
        keys_of(tokenizer)


def test_patterns_that_llama_cpp_does_not_name_are_refused():
    def change(content):
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}+"

    with pytest.raises(UnsupportedError, match="pre_tokenizer with ignore_merges = False"):
        keys_of(changed(LlamaTokenizer.train(TEXT, 290), change))


def test_added_tokens_that_take_spaces_are_refused(trained):
    encoder = tokenizers.Tokenizer.from_str(trained._loaded().encoder.to_str())
    encoder.add_tokens([tokenizers.AddedToken("word", single_word=True)])
    with pytest.raises(UnsupportedError, match='added token = "word"'):
        keys_of(LlamaTokenizer(encoder, end_token="</s>"))


def test_a_vocabulary_without_an_end_is_refused(trained):
    tokenizer = LlamaTokenizer(trained._loaded().encoder, end_token=None)
    with pytest.raises(UnsupportedError, match="end_token = None"):
        keys_of(tokenizer)
    assert keys_of(tokenizer, stop_token_ids=[5])["eos_token_id"] == 5


def test_stop_tokens_have_three_places(trained):
    keys = keys_of(trained, stop_token_ids=[1, 2, 7])
    assert [keys[f"{name}_token_id"] for name in ("eos", "eot", "eom")] == [2, 1, 7]
    with pytest.warns(UserWarning, match="stop_token_ids: 8 may not"):
        keys_of(trained, stop_token_ids=[1, 2, 7, 8])


def test_chat_templates(trained):
    encoder = trained._loaded().encoder
    template = "{%- generation -%}{{ messages[0].content }}{% endgeneration %}"
    tokenizer = LlamaTokenizer(encoder, end_token="</s>", chat_template={"default": template, "tool_use": "b"})
    keys = keys_of(tokenizer)
    assert keys["chat_template"] == "{%- if true -%}{{ messages[0].content }}{% endif %}"
    assert keys["chat_template.tool_use"] == "b" and keys["chat_templates"] == ["tool_use"]
    built_in = keys_of(LlamaTokenizer(encoder, end_token="</s>", chat_template="chatml"))
    assert "<|im_start|>" in built_in["chat_template"] and "generation %}" not in built_in["chat_template"]
    assert "chat_template" not in keys_of(trained)
