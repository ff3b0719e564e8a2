"""KerasHub's way to construct and to call a tokenizer, against KerasHub's own classes."""

import copy
import json

import keras
import keras_hub
import numpy as np
import pytest

from kllama.errors import CheckpointError, MissingFileError
from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.tokenizer import LlamaTokenizer

START, END, TURN_END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
SPECIAL = [START, END, "<|start_header_id|>", "<|end_header_id|>", TURN_END]
MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 w", "o r", "\u0120w or", "l d", "\u0120wor ld"]
TEXTS = ["hello world", "hello", "world hello world hello"]


def vocabulary(special=tuple(SPECIAL)) -> dict[str, int]:
    tokens = [character for character in "!dehlorw\u0120"] + [merge.replace(" ", "") for merge in MERGES]
    return {token: token_id for token_id, token in enumerate([*tokens, *special])}


def llama3(**kwargs) -> LlamaTokenizer:
    return LlamaTokenizer(**{"vocabulary": vocabulary(), "merges": list(MERGES), **kwargs})


@pytest.fixture(scope="module")
def proto(assets):
    return assets / "models/stories260K/tokenizer.model"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    (tmp_path / "pairs.txt").write_text("#version: 0.2\n" + "\n".join(MERGES), encoding="utf-8")
    return {"vocabulary": tmp_path / "ids.json", "merges": str(tmp_path / "pairs.txt")}


class TestSentencePiece:
    def test_path_and_bytes(self, proto):
        theirs = keras_hub.tokenizers.LlamaTokenizer(proto=str(proto))
        expected = theirs(TEXTS)
        data = proto.read_bytes()
        for ours in (LlamaTokenizer(proto=str(proto)), LlamaTokenizer(proto=data), LlamaTokenizer(data)):
            assert ours(TEXTS) == expected
            assert (ours.start_token_id, ours.end_token_id, ours.pad_token_id) == (1, 2, 0)

    def test_start_and_end_are_needed_unless_others_are_named(self, assets):
        gpt2 = str(assets / "tokenizers/gpt2/tokenizer.json")
        with pytest.raises(ValueError, match="start_token = '<s>'; expected one of"):
            LlamaTokenizer(proto=gpt2)
        with pytest.raises(ValueError, match="end_token = '</s>'; expected one of"):
            LlamaTokenizer(proto=gpt2, start_token=None)
        assert LlamaTokenizer(proto=gpt2, bos_token=None, eos_token="<|endoftext|>").end_token_id == 50256


