"""The tokenizer against recorded ids of the reference libraries, and against files and inputs that are wrong."""

import copy
import functools
import json
import os
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import keras_hub
import numpy as np
import pytest
import tokenizers

from kllama.checkpoints.huggingface import tokenizer as huggingface_tokenizer
from kllama.errors import CheckpointError, MissingFileError
from kllama.text.formats import tokenizer_json
from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.tokenizer import LlamaTokenizer

# Folder under the assets: (column of mixed_text.json, column of llama_cpp.json, columns of special_tokens.json).
GOLDENS = {
    "tokenizers/llama3_2": ("llama3", "llama_bpe", "llama3_plain", "llama3_parsed"),
    "tokenizers/gpt2": ("gpt2", "gpt_2", None, "gpt2_parsed"),
    "models/smollm2-135m-instruct": ("smollm2", None, None, None),
    "models/stories260K": ("stories260k", None, None, None),
    "models/stories15M": ("llama2", "llama_spm", "llama2_plain", "llama2_parsed"),
}
BYTE_LEVEL = ("tokenizers/llama3_2", "tokenizers/gpt2", "models/smollm2-135m-instruct")
ALL_BYTES = ("tokenizers/llama3_2", "tokenizers/gpt2")  # that of SmolLM2 has no token for some control characters


