"""`legacy` and `add_prefix_space` on every form that a word-start mark takes in a file."""

import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import pre_tokenizers

from kllama.text.formats.recognise import open_vocabulary
from kllama.text.formats.rules import byte_level, sequence, split

pytestmark = pytest.mark.backend_independent

LLAMA2 = ("tokenizers/llama2/tokenizer.model", "models/stories15M/tokenizer.json")
SPELLINGS = ["<s>", "</s>", "<unk>"]
# Text, ids of SentencePiece's rules, of transformers' legacy=False: the table of the two in their own documentation.
TABLE = {
    "a": ([263], [263]),
    " a": ([29871, 263], [263]),
    "  a": ([259, 263], [29871, 263]),
    "a  b   c": ([263, 29871, 289, 259, 274], [263, 29871, 289, 259, 274]),
    "<s>Hello": ([1, 15043], [1, 10994]),
    "Hello</s> world": ([15043, 2, 29871, 3186], [15043, 2, 3186]),
    "": ([], []),
}


def ids_of(opened, texts, as_text=False):
    opened.encoder.encode_special_tokens = as_text
    return [encoding.ids for encoding in opened.encoder.encode_batch_fast(texts, add_special_tokens=False)]


def rules(opened) -> dict:
    content = json.loads(opened.encoder.to_str())
    return {name: content[name] for name in ("normalizer", "pre_tokenizer", "decoder")}


class TestLegacy:
    @pytest.mark.parametrize("source", LLAMA2)
    def test_table(self, assets, source):
        for legacy, column in ((None, 0), (True, 0), (False, 1)):
            received = ids_of(open_vocabulary(assets / source, legacy=legacy), list(TABLE))
            assert dict(zip(TABLE, received, strict=True)) == {text: row[column] for text, row in TABLE.items()}

    @pytest.mark.parametrize("source", [LLAMA2[0], "models/stories260K/tokenizer.json"])
    def test_false_is_metaspace(self, assets, random_texts, source):
        reference = tokenizers.Tokenizer.from_str(open_vocabulary(assets / source).encoder.to_str())
        reference.normalizer = tokenizers.normalizers.Sequence([])
        reference.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first", split=False)
        texts = random_texts(4, SPELLINGS)
        received = ids_of(open_vocabulary(assets / source, legacy=False), texts)
        assert received == [encoding.ids for encoding in reference.encode_batch_fast(texts, add_special_tokens=False)]

    def test_true_on_a_metaspace_file(self, assets, random_texts):
        path = assets / LLAMA2[0]
        reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
        texts = random_texts(5, SPELLINGS, 2000)
        content = json.loads(open_vocabulary(path, legacy=False).encoder.to_str())
        assert ids_of(open_vocabulary(content, legacy=True), texts, as_text=True) == reference.encode(texts)

    def test_a_metaspace_that_splits(self, assets, random_texts):
        content = json.loads((assets / LLAMA2[1]).read_text(encoding="utf-8"))
        content["normalizer"] = None
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
        texts = [text for text in random_texts(6, ["a"], 500) if text[:1] not in (" ", "\u2581")]
        before, after = open_vocabulary(content), open_vocabulary(content, legacy=True)
        assert ids_of(before, texts) == ids_of(after, texts) and rules(before) != rules(after)


class TestAddPrefixSpace:
    @pytest.mark.parametrize(
        "source", [LLAMA2[0], "models/stories260K/tokenizer.json", "models/stories260K/llama2c/tok512.bin"]
    )
    @pytest.mark.parametrize("legacy", [None, True, False])
    def test_none_at_all(self, assets, source, legacy):
        with_mark = open_vocabulary(assets / source, legacy=legacy)
        without = open_vocabulary(assets / source, legacy=legacy, add_prefix_space=False)
        (marked, plain), (again, _) = ids_of(with_mark, [" me", "me"]), ids_of(without, [" me", "me"])
        assert without.encoder.decode(again) == " me" and plain == ids_of(without, [" me"])[0]
        assert ids_of(without, ["me"]) != [plain]
        assert without.encoder.decode(ids_of(without, ["me"])[0]) == "me" == with_mark.encoder.decode(plain)
        assert with_mark.encoder.decode(marked) == ("me" if legacy is False else " me")

    def test_byte_level(self, assets):
        path = assets / "tokenizers/gpt2/tokenizer.json"
        assert ids_of(open_vocabulary(path), ["Hello world"]) == [[15496, 995]]
        assert ids_of(open_vocabulary(path, add_prefix_space=True), ["Hello world", " Hello"]) == [
            [18435, 995],
            [18435],
        ]
        assert ids_of(open_vocabulary(path, add_prefix_space=False), ["Hello world"]) == [[15496, 995]]

    def test_behind_another_split(self):
        pre_tokenizer = sequence([split(r"\d"), byte_level()], "pretokenizers")
        content = {
            "model": {"type": "BPE", "vocab": {"a": 0, "\u0120": 1}, "merges": []},
            "pre_tokenizer": pre_tokenizer,
        }
        with pytest.raises(ValueError, match="add_prefix_space = True; expected None or False"):
            open_vocabulary(content, add_prefix_space=True)
        assert ids_of(open_vocabulary(content, add_prefix_space=False), ["a"]) == [[0]]


SOURCES = [f"models/stories260K/{name}" for name in ("tokenizer.model", "tokenizer.json", "llama2c/tok512.bin")]
OPTIONS = [{"legacy": a, "add_prefix_space": b} for a in (None, True, False) for b in (None, True, False)]


class TestRepetition:
    @pytest.mark.parametrize("source", SOURCES)
    def test_twice_changes_nothing(self, assets, source):
        for options in OPTIONS:
            self.check(assets / source, options)

    def test_twice_with_user_defined_pieces(self, assets):
        self.check(assets / "tokenizers/mistral_v3/tokenizer.model", {"legacy": False, "add_prefix_space": False})

    def check(self, path, options):
        once = open_vocabulary(path, **options)
        twice = open_vocabulary(once.encoder, **options)
        assert rules(twice) == rules(once) and twice.adds_start_token == once.adds_start_token

    @pytest.mark.parametrize("source", SOURCES)
    def test_back_again(self, assets, source, random_texts):
        texts = random_texts(7, SPELLINGS, 300)
        for options in OPTIONS:
            away = open_vocabulary(assets / source, **options)
            back = open_vocabulary(away.encoder, legacy=True, add_prefix_space=True)
            expected = open_vocabulary(assets / source)
            assert ids_of(back, texts) == ids_of(expected, texts)
            ids = ids_of(expected, texts, as_text=True)
            assert back.encoder.decode_batch(ids) == expected.encoder.decode_batch(ids)

    @pytest.mark.parametrize("option", [{"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
    def test_nothing_to_apply_to(self, option):
        bare = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
        with pytest.raises(ValueError, match=f"{next(iter(option))} = .*; expected None"):
            open_vocabulary(bare, **option)

    @pytest.mark.parametrize("name", ["legacy", "add_prefix_space"])
    def test_no_bool(self, assets, name):
        with pytest.raises(TypeError, match=f"{name} = 1; expected True, False or None"):
            open_vocabulary(assets / LLAMA2[0], **{name: 1})