class TestLlama3:
    def test_forms_of_the_pair(self, files):
        expected = keras_hub.tokenizers.Llama3Tokenizer(vocabulary=vocabulary(), merges=list(MERGES))(TEXTS)
        both = [
            llama3(),
            LlamaTokenizer(vocabulary(), MERGES),
            LlamaTokenizer(**files),
            LlamaTokenizer(files["vocabulary"], tuple(MERGES)),
            LlamaTokenizer(vocabulary=vocabulary(), merges=iter(MERGES)),
            LlamaTokenizer(
                vocabulary={token: np.int64(i) for token, i in vocabulary().items()}, merges=files["merges"]
            ),
        ]
        for ours in both:
            assert ours(TEXTS) == expected
            assert (ours.start_token, ours.end_token, ours.pad_token_id) == (START, END, 0)
            assert ours.special_tokens == SPECIAL and ours.adds_start_token

    def test_numbers_are_split_as_llama_3_splits_them(self):
        vocab = {**vocabulary(), "12": 90, "1": 91, "2": 92, "3": 93, "4": 94}
        assert llama3(vocabulary=vocab, merges=["1 2"])("1234").tolist() == [90, 93, 94]

    def test_other_tokens(self):
        vocab = vocabulary(["<s>", "</s>", "[INST]", "[X]"])
        ours = llama3(vocabulary=vocab, bos_token="<s>", eos_token="</s>", misc_special_tokens={"[INST]", "<s>"})
        assert ours.special_tokens == ["<s>", "</s>", "[INST]"] and ours.adds_start_token
        assert (ours.start_token, ours.end_token) == ("<s>", "</s>")
        ids = LlamaCausalLMPreprocessor(ours, sequence_length=4)("hello")[0]["token_ids"]
        assert keras.ops.convert_to_numpy(ids).tolist() == [vocab["<s>"], vocab["hello"], vocab["</s>"], 0]

    def test_eot_id_as_the_end_survives(self, tmp_path):
        # KH-S8
        ours = llama3(eos_token=TURN_END)
        assert LlamaTokenizer.from_config(ours.get_config()).end_token == TURN_END
        LlamaCausalLMPreprocessor(ours).save_to_preset(str(tmp_path))
        again = LlamaTokenizer.from_preset(tmp_path)
        assert again.end_token == TURN_END and again(TEXTS) == ours(TEXTS)
        assert LlamaTokenizer.from_preset(tmp_path, eos_token=END).end_token == END

    def test_a_base_vocabulary_without_eot_id(self):
        # KH-S11
        ours = llama3(vocabulary=vocabulary(SPECIAL[:2]))
        assert ours.end_token == END and ours.special_tokens == [START, END]

    def test_no_merges(self, files):
        # KH-T11
        open(files["merges"], "w").close()
        letters = {token: token_id for token_id, token in enumerate([*"ehlo", "\u0120", *SPECIAL])}
        for merges in ([], files["merges"]):
            ids = llama3(vocabulary=letters, merges=merges)("hell o").tolist()
            assert ids == [letters[token] for token in ("h", "e", "l", "l", "\u0120", "o")]

    def test_a_second_end_token(self, proto):
        theirs = keras_hub.tokenizers.Llama3Tokenizer(vocabulary=vocabulary(), merges=list(MERGES))
        assert llama3().end_token2_id == theirs.end_token2_id == vocabulary()[TURN_END]
        for other in (llama3(eos_token=TURN_END), llama3(vocabulary=vocabulary(SPECIAL[:2])), LlamaTokenizer(proto)):
            assert not hasattr(other, "end_token2_id")

    def test_arguments_are_left_alone(self):
        # KH-S9
        given = {"vocabulary": vocabulary(), "merges": list(MERGES), "misc_special_tokens": {START, END, TURN_END}}
        before = copy.deepcopy(given)
        tokenizer = LlamaTokenizer(**given)
        tokenizer.add_tokens("new")
        assert given == before and list(given["vocabulary"]) == list(before["vocabulary"])

    def test_the_config_holds_kllamas_own_arguments(self):
        config = llama3(bos_token=END, misc_special_tokens=[TURN_END], sequence_length=None).get_config()
        assert set(config) == set(LlamaTokenizer().get_config()) and config["start_token"] == END
        assert LlamaTokenizer.from_config(json.loads(json.dumps(config))).get_config() == config