def tiny_json(**model) -> dict:
    """A tokenizer.json with the tokens a, b, c, bc, abc and the special <s>, </s>."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "bc": 3, "abc": 4}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 5, "content": "<s>", **special}, {"id": 6, "content": "</s>", **special}],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["b c"], **model},
    }


# Without added tokens, whose ids the library checks against the size of the vocabulary.
BARE = {**tiny_json(), "added_tokens": []}


def tiny(**kwargs) -> LlamaTokenizer:
    return LlamaTokenizer(tiny_json(), **kwargs)


@functools.cache
def opened(assets, folder, **kwargs) -> LlamaTokenizer:
    return LlamaTokenizer(assets / folder / "tokenizer.json", **kwargs)


def golden(assets, name) -> dict:
    return json.loads((assets / "goldens" / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))


def mismatches(tokenizer, texts, expected) -> list[str]:
    rows = zip(texts, tokenizer(texts), expected, strict=True)
    return [text for text, ids, ids_expected in rows if ids != ids_expected]


class TestGoldens:
    @pytest.mark.parametrize("folder", GOLDENS)
    def test_mixed_text(self, assets, folder):
        recorded = golden(assets, "mixed_text")
        assert mismatches(opened(assets, folder), recorded["texts"], recorded[GOLDENS[folder][0]]) == []

    @pytest.mark.parametrize("folder", [folder for folder, columns in GOLDENS.items() if columns[1]])
    def test_llama_cpp(self, assets, folder):
        recorded = golden(assets, "llama_cpp")
        assert mismatches(opened(assets, folder), recorded["texts"], recorded[GOLDENS[folder][1]]) == []

    @pytest.mark.parametrize("folder", [folder for folder, columns in GOLDENS.items() if columns[2]])
    def test_special_spellings_are_text_by_default(self, assets, folder):
        recorded = golden(assets, "special_tokens")
        assert mismatches(opened(assets, folder), recorded["texts"], recorded[GOLDENS[folder][2]]) == []

    @pytest.mark.parametrize("folder", [folder for folder, columns in GOLDENS.items() if columns[3]])
    def test_special_spellings_parsed(self, assets, folder):
        recorded = golden(assets, "special_tokens")
        expected = recorded[GOLDENS[folder][3]]
        if folder == "models/stories15M":
            expected = [row[1:] for row in expected]  # recorded with the start token that the preprocessor adds
        assert mismatches(opened(assets, folder, parse_special=True), recorded["texts"], expected) == []

    def test_sentencepiece_decoding(self, assets):
        recorded = golden(assets, "mixed_text")
        assert opened(assets, "models/stories15M").detokenize(recorded["llama2"]) == recorded["llama2_decode"]

    @pytest.mark.parametrize("folder", ALL_BYTES)
    def test_byte_level_round_trip(self, assets, folder):
        tokenizer = opened(assets, folder)
        rng = np.random.default_rng(0)
        points = rng.choice([*range(32, 127), *range(0x0, 0x20), *range(0x80, 0x900), 0x1F999, 0x200B], (500, 30))
        texts = ["".join(map(chr, row)) for row in points] + golden(assets, "mixed_text")["texts"]
        assert tokenizer.detokenize(tokenizer(texts)) == texts


class TestTokenize:
    def test_a_text_is_an_array_and_a_batch_is_lists(self):
        tokenizer = tiny()
        ids = tokenizer("abca")
        assert isinstance(ids, np.ndarray) and ids.dtype == np.int32 and ids.tolist() == [0, 3, 0]
        assert tokenizer(["abca", ""]) == [[0, 3, 0], []]
        assert tokenizer(("a", "b")) == [[0], [1]]
        assert tokenizer(np.array(["a", "b"])) == [[0], [1]]
        assert tokenizer([]) == []
        assert tokenizer("").shape == (0,) and tokenizer("").dtype == np.int32

    def test_dtype_of_one_text(self):
        assert tiny(dtype="int64")("a").dtype == np.int64
        with pytest.raises(ValueError, match="dtype = 'float32'"):
            tiny(dtype="float32")

    @pytest.mark.parametrize("row", [None, 3, 1.5, b"a", ["a"], {"a": 1}])
    def test_a_row_that_is_no_text(self, row):
        with pytest.raises(TypeError, match=r"texts\[1\]"):
            tiny()(["a", row])

    @pytest.mark.parametrize("text", [None, 3, b"a", np.array([1, 2]), np.array([["a"]])])
    def test_an_input_that_is_no_text(self, text):
        with pytest.raises(TypeError, match="expected a str"):
            tiny().tokenize(text)

    def test_lone_surrogates_are_replaced(self, assets):
        tokenizer = opened(assets, "tokenizers/llama3_2")
        assert tokenizer.detokenize(tokenizer("a\ud800b \udc00")) == "a\ufffdb \ufffd"
        assert tokenizer.detokenize(tokenizer("\ud83e\udd99")) == "\U0001f999"  # a pair of halves is its character

    @pytest.mark.parametrize("text", ["\0a\0", "\u202eabc", " " * 100_000, "a" * 100_000])
    def test_hostile_text_survives(self, assets, text):
        tokenizer = opened(assets, "tokenizers/llama3_2")
        assert tokenizer.detokenize(tokenizer(text)) == text

    def test_every_word_of_the_vocabulary_is_its_own_id_with_ignore_merges(self):
        # KH-T3: no merge leads to "abc".
        assert LlamaTokenizer(tiny_json(ignore_merges=True))("abc").tolist() == [4]
        assert tiny()("abc").tolist() == [0, 3]

    def test_no_merges(self):
        assert LlamaTokenizer(tiny_json(merges=[]))("abc").tolist() == [0, 1, 2]

    def test_settings_of_a_call_in_the_file_do_not_count(self):
        encoder = tokenizers.Tokenizer.from_str(json.dumps(tiny_json()))
        encoder.enable_truncation(2)
        encoder.enable_padding(length=9)
        assert LlamaTokenizer(encoder.to_str())("aaaa").tolist() == [0, 0, 0, 0]

    def test_start_and_end_are_special_whatever_the_file_says(self):
        content = tiny_json()
        content["added_tokens"][1]["special"] = False
        assert LlamaTokenizer(content)("a</s>").tolist() == [0, 6]
        tokenizer = LlamaTokenizer(content, end_token="</s>")
        assert 6 not in tokenizer("a</s>") and tokenizer.special_token_ids == [5, 6]
        assert LlamaTokenizer(content, end_token="</s>", parse_special=True)("a</s>").tolist() == [0, 6]
        assert LlamaTokenizer(content, end_token="</s>", pad_token="</s>").special_token_ids == [5, 6]

    @pytest.mark.parametrize("special", [True, False])
    def test_start_and_end_keep_their_flags(self, special):
        content = tiny_json(vocab={"a": 0, "b": 1, "c": 2, "bc": 3, " ": 4})
        content["added_tokens"][1].update(rstrip=True, special=special)
        tokenizer = LlamaTokenizer(content, start_token="<s>", end_token="</s>", parse_special=True)
        assert tokenizer("a</s>  b<s> c").tolist() == [0, 6, 1, 5, 4, 2]

    def test_start_that_is_not_among_the_added_tokens(self):
        assert LlamaTokenizer(BARE, start_token="abc", parse_special=True)("abca").tolist() == [4, 0]
        tokenizer = LlamaTokenizer(BARE, start_token="abc")
        assert tokenizer("abca").tolist() == [0, 3, 0] and tokenizer.special_token_ids == [4]


class TestDetokenize:
    @pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: keras.ops.convert_to_tensor(ids, "int32")])
    def test_kinds_of_ids(self, kind):
        assert tiny().detokenize(kind([0, 3, 0])) == "a bc a"

    def test_shapes(self, assets):
        tokenizer = opened(assets, "tokenizers/gpt2")
        assert tokenizer.detokenize(15496) == "Hello"
        assert tokenizer.detokenize([15496, 995]) == "Hello world"
        assert tokenizer.detokenize([[15496], [995, 15496]]) == ["Hello", " worldHello"]
        assert tokenizer.detokenize([np.array([15496]), keras.ops.convert_to_tensor([995])]) == ["Hello", " world"]
        assert tokenizer.detokenize(keras.ops.convert_to_tensor([[15496, 995]])) == ["Hello world"]
        assert tokenizer.detokenize([]) == "" and tokenizer.detokenize([[]]) == [""]

    def test_special_tokens_stay_unless_skipped(self, assets):
        # KH-T8
        tokenizer = opened(assets, "tokenizers/llama3_2")
        ids = [128000, 9906, 128009]
        assert tokenizer.detokenize(ids) == "<|begin_of_text|>Hello<|eot_id|>"
        assert tokenizer.detokenize(ids, skip_special_tokens=True) == "Hello"

    def test_spaces_are_not_cleaned_up(self, assets):
        tokenizer = opened(assets, "tokenizers/llama3_2")
        assert tokenizer.detokenize(tokenizer("Hello , world ' s")) == "Hello , world ' s"

    @pytest.mark.parametrize("token_id", [-1, 7, 2**31, 2**70])
    def test_no_token_has_the_id(self, token_id):
        with pytest.raises(ValueError, match=f"id = {token_id}; expected"):
            tiny().detokenize([[0], [0, token_id]])

    def test_holes_have_no_token(self):
        tokenizer = LlamaTokenizer({"model": {"type": "BPE", "vocab": {"a": 0, "b": 2}, "merges": []}})
        assert tokenizer.vocabulary_size() == 3 and tokenizer.get_vocabulary() == ["a", None, "b"]
        with pytest.raises(ValueError, match="id = 1, a gap of the vocabulary;"):
            tokenizer.detokenize([1])
        with pytest.raises(ValueError, match="id = 1, a gap of the vocabulary;"):
            tokenizer.id_to_token(1)

    @pytest.mark.parametrize("ids", [[1.0], ["a"], "a", [None], [True], [[0], [0.5]], np.array([0.0]), [0, [1]]])
    def test_ids_that_are_no_integers(self, ids):
        with pytest.raises(TypeError, match="expected an integer"):
            tiny().detokenize(ids)


class TestVocabulary:
    @pytest.mark.parametrize(
        "folder, size",
        [("tokenizers/llama3_2", 128256), ("tokenizers/gpt2", 50257), ("models/stories15M", 32000)],
    )
    def test_every_id_counts_and_decodes(self, assets, folder, size):
        # KH-T5: reserved tokens are part of the vocabulary.
        tokenizer = opened(assets, folder)
        vocabulary = tokenizer.get_vocabulary()
        assert tokenizer.vocabulary_size() == len(vocabulary) == size
        assert all(isinstance(token, str) for token in vocabulary)
        assert len(tokenizer.detokenize([[token_id] for token_id in range(size)])) == size
        for token_id in (0, 5, 258, size - 1):
            assert tokenizer.token_to_id(tokenizer.id_to_token(token_id)) == token_id

    def test_special_tokens(self, assets):
        tokenizer = opened(
            assets, "tokenizers/llama3_2", start_token="<|begin_of_text|>", end_token="<|eot_id|>", pad_token="!"
        )
        assert (tokenizer.start_token, tokenizer.start_token_id) == ("<|begin_of_text|>", 128000)
        assert (tokenizer.end_token, tokenizer.end_token_id) == ("<|eot_id|>", 128009)
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("!", 0)
        assert tokenizer.special_token_ids == [*range(128000, 128256)]  # "!" remains an ordinary token
        assert tokenizer.special_tokens[:2] == ["<|begin_of_text|>", "<|end_of_text|>"]

    def test_without_named_tokens(self):
        tokenizer = tiny()
        assert tokenizer.start_token_id is None and tokenizer.end_token_id is None and tokenizer.pad_token_id == 0

    @pytest.mark.parametrize("name", ["start_token", "end_token", "pad_token"])
    def test_named_token_that_does_not_exist(self, name):
        with pytest.raises(ValueError, match=f"{name} = '<nope>'; expected one of the 7 tokens"):
            tiny(**{name: "<nope>"})
        with pytest.raises(TypeError, match=f"{name} = 5.0; expected a str"):
            tiny(**{name: 5.0})

    def test_unknown_token(self):
        with pytest.raises(ValueError, match="token = 'zz'"):
            tiny().token_to_id("zz")

    def test_without_a_vocabulary(self):
        with pytest.raises(ValueError, match="expected a vocabulary"):
            LlamaTokenizer()("a")

    def test_unknown_keyword(self):
        with pytest.raises((TypeError, ValueError), match="start_tokn"):
            LlamaTokenizer(start_tokn="<s>")


class TestTrain:
    TEXTS = ["Once upon a time there was a fox.", "The fox was red, and the time was 12 o'clock."] * 3

    @pytest.mark.parametrize("kind, size", [("byte_bpe", 290), ("sentencepiece_bpe", 300)])
    def test_it_is_a_tokenizer_like_any_other(self, tmp_path, kind, size):
        tokenizer = LlamaTokenizer.train(self.TEXTS, size, kind, special_tokens=["<pad>"], pad_token="<pad>")
        assert tokenizer.vocabulary_size() == size
        assert tokenizer.special_tokens[-3:] == ["<s>", "</s>", "<pad>"] and tokenizer.pad_token == "<pad>"
        for text in (*self.TEXTS, "Žlutý kůň <s> 😀\n\t "):
            assert tokenizer.detokenize(tokenizer(text)) == text
        assert len(tokenizer(self.TEXTS[0])) < 0.7 * len(self.TEXTS[0])
        preprocessor = LlamaCausalLMPreprocessor(tokenizer, 64)
        preprocessor.save_to_preset(str(tmp_path))
        again = LlamaTokenizer.from_preset(tmp_path)
        assert again.get_vocabulary() == tokenizer.get_vocabulary()
        assert {**again.get_config(), "name": tokenizer.name} == tokenizer.get_config()

    def test_without_start_and_end(self):
        tokenizer = LlamaTokenizer.train(self.TEXTS, 270, start_token=None, end_token=None)
        assert tokenizer.special_tokens == [] and (tokenizer.start_token, tokenizer.end_token) == (None, None)

    def test_the_embedded_vocabulary_comes_out_again(self, assets):
        path = Path(__file__).parents[2] / "presets" / "stories_1m_en" / "training" / "train.py"
        script = runpy.run_path(str(path))
        stories = script["read_stories"](assets / "text" / "tinystories_1mb.txt")
        trained = LlamaTokenizer.train([s for i, s in enumerate(stories) if i % 20], 2048, pattern="gpt2")
        assert trained.get_vocabulary() == LlamaTokenizer.from_preset("stories_1m_en").get_vocabulary()


class TestAddTokens:
    def test_they_come_at_the_end_in_their_order(self):
        tokenizer = tiny()
        assert tokenizer.add_tokens(["ŋa", "ba", "ŋ"]) == 3
        assert [tokenizer.id_to_token(i) for i in range(7, tokenizer.vocabulary_size())] == ["ŋa", "ba", "ŋ"]
        assert tokenizer("aŋabaŋbc").tolist() == [0, 7, 8, 9, 3]
        assert tokenizer.special_token_ids == [5, 6]

    def test_special_ones(self):
        text, token = tiny(), tiny(parse_special=True)
        for tokenizer in (text, token):
            assert tokenizer.add_tokens("<bc>", special=True) == 1
            assert tokenizer.special_tokens == ["<s>", "</s>", "<bc>"]
        assert token("a<bc>").tolist() == [0, 7]
        assert text("a<bc>").tolist() == [0, 3]
        assert token.detokenize([0, 7], skip_special_tokens=True) == "a"

    def test_known_ones_stay(self):
        tokenizer = tiny(parse_special=True)
        assert tokenizer.add_tokens(["bc", "x", "x"]) == 1
        assert tokenizer("abc").tolist() == [0, 3] and tokenizer.token_to_id("x") == 7
        assert tokenizer.add_tokens("x", special=True) == 0
        assert tokenizer.special_token_ids == [5, 6, 7]

    def test_they_are_saved(self, tmp_path):
        tokenizer = tiny(start_token="<s>")
        tokenizer.add_tokens(["ŋ"])
        tokenizer.add_tokens(["<bc>"], special=True)
        tokenizer.save_assets(str(tmp_path))
        again = LlamaTokenizer.from_config(tokenizer.get_config())
        again.load_assets(str(tmp_path))
        assert again.get_vocabulary() == tokenizer.get_vocabulary() and again.special_token_ids == [5, 6, 8]
        assert again("aŋ<bc>").tolist() == tokenizer("aŋ<bc>").tolist() == [0, 7, 3]

    @pytest.mark.parametrize("folder, size", [("tokenizers/llama3_2", 128256), ("models/stories15M", 32000)])
    def test_real_vocabularies(self, assets, folder, size):
        tokenizer = LlamaTokenizer(assets / folder / "tokenizer.json")
        before = tokenizer("Once upon a time")
        assert tokenizer.add_tokens(["ɓaaɗo", "ɗoo"]) == 2
        assert tokenizer.vocabulary_size() == size + 2
        assert {size, size + 1} <= set(tokenizer("ɓaaɗo ɗoo").tolist())
        np.testing.assert_array_equal(tokenizer("Once upon a time"), before)

    @pytest.mark.parametrize("folder", BYTE_LEVEL)
    def test_accents_survive_a_byte_level_decoder(self, assets, folder):
        # The library decodes the é of an added token as the byte 0xE9.
        tokenizer = LlamaTokenizer(assets / folder / "tokenizer.json")
        tokenizer.add_tokens(["école", "ɓ", "Ġġ"])
        tokenizer.add_tokens(["<é>"], special=True)
        text = "L'école, école! ɓ ɓé Ġġ"
        ids = tokenizer(text).tolist()
        assert {tokenizer.token_to_id(token) for token in ("école", "ɓ", "Ġġ")} <= set(ids)
        assert tokenizer.detokenize(ids) == text
        special = tokenizer.token_to_id("<é>")
        assert tokenizer.detokenize([special, *ids]) == f"<é>{text}"
        assert tokenizer.detokenize([special, *ids, special], skip_special_tokens=True) == text

    @pytest.mark.parametrize("in_sequence", [False, True])
    def test_accents_by_stream_and_at_once(self, assets, in_sequence):
        content = json.loads((assets / "tokenizers/gpt2/tokenizer.json").read_text(encoding="utf-8"))
        if in_sequence:
            content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"]]}
        tokenizer = LlamaTokenizer(content)
        assert tokenizer.add_tokens(["über"]) == 1
        ids = tokenizer("x über é").tolist()
        assert 50257 in ids
        assert tokenizer.detokenize(ids) == "".join(tokenizer.detokenize_stream(ids)) == "x über é"

    @pytest.mark.parametrize("special", [False, True])
    @pytest.mark.parametrize("token", ["é", "Ġ", "Ġhello", "Ã©"])
    def test_a_byte_is_not_taken_for_a_text(self, assets, token, special):
        tokenizer = LlamaTokenizer(assets / "tokenizers/gpt2/tokenizer.json")
        with pytest.raises(ValueError, match=rf"^tokens\[1\] = '{token}'; expected another token.*spells bytes so"):
            tokenizer.add_tokens(["<x>", token], special=special)
        assert tokenizer.vocabulary_size() == 50257 and tokenizer.special_token_ids == [50256]
        assert tokenizer.add_tokens(["hello", "été"]) == 1  # letters that spell themselves are known

    def test_a_byte_that_is_named_as_the_start_remains_a_byte(self, assets):
        tokenizer = LlamaTokenizer(assets / "tokenizers/gpt2/tokenizer.json", start_token="é", end_token="Ċ")
        for text in ("鄟", "é", "a\nb"):
            ids = tokenizer(text).tolist()
            assert tokenizer.detokenize(ids) == "".join(tokenizer.detokenize_stream(ids)) == text

    def test_nothing_is_found_in_a_special_token_that_is_spelt(self):
        tokenizer = tiny()
        tokenizer.add_tokens("<bc>", special=True)
        tokenizer.add_tokens(["<b", "c>"])
        assert tokenizer("a<bc>").tolist() == [0, 3] and tokenizer("a<bc").tolist() == [0, 8, 2]

    @pytest.mark.parametrize(
        "tokens, error", [([5], TypeError), (["a", ""], ValueError), ([None], TypeError), (["\ud800x"], ValueError)]
    )
    def test_what_is_no_token(self, tokens, error):
        with pytest.raises(error, match="tokens"):
            tiny().add_tokens(tokens)

    def test_a_vocabulary_with_gaps_has_no_end(self):
        tokenizer = LlamaTokenizer({**BARE, "model": {**BARE["model"], "vocab": {"a": 0, "b": 1, "c": 2, "bc": 9}}})
        with pytest.raises(ValueError, match="6 of its ids, such as 3"):
            tokenizer.add_tokens("x")
        assert tokenizer.vocabulary_size() == 10


class TestCheckpoints:
    """What `from_preset` makes of the tokenizer files of a Hugging Face directory."""

    def open(self, folder, files, rows=8, **kwargs):
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        names = sorted(path.name for path in folder.iterdir())
        settings = files.get("tokenizer_config.json", {})
        config = huggingface_tokenizer.tokenizer_config(folder, names, settings, files.get("config.json", {}))
        checkpoint = SimpleNamespace(
            path=folder,
            tokenizer_config=config,
            preprocessor_config=huggingface_tokenizer.preprocessor_config(settings),
            backbone_config={"vocabulary_size": rows},
        )
        return LlamaCausalLMPreprocessor.from_checkpoint(checkpoint, **kwargs)

    def test_tokenizer_files_alone(self, assets):
        tokenizer = LlamaTokenizer.from_preset(assets / "models" / "smollm2-135m-instruct")
        assert (tokenizer.start_token, tokenizer.end_token) == ("<|im_start|>", "<|im_end|>")
        assert "<|im_start|>" in tokenizer.chat_template and tokenizer("12").size == 2
        preprocessor = LlamaCausalLMPreprocessor.from_preset(assets / "tokenizers" / "llama2")
        assert preprocessor.tokenizer.start_token == "<s>" and preprocessor.add_start_token

    @pytest.mark.parametrize(
        "file, starts",
        [
            ("tokenizers/llama2/tokenizer.model", True),
            ("tokenizers/gpt2/vocab.json", False),
            ("models/stories260K/llama2c/tok512.bin", True),
            ("models/stories260K/tokenizer.json", True),
        ],
    )
    def test_a_file_alone(self, assets, file, starts):
        preprocessor = LlamaCausalLMPreprocessor.from_preset(assets / file)
        assert preprocessor.add_start_token == starts and preprocessor.tokenizer("a").size == 1

    def test_a_directory_of_another_vocabulary(self, assets, tmp_path):
        shutil.copyfile(assets / "models" / "stories260K" / "llama2c" / "tok512.bin", tmp_path / "tokenizer.bin")
        assert LlamaTokenizer.from_preset(tmp_path).vocabulary_size() == 512

    def test_no_tokenizer_files(self, tmp_path):
        with pytest.raises(MissingFileError, match="tokenizer.model"):
            LlamaTokenizer.from_preset(tmp_path)

    def test_tokens_added_to_a_sentencepiece_model(self, assets, tmp_path):
        shutil.copyfile(assets / "models" / "stories260K" / "tokenizer.model", tmp_path / "tokenizer.model")
        settings = {"added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "512": {"content": "<pad>"}}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        tokenizer = LlamaTokenizer.from_preset(tmp_path)
        assert tokenizer.token_to_id("<pad>") == 512 and tokenizer.vocabulary_size() == 513
        settings["added_tokens_decoder"]["600"] = {"content": "<x>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        fault = re.escape(f"{tmp_path}/tokenizer_config.json: id of the added token '<x>' = 600; expected 513")
        with pytest.raises(CheckpointError, match=f"^{fault}"):
            LlamaTokenizer.from_preset(tmp_path)

    IM_END = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "single_word": False}

    @pytest.mark.parametrize(
        "files",
        [
            {"added_tokens.json": {"[PAD]": 32001, "<|im_end|>": 32000}},
            {"added_tokens_decoder": {"32000": {**IM_END, "special": True}, "32001": {"content": "[PAD]"}}},
            {"added_tokens_decoder": {"32000": {**IM_END, "normalized": True}, "32001": {"content": "[PAD]"}}},
        ],
    )
    def test_named_tokens_may_be_added_ones(self, assets, tmp_path, files):
        shutil.copyfile(assets / "tokenizers" / "llama2" / "tokenizer.model", tmp_path / "tokenizer.model")
        settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "[PAD]", "legacy": False}
        files = {"tokenizer_config.json": settings, **files}
        if "added_tokens_decoder" in files:
            settings["added_tokens_decoder"] = files.pop("added_tokens_decoder")
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        tokenizer = LlamaTokenizer.from_preset(tmp_path, parse_special=True)
        assert (tokenizer.end_token_id, tokenizer.pad_token_id) == (32000, 32001)
        assert tokenizer.special_tokens == ["<unk>", "<s>", "</s>", "<|im_end|>", "[PAD]"]
        # What transformers 5.23 makes of it.
        assert tokenizer("hi<|im_end|>x [PAD]").tolist() == [7251, 32000, 29916, 29871, 32001]
        text = LlamaTokenizer.from_preset(tmp_path)
        assert not {32000, 32001} & set(text("hi<|im_end|>x [PAD]").tolist())
        again = LlamaTokenizer.from_config(text.get_config())
        text.save_assets(str(tmp_path))
        again.load_assets(str(tmp_path))
        assert again.get_config() == text.get_config() and again.special_tokens == text.special_tokens

    def test_tokens_added_beside_a_vocab_json(self, assets, tmp_path):
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(assets / "tokenizers" / "gpt2" / name, tmp_path / name)
        settings = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}', encoding="utf-8")
        (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 50257, "<tool>": 50258}', encoding="utf-8")
        tokenizer = LlamaTokenizer.from_preset(tmp_path)
        assert (tokenizer.end_token_id, tokenizer.pad_token) == (50257, "<|endoftext|>")
        assert tokenizer.special_tokens == ["<|endoftext|>", "<|im_end|>"]
        assert tokenizer("hi<tool>")[-1] == 50258

    def test_special_tokens_by_id(self, tmp_path):
        config = {"bos_token_id": 5, "eos_token_id": [6, 0]}
        preprocessor = self.open(tmp_path, {"tokenizer.json": tiny_json(), "config.json": config})
        tokenizer = preprocessor.tokenizer
        assert (tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token) == ("<s>", "</s>", None)
        assert preprocessor.add_start_token and preprocessor.add_end_token

    @pytest.mark.parametrize(
        "settings, starts",
        [
            ({"tokenizer_class": "GPT2Tokenizer"}, False),
            ({"tokenizer_class": "LlamaTokenizer"}, True),
            ({"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, True),
            ({"bos_token": None}, False),
        ],
    )
    def test_whether_texts_get_a_start_token(self, tmp_path, settings, starts):
        settings = {"bos_token": "<s>", **settings}
        preprocessor = self.open(tmp_path, {"tokenizer.json": tiny_json(), "tokenizer_config.json": settings})
        assert preprocessor.add_start_token == starts
        assert not preprocessor.add_end_token  # no file names one

    def test_ids_without_an_embedding_row(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"'</s>' = 6; expected below 6"):
            self.open(tmp_path, {"tokenizer.json": tiny_json()}, rows=6)

    @pytest.mark.parametrize(
        "files, fault",
        [
            ({"config.json": {"bos_token_id": 7}}, "start_token = 7"),
            ({"tokenizer_config.json": {"eos_token": "<eos>"}}, "end_token = '<eos>'"),
            ({"tokenizer_config.json": {"pad_token": "<pad>"}}, "pad_token = '<pad>'"),
        ],
    )
    def test_tokens_that_the_vocabulary_lacks(self, tmp_path, files, fault):
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path)) + f".*{fault}"):
            self.open(tmp_path, {"tokenizer.json": tiny_json(), **files})


class TestSources:
    def test_all_sources_are_one(self, tmp_path):
        text = json.dumps(tiny_json())
        path = tmp_path / "tokenizer.json"
        path.write_text(text, encoding="utf-8")
        sources = (path, str(path), text, tiny_json(), tokenizers.Tokenizer.from_str(text))
        assert [LlamaTokenizer(source)("abc").tolist() for source in sources] == [[0, 3]] * 5

    def test_arguments_are_left_alone(self):
        # KH-S9
        content = tiny_json()
        before = copy.deepcopy(content)
        encoder = tokenizers.Tokenizer.from_str(json.dumps(content))
        written = encoder.to_str()
        LlamaTokenizer(content, start_token="a")
        LlamaTokenizer(encoder, start_token="a")
        assert content == before and encoder.to_str() == written and not encoder.encode_special_tokens

    def test_no_file(self, tmp_path):
        for path in (tmp_path / "nothing.json", tmp_path, "x" * 10_000, "a\0b"):
            with pytest.raises(MissingFileError):
                LlamaTokenizer(path)
        with pytest.raises(TypeError, match="received int"):
            LlamaTokenizer(3)


def damaged(edit) -> str:
    content = copy.deepcopy(BARE)
    edit(content)
    return json.dumps(content)


def damaged_added(**fields) -> str:
    content = tiny_json()
    content["added_tokens"][1].update(fields)
    return json.dumps(content)


BAD_FILES = {
    "empty": "{",
    "truncated": json.dumps(tiny_json())[:-40],
    "no model": "{}",
    "not an object": "{} []",
    "deep": '{"a":' + "[" * 100_000,
    "duplicate key": json.dumps(BARE).replace('"a": 0', '"a": 0, "a": 0'),
    "duplicate id": damaged(lambda content: content["model"]["vocab"].update(z=3)),
    "added token takes an id": damaged_added(id=0),
    "added token out of order": damaged_added(id=60),
    "added token differs": damaged_added(content="a"),
    "negative id": damaged(lambda content: content["model"]["vocab"].update(z=-1)),
    "id of 2^22": damaged(lambda content: content["model"]["vocab"].update(z=2**22)),
    "id of 2^31": damaged(lambda content: content["model"]["vocab"].update(z=2**31)),
    "id of 2^32": damaged(lambda content: content["model"]["vocab"].update(z=2**32)),
    "float id": damaged(lambda content: content["model"]["vocab"].update(z=7.5)),
    "null id": damaged(lambda content: content["model"]["vocab"].update(z=None)),
    "no tokens": '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "merge of an unknown token": damaged(lambda content: content["model"].update(merges=["b z"])),
    "merge of one": damaged(lambda content: content["model"].update(merges=["b"])),
    "merge of three": damaged(lambda content: content["model"].update(merges=[["a", "b", "c"]])),
    "merge twice": damaged(lambda content: content["model"].update(merges=["b c", "b c"])),
    "broken regex": damaged(
        lambda content: content.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
        )
    ),
    "lone surrogate": '{"model": "\\ud800"}',
}


class TestBadFiles:
    @pytest.mark.parametrize("fault", BAD_FILES)
    def test_damaged(self, fault):
        with pytest.raises(CheckpointError):
            LlamaTokenizer(BAD_FILES[fault])

    def test_random_bytes(self, tmp_path):
        rng = np.random.default_rng(1)
        path = tmp_path / "tokenizer.json"
        for size in (0, 1, 100, 10_000):
            path.write_bytes(rng.bytes(size))
            with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
                LlamaTokenizer(path)

    def test_cut_anywhere(self):
        text = json.dumps(tiny_json())
        for length in range(1, len(text), 7):
            with pytest.raises(CheckpointError):
                LlamaTokenizer(text[:length])

    def test_huge(self, tmp_path, monkeypatch):
        assert tokenizer_json.MAX_BYTES == 64 * 2**20
        monkeypatch.setattr(tokenizer_json, "MAX_BYTES", 1000)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(tiny_json()) + " " * 1000, encoding="utf-8")
        with pytest.raises(CheckpointError, match="size = more than 1000 bytes"):
            LlamaTokenizer(path)

    def test_a_dict_that_is_no_json(self):
        with pytest.raises(CheckpointError):
            LlamaTokenizer({"model": {1, 2}})

    def test_a_panic_of_the_regex_is_an_error_of_the_file(self, capfd):
        tokenizer = LlamaTokenizer(tiny_json())
        # No file gets such a pattern in; one that the check of patterns lets through must still be contained.
        pattern = tokenizers.Regex("(a+)+$")
        tokenizer._vocabulary.encoder.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
        for texts in ("a" * 40 + "c", ["a", "a" * 40 + "c"]):
            with pytest.raises(CheckpointError, match="retry-limit"):
                tokenizer(texts)
        assert tokenizer("a").tolist() == [0]

    @pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit, MemoryError])
    def test_interrupts_pass_through(self, signal):
        with pytest.raises(signal), tokenizer_json.rust_errors("x"):
            raise signal


OPTIONS = {
    "start_token": "<s>",
    "end_token": "</s>",
    "pad_token": "c",
    "parse_special": True,
    "legacy": None,
    "add_prefix_space": None,
    "chat_template": {"default": "llama3", "tool_use": "{{ tools }}"},
    "dtype": "int64",
    "name": "other",
    "trainable": False,
    "config_file": "other.json",
}


class TestSaving:
    def test_config_holds_every_argument_but_the_vocabulary(self):
        tokenizer = tiny(**OPTIONS)
        config = tokenizer.get_config()
        assert set(config) == set(OPTIONS)
        assert {key: value for key, value in config.items() if key != "dtype"} == {
            key: value for key, value in OPTIONS.items() if key != "dtype"
        }
        again = LlamaTokenizer.from_config(json.loads(json.dumps(config)))
        assert again.get_config() == config and again.dtype == "int64"

    def test_keras_serialization(self):
        # KH-S8: the end token survives.
        config = keras.saving.serialize_keras_object(tiny(**OPTIONS))
        assert config["registered_name"] == "kllama>LlamaTokenizer"
        assert keras.saving.deserialize_keras_object(json.loads(json.dumps(config))).end_token == "</s>"

    def test_a_config_names_no_file(self, tmp_path):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(tiny_json()), encoding="utf-8")
        with pytest.raises(CheckpointError, match="expected no such key"):
            LlamaTokenizer.from_config({"tokenizer": str(path)})

    @pytest.mark.parametrize("folder", GOLDENS)
    def test_assets(self, assets, folder, tmp_path):
        tokenizer = opened(assets, folder)
        assert tokenizer.file_assets == ["tokenizer.json"]
        tokenizer.save_assets(str(tmp_path))
        again = LlamaTokenizer()
        again.load_assets(str(tmp_path))
        texts = golden(assets, "mixed_text")["texts"]
        assert again(texts) == tokenizer(texts) and again.get_vocabulary() == tokenizer.get_vocabulary()

    def test_assets_with_another_vocabulary(self, tmp_path):
        tiny().save_assets(str(tmp_path))
        with pytest.raises(CheckpointError, match="start_token = '<bos>'"):
            LlamaTokenizer(start_token="<bos>").load_assets(str(tmp_path))

    def test_assets_that_are_not_there(self, tmp_path):
        with pytest.raises(MissingFileError):
            LlamaTokenizer().load_assets(str(tmp_path))
        with pytest.raises(MissingFileError) as caught:
            LlamaTokenizer().load_assets(None)
        assert "not in the saved model" in caught.value.args[0]

    def test_preset_layout(self, tmp_path):
        tiny(**{**OPTIONS, "config_file": "tokenizer.json"}).save_to_preset(str(tmp_path))
        assert (tmp_path / "tokenizer.json").is_file() and (tmp_path / "assets/tokenizer/tokenizer.json").is_file()
        config = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
        again = keras.saving.deserialize_keras_object(config)
        again.load_preset_assets(str(tmp_path))
        assert again("a</s>").tolist() == [0, 6] and again.pad_token_id == 2

    def test_pickle_and_copy(self):
        for again in (pickle.loads(pickle.dumps(tiny(**OPTIONS))), copy.deepcopy(tiny(**OPTIONS))):
            assert again("bc</s>").tolist() == [3, 6] and again.get_config() == tiny(**OPTIONS).get_config()

    def test_a_llama2c_vocabulary_with_runs_of_spaces(self, tmp_path):
        # Two ways to make three spaces, which look alike when joined by a space.
        pieces = [("<unk>", 0), ("\n<s>\n", 0), ("\n</s>\n", 0), *((f"<0x{byte:02X}>", 0) for byte in range(256))]
        pieces += [("  ", -1), ("   ", -2), (" ", -3), ("a", -4)]
        entries = [struct.pack("<fi", score, len(piece)) + piece.encode() for piece, score in pieces]
        path = tmp_path / "tokenizer.bin"
        path.write_bytes(struct.pack("<I", 8) + b"".join(entries))
        tokenizer = LlamaTokenizer(path)
        ids = tokenizer("a    a").tolist()
        assert 260 in tokenizer("  a")
        tokenizer.save_to_preset(str(tmp_path / "preset"))
        copies = [copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))]
        vocabulary = pickle.loads(pickle.dumps(tokenizer._vocabulary))
        assert vocabulary.encoder.encode("a    a", add_special_tokens=False).ids == ids
        for again in (*copies, LlamaTokenizer.from_preset(tmp_path / "preset")):
            assert again("a    a").tolist() == ids and again.get_vocabulary() == tokenizer.get_vocabulary()

    def test_special_spellings_stay_text_in_a_copy(self):
        # What a data loader does to its workers' tokenizer.
        tokenizer = tiny(start_token="<s>")
        for again in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
            assert 5 not in again("a<s>b") and again("a<s>b").tolist() == tokenizer("a<s>b").tolist()

    def test_is_a_keras_hub_tokenizer(self):
        assert issubclass(LlamaTokenizer, keras_hub.tokenizers.Tokenizer)
        assert keras.saving.get_registered_object("kllama>LlamaTokenizer") is LlamaTokenizer

    @pytest.mark.backend_independent
    def test_config_does_not_depend_on_the_hash_seed(self, tmp_path):
        # KH-S10
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(tiny_json()), encoding="utf-8")
        vocabulary = {token: token_id for token_id, token in enumerate(["<s>", "[A]", "a", "[B]", "</s>", "[C]"])}
        code = (
            "import json; from kllama.text.tokenizer import LlamaTokenizer; "
            f"t = LlamaTokenizer({str(path)!r}, start_token='<s>', end_token='</s>', pad_token='a'); "
            "print(json.dumps(t.get_config()), t.special_tokens, t.special_token_ids)\n"
            f"t = LlamaTokenizer({vocabulary}, [], bos_token='<s>', eos_token='</s>', "
            "misc_special_tokens={'[A]', '[B]', '[C]', '<s>'}); "
            "print(json.dumps(t.get_config()), t.special_tokens, t._loaded().encoder.to_str())"
        )
        runs = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code],
                env={**os.environ, "PYTHONHASHSEED": seed},
                stdout=subprocess.PIPE,
                text=True,
            )
            for seed in ("0", "1")
        ]
        first, second = [run.communicate()[0] for run in runs]
        assert first == second and "start_token" in first and "[B]" in first


class TestTensorFlowGraph:
    @pytest.fixture
    def tf(self):
        return pytest.importorskip("tensorflow", reason="tokenizing in a tf.data pipeline needs TensorFlow")

    @pytest.mark.parametrize("folder", ["tokenizers/llama3_2", "models/stories15M"])
    def test_ids_are_those_of_an_eager_call(self, tf, assets, folder):
        # KH-T2
        tokenizer = opened(assets, folder)
        texts = golden(assets, "mixed_text")["texts"]
        expected = tokenizer(texts)
        dataset = tf.data.Dataset.from_tensor_slices(texts)
        singles = [ids.numpy().tolist() for ids in dataset.map(tokenizer, num_parallel_calls=2)]
        batches = [row for batch in dataset.batch(50).map(tokenizer) for row in batch.to_list()]
        assert singles == expected and batches == expected

    def test_element_types(self, tf):
        dataset = tf.data.Dataset.from_tensor_slices(["a", "bc"])
        assert dataset.map(tiny()).element_spec == tf.TensorSpec((None,), "int32")
        assert dataset.map(tiny(dtype="int64")).element_spec.dtype == tf.int64
        ragged = dataset.batch(2, drop_remainder=True).map(tiny()).element_spec
        assert ragged == tf.RaggedTensorSpec((2, None), "int32")

    def test_function_and_eager_tensors(self, tf):
        tokenizer = tiny()
        assert tf.function(tokenizer.tokenize)(tf.constant("bca")).numpy().tolist() == [3, 0]
        assert tf.function(lambda: tokenizer("bca"))().numpy().tolist() == [3, 0]
        assert tokenizer(tf.constant("bca")).tolist() == [3, 0]
        assert tokenizer(tf.constant(["bca", ""])) == [[3, 0], []]

    def test_bytes_that_are_no_utf8(self, tf, assets):
        tokenizer = opened(assets, "tokenizers/llama3_2")
        dataset = tf.data.Dataset.from_tensor_slices([b"a\xff\0b"]).map(tokenizer)
        assert tokenizer.detokenize(next(iter(dataset))) == "a\ufffd\0b"

    def test_numbers_are_refused(self, tf):
        with pytest.raises(TypeError, match="expected a string tensor"):
            tf.data.Dataset.from_tensor_slices([1, 2]).map(tiny())

    @pytest.mark.parametrize("folder", ["tokenizers/llama3_2", "models/stories15M"])
    def test_texts_are_those_of_an_eager_call(self, tf, assets, folder):
        tokenizer = opened(assets, folder)
        texts = [text for text in golden(assets, "mixed_text")["texts"] if text][:40]
        ids = tf.data.Dataset.from_tensor_slices(texts).map(tokenizer)
        singles = [text.numpy().decode() for text in ids.map(tokenizer.detokenize)]
        batches = ids.ragged_batch(16).map(tokenizer.detokenize)
        assert singles == [tokenizer.detokenize(tokenizer(text)) for text in texts]
        assert [text.decode() for batch in batches.as_numpy_iterator() for text in batch] == singles

    def test_decoding_shapes(self, tf):
        decode = tf.function(tiny().detokenize)
        assert decode(tf.constant(0)).numpy() == b"a" and decode(tf.constant([0, 3])).numpy() == b"a bc"
        assert decode(tf.constant([[0, 3], [1, 1]])).numpy().tolist() == [b"a bc", b"b b"]
        assert decode(tf.ragged.constant([[0], [], [3, 0]], dtype="int32")).numpy().tolist() == [b"a", b"", b"bc a"]
        with pytest.raises(TypeError, match="expected a tensor of integers"):
            decode(tf.constant([0.5]))
        with pytest.raises(Exception, match="99"):
            decode(tf.constant([99]))
