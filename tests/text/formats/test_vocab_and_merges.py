"""The reader of vocab.json and merges.txt: GPT-2, Qwen2, and the assets of KerasHub."""

import json

import pytest
import tokenizers

from kllama.errors import CheckpointError, MissingFileError, UnsupportedError
from kllama.text.formats.recognise import open_vocabulary
from kllama.text.formats.rules import byte_characters

pytestmark = pytest.mark.backend_independent

BYTES = {character: byte for byte, character in byte_characters().items()}
VOCAB = {**BYTES, "ab": 256, "abc": 257, "\u0120a": 258, "<|endoftext|>": 259}
MERGES = "#version: 0.2\na b\nab c\n\u0120 a\n"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


def write(folder, vocab=VOCAB, merges=MERGES, config=None, name="vocab.json"):
    (folder / name).write_text(vocab if isinstance(vocab, str) else json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_bytes(merges if isinstance(merges, bytes) else merges.encode())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def encode(opened, text, as_text=False):
    opened.encoder.encode_special_tokens = as_text
    return opened.encoder.encode(text, add_special_tokens=False).ids


class TestGpt2:
    @pytest.mark.parametrize("as_text", [True, False])
    def test_against_the_json(self, assets, random_texts, as_text):
        reference = tokenizers.Tokenizer.from_file(str(assets / "tokenizers/gpt2/tokenizer.json"))
        encoder = open_vocabulary(assets / "tokenizers/gpt2/vocab.json").encoder
        reference.encode_special_tokens = encoder.encode_special_tokens = as_text
        texts = random_texts(1, ["<|endoftext|>", "<|endoftext", "it's", "IT'S"])
        expected = [encoding.ids for encoding in reference.encode_batch_fast(texts)]
        assert [encoding.ids for encoding in encoder.encode_batch_fast(texts)] == expected
        assert encoder.decode_batch(expected, skip_special_tokens=False) == texts

    def test_either_file_or_the_directory(self, tmp_path):
        write(tmp_path)
        for source in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
            opened = open_vocabulary(source)
            assert encode(opened, "abc a<|endoftext|>") == [257, 258, 259]
            assert opened[1:] == (None, "<|endoftext|>", False)

    @pytest.mark.parametrize("merges", ["a b\nab c\n", "a b\nab c", "#version: 0.2\r\na b\r\nab c\r\n"])
    def test_forms_of_the_merges(self, tmp_path, merges):
        assert encode(open_vocabulary(write(tmp_path, merges=merges)), "abcab") == [257, 256]

    @pytest.mark.parametrize("merges", ["#version: 0.2\n", ""])
    def test_bytes_only(self, tmp_path, merges):
        opened = open_vocabulary(write(tmp_path, BYTES, merges))
        assert encode(opened, "é\0") == list("é\0".encode()) and opened.end_token is None

    def test_add_prefix_space(self, tmp_path):
        write(tmp_path)
        for flag, ids in ((None, [97]), (False, [97]), (True, [258])):
            assert encode(open_vocabulary(tmp_path, add_prefix_space=flag), "a") == ids
        with pytest.raises(ValueError, match="legacy = False; expected None"):
            open_vocabulary(tmp_path, legacy=False)


class TestClasses:
    def test_qwen2(self, tmp_path):
        added = {"260": {"content": "<|im_start|>", **FLAGS}, "259": {"content": "<|endoftext|>", **FLAGS}}
        config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
        vocab = {**BYTES, "ab": 256, "12": 257, "\u00c3\u00a9": 258}
        opened = open_vocabulary(write(tmp_path, vocab, "a b\n1 2\n\u00c3 \u00a9\n", config))
        assert encode(opened, "12") == [49, 50]  # one digit at a time
        assert encode(opened, "e\u0301") == [258]  # composed first
        assert encode(opened, "<|im_start|>ab") == [260, 256] and 260 not in encode(
            opened, "<|im_start|>", as_text=True
        )

    @pytest.mark.parametrize("flags, normalized", [({}, True), ({"special": True}, False), ({"rstrip": True}, True)])
    def test_flags_that_are_missing(self, tmp_path, flags, normalized):
        added = {"260": {"content": "<|new|>", **flags}}
        encoder = open_vocabulary(write(tmp_path, config={"added_tokens_decoder": added})).encoder
        token = encoder.get_added_tokens_decoder()[260]
        received = {name: getattr(token, name) for name in FLAGS}
        assert received == {**dict.fromkeys(FLAGS, False), "normalized": normalized, **flags}

    def test_keras_hub_llama3(self, tmp_path):
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im|x|>"]
        vocab = {**BYTES, "ab": 256, "123": 257, **{token: 258 + place for place, token in enumerate(special)}}
        opened = open_vocabulary(write(tmp_path, vocab, "a b\n", name="vocabulary.json"))
        assert opened[1:] == ("<|begin_of_text|>", "<|end_of_text|>", True)
        assert opened.encoder.encode("123<|eot_id|>").ids == [258, 257, 260]  # no merge leads to 257
        assert [token.content for token in opened.encoder.get_added_tokens_decoder().values()] == special[:3]

    def test_keras_hub_gpt2(self, tmp_path):
        opened = open_vocabulary(write(tmp_path, name="vocabulary.json"))
        assert encode(opened, "abc a") == [257, 258] and opened[1:] == (None, "<|endoftext|>", False)

    def test_a_class_that_is_not_known(self, tmp_path):
        with pytest.raises(UnsupportedError, match='tokenizer_class = "BartTokenizer"; expected GPT2Tokenizer'):
            open_vocabulary(write(tmp_path, config={"tokenizer_class": "BartTokenizer"}))

    @pytest.mark.parametrize(
        "added",
        [[], {"x": {}}, {"259": 3}, {"259": {"special": True}}, {"3": {"content": "<|new|>", **FLAGS}}],
    )
    def test_added_tokens_that_are_wrong(self, tmp_path, added):
        with pytest.raises(CheckpointError, match="tokenizer_config.json"):
            open_vocabulary(write(tmp_path, config={"added_tokens_decoder": added}))


WRONG_MERGES = {
    "line 2: .a.; expected two": "a b\na\n",
    "line 2: .a b c.; expected two": "a b\na b c\n",
    "line 2: .*; expected two": "a b\n\na b\n",
    "line 2: .a  b.": "a b\na  b\n",
    "line 3: .zz.; expected a token": "#version\na b\nzz c\n",
    "line 1: .ac.; expected a token": "a c\n",
    "line 2: .a b.; expected another pair than line 1": "a b\na b\n",
    "line 1: byte 0xff|line 1, column 3: byte 0xff": b"a \xff\n",
}
WRONG_VOCABS = {
    "twice": '{"a": 0, "a": 1}',
    "= -1": {**VOCAB, "x": -1},
    r"= 1\.5": {**VOCAB, "x": 1.5},
    "= true": {**VOCAB, "x": True},
    "= null": {**VOCAB, "x": None},
    "= 4194304": {**VOCAB, "x": 2**22},
    "= 2147483648": {**VOCAB, "x": 2**31},
    "other than": {**VOCAB, "x": 5},
    "tokenizer.json": {},
}


class TestWrong:
    @pytest.mark.parametrize("fault", WRONG_MERGES)
    def test_merges(self, tmp_path, fault):
        with pytest.raises(CheckpointError, match=rf"merges\.txt: ({fault})"):
            open_vocabulary(write(tmp_path, merges=WRONG_MERGES[fault]) / "vocab.json")

    @pytest.mark.parametrize("fault", WRONG_VOCABS)
    def test_vocab(self, tmp_path, fault):
        with pytest.raises(CheckpointError, match=rf"vocab\.json: .*{fault}"):
            open_vocabulary(write(tmp_path, WRONG_VOCABS[fault], ""))

    @pytest.mark.parametrize("left, missing", [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
    def test_one_is_missing(self, tmp_path, left, missing):
        (write(tmp_path) / missing).unlink()
        with pytest.raises(MissingFileError, match=f"no .*{missing}"):
            open_vocabulary(tmp_path / left)