CONTRADICTIONS = {
    "tokenizer and proto": {"tokenizer": "a", "proto": "b"},
    "tokenizer and vocabulary": {"tokenizer": {}, "vocabulary": {}, "merges": []},
    "proto and vocabulary": {"proto": "a", "vocabulary": {}},
    "proto and merges": {"proto": "a", "merges": []},
    "merges without vocabulary": {"merges": []},
    "vocabulary without merges": {"vocabulary": {}},
    "misc_special_tokens .*without vocabulary and merges": {"tokenizer": "a", "misc_special_tokens": {"b"}},
    "bos_token = '<s>' and start_token = '<t>'": {"bos_token": "<s>", "start_token": "<t>"},
    "eos_token = None and end_token = 3": {"eos_token": None, "end_token": 3},
}
ELSEWHERE = {
    "sequence_length": (8, "to the preprocessor"),
    "add_bos": (True, "add_start_token=True"),
    "add_eos": (True, "add_end_token=True"),
    "unsplittable_tokens": (["<x>"], "parse_special=True"),
    "dtype": ("string", "id_to_token"),
}
WRONG = {
    "vocabulary = 3; expected ids": {"vocabulary": 3},
    "vocabulary has 5; expected a str": {"vocabulary": {5: 0}},
    r"vocabulary\['a'\] = 1.5; expected an integer": {"vocabulary": {"a": 1.5}},
    "merges = 3; expected a list": {"merges": 3},
    r"merges\[1\] = \('a', 'b'\); expected a str": {"merges": ["h e", ("a", "b")]},
    "misc_special_tokens = '<x>'; expected a set": {"misc_special_tokens": "<x>"},
    "misc_special_tokens has 5; expected a str": {"misc_special_tokens": [5]},
}
DAMAGED = {
    "id of .x. = 0": {"vocabulary": {**vocabulary(), "x": 0}},
    "id of .x. = -1": {"vocabulary": {**vocabulary(), "x": -1}},
    "merges: line 1: .h z.; expected two|merges: line 1: .z.; expected a token": {"merges": ["h z"]},
    "merges: line 2: .h e.; expected another": {"merges": ["h e", "h e"]},
    "special token = '<x>'; expected one of its 23": {"misc_special_tokens": ["<x>"]},
    "special token = '<s>'; expected one of its 23": {"bos_token": "<s>"},
    "end_token = '</s>'; expected one of": {"eos_token": "</s>"},
}


class TestWrong:
    @pytest.mark.parametrize("fault", CONTRADICTIONS)
    def test_contradictions(self, fault):
        with pytest.raises(ValueError, match=fault):
            LlamaTokenizer(**CONTRADICTIONS[fault])

    @pytest.mark.parametrize("name", ELSEWHERE)
    def test_what_is_done_elsewhere(self, name):
        value, advice = ELSEWHERE[name]
        with pytest.raises(ValueError, match=f"{name} = .*{advice}"):
            llama3(**{name: value})

    def test_the_values_that_ask_for_nothing(self):
        nothing = {"sequence_length": None, "add_bos": False, "add_eos": False, "unsplittable_tokens": None}
        assert llama3(**nothing, add_prefix_space=False)(TEXTS) == llama3()(TEXTS)
        assert LlamaTokenizer(vocabulary=None, merges=None, proto=None, misc_special_tokens=None).end_token == "auto"

    @pytest.mark.parametrize("fault", WRONG)
    def test_types(self, fault):
        with pytest.raises(TypeError, match=fault):
            llama3(**WRONG[fault])

    @pytest.mark.parametrize("fault", DAMAGED)
    def test_vocabularies(self, fault):
        with pytest.raises(CheckpointError, match=fault):
            llama3(**DAMAGED[fault])

    @pytest.mark.parametrize("name", ["vocabulary", "merges"])
    def test_no_file(self, files, name):
        with pytest.raises(MissingFileError, match="nowhere"):
            LlamaTokenizer(**{**files, name: "nowhere"})

    @pytest.mark.parametrize("name", ["tokenizer", "proto", "vocabulary", "merges"])
    def test_a_config_names_no_file(self, files, name):
        with pytest.raises(CheckpointError, match=f"{name} = .*expected no such key"):
            LlamaTokenizer.from_config({name: files["merges"]})


def few(tokenizer) -> list[int]:
    return [tokenizer.token_to_id("h"), tokenizer.token_to_id("e")]


