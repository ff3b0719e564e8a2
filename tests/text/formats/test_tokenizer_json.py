"""What the post-processor of a tokenizer.json says of the start token. Damage is tested with the tokenizer."""

import pytest
import tokenizers

from kllama.errors import CheckpointError, UnsupportedError
from kllama.text.formats.recognise import open_vocabulary
from kllama.text.formats.rules import byte_level, start_template

pytestmark = pytest.mark.backend_independent

MODEL = {"type": "BPE", "vocab": {"a": 0, "<s>": 1, "</s>": 2}, "merges": []}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
START, END = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>"))


def template(*single) -> dict:
    names = {token: {"id": token, "ids": [index], "tokens": [token]} for index, token in ((1, "<s>"), (2, "</s>"))}
    return {"type": "TemplateProcessing", "single": list(single), "pair": [TEXT], "special_tokens": names}


def opened(post_processor):
    return open_vocabulary({"model": MODEL, "post_processor": post_processor})[1:]


@pytest.mark.parametrize(
    "post_processor, expected",
    [
        (None, (None, None, None)),
        (byte_level(), (None, None, None)),
        (start_template("<s>", 1), ("<s>", None, True)),
        ({"type": "Sequence", "processors": [byte_level(), start_template("<s>", 1)]}, ("<s>", None, True)),
        (template(START, TEXT, END), ("<s>", None, True)),
        (template(TEXT, END), (None, None, False)),
        (template(TEXT), (None, None, False)),
        ({"type": "BertProcessing", "cls": ["<s>", 1], "sep": ["</s>", 2]}, ("<s>", None, True)),
        (
            {
                "type": "RobertaProcessing",
                "cls": ["<s>", 1],
                "sep": ["</s>", 2],
                "trim_offsets": True,
                "add_prefix_space": False,
            },
            ("<s>", None, True),
        ),
    ],
)
def test_start_token(post_processor, expected):
    assert opened(post_processor) == expected


def test_two_start_tokens():
    with pytest.raises(UnsupportedError, match="post_processor begins texts with .*expected one token at most"):
        opened(template(START, END, TEXT))


def test_a_start_token_that_does_not_exist():
    with pytest.raises(CheckpointError, match='post_processor begins texts with "<bos>"; expected a known token'):
        opened(start_template("<bos>", 1))


def test_a_start_token_that_the_template_does_not_explain():
    broken = template(START, TEXT)
    del broken["special_tokens"]["<s>"]
    with pytest.raises(CheckpointError, match='post_processor.single has "<s>"; expected one of its special_tokens'):
        opened(broken)


def test_a_model_without_its_type():
    model = {key: value for key, value in MODEL.items() if key != "type"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    assert open_vocabulary({"model": model, "normalizer": replace}).encoder.encode("a").ids == [0]


def test_merges_of_tokens_with_spaces():
    vocab = {" ": 0, "  ": 1, "   ": 2}
    merges = [[" ", " "], ["  ", " "], [" ", "  "]]
    content = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    assert open_vocabulary(content).encoder.encode("   ").ids == [2]
    merges.append(["  ", " "])
    with pytest.raises(CheckpointError, match="twice"):
        open_vocabulary(content)


def test_dropout_is_a_setting_of_training():
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "dropout": 0.5}
    encoder = open_vocabulary({"model": model}).encoder
    assert {tuple(encoder.encode("ab").ids) for _ in range(40)} == {(2,)}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("tokenizers/gpt2/tokenizer.json", (None, None, None)),
        ("models/stories15M", ("<s>", None, True)),
        ("models/smollm2-135m-instruct", (None, None, None)),
    ],
)
def test_real_files(assets, source, expected):
    assert open_vocabulary(assets / source)[1:] == expected


@pytest.mark.parametrize("folder", ["models/stories15M", "models/stories260K"])
def test_the_split_at_word_starts_changes_no_id(assets, folder, random_texts):
    path = assets / folder / "tokenizer.json"
    encoder = open_vocabulary(path).encoder
    plain = tokenizers.Tokenizer.from_file(str(path))
    assert plain.pre_tokenizer is None and encoder.pre_tokenizer is not None
    texts = random_texts(5, ["<s>", "</s>", "<unk>"], 3000)
    texts += [text.replace(" ", "\u2581") for text in texts[:500]]
    for parse_special in (False, True):
        encoder.encode_special_tokens = plain.encode_special_tokens = not parse_special
        pairs = zip(*(one.encode_batch(texts, add_special_tokens=False) for one in (encoder, plain)), strict=True)
        assert [a.ids for a, b in pairs if a.ids != b.ids] == []


@pytest.mark.parametrize(
    "change",
    [
        {"ignore_merges": True},
        {"vocab": {"a": 0, "\u2581": 1, "a\u2581": 2}, "merges": ["a \u2581"]},
        {"byte_fallback": False, "vocab": {"a": 0}},
    ],
)
def test_no_split_where_a_token_could_reach_over_it(change):
    model = {"type": "BPE", "vocab": {"a": 0, "\u2581": 1}, "merges": [], "byte_fallback": True, **change}
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    content = {"version": "1.0", "normalizer": normalizer, "model": model}
    assert open_vocabulary(content).encoder.pre_tokenizer is None


def test_no_split_where_a_space_is_none():
    model = {"type": "BPE", "vocab": {"a": 0, "\u2581": 1}, "merges": [], "byte_fallback": True}
    assert open_vocabulary({"version": "1.0", "model": model}).encoder.pre_tokenizer is None