CALLS = {
    "str": lambda tokenizer: tokenizer("hello"),
    "list": lambda tokenizer: tokenizer(["hello", "hello world"]),
    "tuple": lambda tokenizer: tokenizer(("hello",)),
    "empty": lambda tokenizer: tokenizer(""),
    "no texts": lambda tokenizer: tokenizer([]),
    "tokenize": lambda tokenizer: tokenizer.tokenize("hello"),
    "vocabulary": lambda tokenizer: list(tokenizer.get_vocabulary()),
    "size": lambda tokenizer: tokenizer.vocabulary_size(),
    "token": lambda tokenizer: tokenizer.id_to_token(3),
    "token of an array's id": lambda tokenizer: tokenizer.id_to_token(np.int32(3)),
    "id": lambda tokenizer: tokenizer.token_to_id("h"),
    "text of a list": lambda tokenizer: tokenizer.detokenize(few(tokenizer)),
    "text of lists": lambda tokenizer: tokenizer.detokenize([few(tokenizer), few(tokenizer)[:1]]),
    "text of an array": lambda tokenizer: tokenizer.detokenize(np.array([few(tokenizer)] * 2)),
    "text of a tensor": lambda tokenizer: tokenizer.detokenize(keras.ops.convert_to_tensor(few(tokenizer))),
    "text of an int": lambda tokenizer: tokenizer.detokenize(few(tokenizer)[0]),
    "text of nothing": lambda tokenizer: tokenizer.detokenize([]),
    "start": lambda tokenizer: (tokenizer.start_token, tokenizer.start_token_id),
    "end": lambda tokenizer: (tokenizer.end_token, tokenizer.end_token_id),
    "padding": lambda tokenizer: tokenizer.pad_token_id,
}
TF_CALLS = {
    "string": lambda tf, tokenizer: tokenizer(tf.constant("hello")),
    "strings": lambda tf, tokenizer: tokenizer(tf.constant(["hello", "hello world"])),
    "text of a tensor": lambda tf, tokenizer: tokenizer.detokenize(tf.constant(few(tokenizer))),
    "texts of a ragged tensor": lambda tf, tokenizer: tokenizer.detokenize(
        tf.ragged.constant([few(tokenizer), few(tokenizer)[:1]])
    ),
}
TF_DATA_CALLS = {
    "texts": lambda tf, tokenizer: next(iter(tf.data.Dataset.from_tensor_slices(["hello"]).map(tokenizer))).numpy(),
    "batches": lambda tf, tokenizer: next(
        iter(tf.data.Dataset.from_tensor_slices(["hello", "hello world"]).batch(2).map(tokenizer))
    ).to_list(),
}


@pytest.fixture(scope="module", params=["sentencepiece", "llama3"])
def pair(request, proto):
    if request.param == "llama3":
        given = {"vocabulary": vocabulary(), "merges": list(MERGES)}
        return keras_hub.tokenizers.Llama3Tokenizer(**given), LlamaTokenizer(**given)
    return keras_hub.tokenizers.LlamaTokenizer(proto=str(proto)), LlamaTokenizer(proto=str(proto))

    @pytest.mark.parametrize("name", ["tokenizer", "proto", "merges"])
    def test_another_vocabulary_than_the_checkpoints(self, name):
        with pytest.raises(ValueError, match=f"{name} with a checkpoint"):
            LlamaTokenizer.from_preset("stories_1m_en", **{name: "vocabulary.spm"})


class TestCalls:
    """The same types and values, on the backend of the run, for both kinds of vocabulary."""

    @pytest.fixture
    def tf(self):
        return pytest.importorskip("tensorflow", reason="it compares what TensorFlow's tensors give")

    def same(self, theirs, ours):
        assert type(ours) is type(theirs)
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype
        np.testing.assert_equal(ours, theirs)

    @pytest.mark.parametrize("call", CALLS)
    def test_eager(self, pair, call):
        self.same(*map(CALLS[call], pair))

    @pytest.mark.parametrize("call", TF_CALLS)
    def test_tensors_of_tensorflow(self, tf, pair, call):
        self.same(*(TF_CALLS[call](tf, tokenizer) for tokenizer in pair))

    @pytest.mark.parametrize("call", TF_DATA_CALLS)
    def test_tf_data(self, tf, proto, call):
        # KerasHub's byte-pair graph takes seconds, and its ids are not Llama 3's: see KH-T2.
        theirs = keras_hub.tokenizers.LlamaTokenizer(proto=str(proto))
        self.same(TF_DATA_CALLS[call](tf, theirs), TF_DATA_CALLS[call](tf, LlamaTokenizer(proto=proto)))
