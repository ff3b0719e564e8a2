"""The preprocessor against KerasHub's own, and where it must differ from it."""

import copy
import json
import pickle

import keras
import keras_hub
import numpy as np
import pytest

from kllama.text.preprocessor import LlamaCausalLMPreprocessor
from kllama.text.tokenizer import LlamaTokenizer
from tests.letters import chat_letters, letters

TEXTS = ["hello", "", "the dog is very very very happy", "a\nb"]


@pytest.fixture(scope="module")
def stories(assets) -> LlamaTokenizer:
    return LlamaTokenizer(assets / "models/stories260K/tokenizer.json", start_token="<s>", end_token="</s>")


@pytest.fixture(scope="module")
def llama3(assets) -> LlamaTokenizer:
    return LlamaTokenizer(
        assets / "tokenizers/llama3_2/tokenizer.json", start_token="<|begin_of_text|>", end_token="<|eot_id|>"
    )


def to_numpy(outputs):
    return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)


def assert_equal(outputs, expected):
    """Equal values, dtypes, shapes and structure."""
    keras.tree.assert_same_structure(outputs, expected)
    for output, other in zip(keras.tree.flatten(outputs), keras.tree.flatten(expected), strict=True):
        assert keras.ops.is_tensor(output) == keras.ops.is_tensor(other)
        output, other = to_numpy(output), to_numpy(other)
        assert output.dtype == other.dtype and output.shape == other.shape
        assert output.tolist() == other.tolist()


class TestAgainstKerasHub:
    @pytest.fixture
    def pair(self, assets, stories):
        pytest.importorskip("sentencepiece", reason="KerasHub's Llama tokenizer needs sentencepiece")
        reference = keras_hub.models.LlamaTokenizer(proto=str(assets / "models/stories260K/tokenizer.model"))

        def build(**kwargs):
            reference_preprocessor = keras_hub.models.LlamaCausalLMPreprocessor(reference, **kwargs)
            return LlamaCausalLMPreprocessor(stories, **kwargs), reference_preprocessor

        return build

    @pytest.mark.parametrize("inputs", ["hello", "", TEXTS, TEXTS[:1], np.array(["a", "b"])])
    @pytest.mark.parametrize("start", [True, False])
    @pytest.mark.parametrize("end", [True, False])
    @pytest.mark.parametrize("length", [1, 6, 40])
    def test_training(self, pair, inputs, start, end, length):
        ours, reference = pair(sequence_length=length, add_start_token=start, add_end_token=end)
        assert_equal(ours(inputs), reference(inputs))
        assert_equal(ours(inputs, sequence_length=7), reference(inputs, sequence_length=7))

    @pytest.mark.parametrize("inputs", ["hello", "", TEXTS])
    def test_generation(self, pair, inputs):
        ours, reference = pair(sequence_length=40)
        prompt = ours.generate_preprocess(inputs)
        assert_equal(prompt, reference.generate_preprocess(inputs))
        assert ours.generate_postprocess(prompt) == reference.generate_postprocess(prompt)
        wide = ours.generate_preprocess(inputs, sequence_length=50)
        assert_equal(wide, reference.generate_preprocess(inputs, sequence_length=50))

    def test_labels_are_made_here(self, pair):
        ours, reference = pair(sequence_length=6)
        assert_equal(ours(TEXTS, [1, 2, 3, 4], [0, 0, 0, 0]), reference(TEXTS, [1, 2, 3, 4], [0, 0, 0, 0]))

    def test_config_keys(self, pair):
        ours, reference = pair()
        assert set(ours.get_config()) == {*reference.get_config(), "loss_on", "truncate"}
        assert ours.get_config()["sequence_length"] == reference.get_config()["sequence_length"] == 1024


class TestTraining:
    def test_rows(self):
        x, y, sample_weight = to_numpy(LlamaCausalLMPreprocessor(letters(), sequence_length=5)(["ab", "abcabc"]))
        assert x["token_ids"].tolist() == [[3, 0, 1, 4, 0], [3, 0, 1, 2, 0]]
        assert x["padding_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
        assert y.tolist() == [[0, 1, 4, 0, 0], [0, 1, 2, 0, 4]]
        assert sample_weight.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]

    def test_a_pad_id_that_is_a_real_token_is_trained_on(self):
        # KH-T6: "a" has the id that fills the rows.
        x, y, sample_weight = to_numpy(LlamaCausalLMPreprocessor(letters(), sequence_length=6)("aba"))
        assert x["padding_mask"].tolist() == [1, 1, 1, 1, 1, 0]
        assert y.tolist() == [0, 1, 0, 4, 0, 0] and sample_weight.tolist() == [1, 1, 1, 1, 0, 0]

    def test_pad_token(self):
        tokenizer = letters(pad_token="c")
        x, _, _ = to_numpy(LlamaCausalLMPreprocessor(tokenizer, sequence_length=5)("a"))
        assert x["token_ids"].tolist() == [3, 0, 4, 2, 2] and x["padding_mask"].tolist() == [1, 1, 1, 0, 0]

    def test_no_texts(self):
        x, y, _ = to_numpy(LlamaCausalLMPreprocessor(letters(), sequence_length=5)([]))
        assert x["token_ids"].shape == y.shape == (0, 5)

    def test_a_row_that_is_no_text(self):
        with pytest.raises(TypeError, match=r"texts\[1\] = None"):
            LlamaCausalLMPreprocessor(letters())(["a", None])

    def test_a_token_to_add_that_the_tokenizer_lacks(self):
        preprocessor = LlamaCausalLMPreprocessor(letters(start_token=None))
        with pytest.raises(ValueError, match="add_start_token = True, but start_token of the tokenizer = None"):
            preprocessor("a")
        preprocessor = LlamaCausalLMPreprocessor(letters(end_token=None))
        with pytest.raises(ValueError, match="add_end_token=False"):
            preprocessor("a")
        assert to_numpy(preprocessor.generate_preprocess("a", 2))["token_ids"].tolist() == [3, 0]


def ask(text: str, *replies: str) -> list[dict]:
    """A conversation: the user says one thing, the assistant each of the others."""
    said = [("user", text), *(("assistant", reply) for reply in replies)]
    return [{"role": role, "content": content} for role, content in said]


PAIRS = {"prompts": ["ab", "", "abca"], "responses": ["c", "ba", "bcab"]}
CHATS = {"messages": [ask("ab", "c"), ask("", "b", "a")]}


class TestReplies:
    """What is counted of prompts with responses and of conversations, and what a row of them looks like."""

    def rows(self, x, length=8, **options):
        """The ids of each row, real ones only, and those among them that the loss counts."""
        inputs, y, weights = to_numpy(LlamaCausalLMPreprocessor(chat_letters(), length, **options)(x))
        lengths = inputs["padding_mask"].sum(-1)
        ids = [row[:n].tolist() for row, n in zip(inputs["token_ids"], lengths, strict=True)]
        return ids, [row[counts].tolist() for row, counts in zip(y, weights.astype(bool), strict=True)]

    def test_prompts_and_responses(self):
        ids, counted = self.rows(PAIRS)
        assert ids == [[3, 0, 1, 2, 4], [3, 1, 0, 4], [3, 0, 1, 2, 0, 1, 2, 0]]  # the last one is cut
        assert counted == [[2, 4], [1, 0, 4], [1, 2, 0, 4]]

    def test_prompts_are_those_that_generation_sees(self, stories):
        preprocessor = LlamaCausalLMPreprocessor(stories, 40)
        prompt, response = "Once upon a time", " there was a fox."
        x, _, weights = to_numpy(preprocessor({"prompts": prompt, "responses": response}))
        ids = [*preprocessor.prompt_rows(prompt)[0], *stories.tokenize([response])[0], stories.end_token_id]
        assert x["token_ids"][: x["padding_mask"].sum()].tolist() == ids
        assert weights.sum() == len(stories.tokenize([response])[0]) + 1

    @pytest.mark.parametrize("start", [True, False])
    @pytest.mark.parametrize("end", [True, False])
    def test_boundaries(self, start, end):
        # KH-T4
        ids, counted = self.rows(PAIRS, add_start_token=start, add_end_token=end)
        assert ids[0] == [3] * start + [0, 1, 2] + [4] * end and counted[0] == [2] + [4] * end

    @pytest.mark.parametrize("start", [True, False])
    def test_conversations_have_one_start_token(self, start):
        # KH-T4
        ids, counted = self.rows(CHATS, add_start_token=start)
        assert ids == [[3, 0, 1, 2, 2, 4], [3, 2, 1, 4, 2, 0, 4]]
        assert counted == [[2, 4], [1, 4, 0, 4]]

    def test_tools(self):
        tool = {"type": "function"}
        for tools, expected in (([tool], [1, 1]), ([[tool, tool], None], [2, 0]), (None, [0, 0])):
            ids, counted = self.rows({**CHATS, "tools": tools})
            assert [row.count(0) - n for row, n in zip(ids, [1, 1], strict=True)] == expected
            assert counted == [[2, 4], [1, 4, 0, 4]]

    @pytest.mark.parametrize("x", [PAIRS, CHATS])
    def test_loss_on_all(self, x):
        ids, counted = self.rows(x, length=20, loss_on="all", add_end_token=False)
        assert counted == [row[1:] for row in ids]

    def test_loss_on_replies(self):
        assert self.rows(PAIRS, loss_on="replies") == self.rows(PAIRS)
        with pytest.raises(ValueError, match="loss_on = 'replies' with plain texts"):
            self.rows(["a"], loss_on="replies")

    @pytest.mark.parametrize("x", [PAIRS, CHATS])
    def test_single_samples(self, x):
        preprocessor = LlamaCausalLMPreprocessor(chat_letters(), 8)
        first = {name: column[0] for name, column in x.items()}
        batch, single = to_numpy(preprocessor(x)), to_numpy(preprocessor(first))
        assert_equal(single, keras.tree.map_structure(lambda array: array[0], batch))

    @pytest.mark.parametrize("truncate", ["right", "left", None])
    def test_rows_that_are_cut(self, truncate):
        preprocessor = LlamaCausalLMPreprocessor(chat_letters(), 5, truncate=truncate)
        x, y, weights = to_numpy(preprocessor({**PAIRS, "responses": ["cabc", "ba", "bcab"]}))
        ids = [[3, 0, 1, 2, 0, 4], [3, 1, 0, 4, 0, 0], [3, 0, 1, 2, 0, 4]]
        if truncate == "left":
            ids = [[3, 2, 0, 1, 2, 4], [3, 1, 0, 4, 0, 0], [3, 1, 2, 0, 1, 4]]
        assert np.hstack([x["token_ids"], y[:, -1:]]).tolist() == ids
        # Of the last row a cut on the right leaves no response, so that its end is not to be learnt.
        last = [1, 1, 1, 1, 1] if truncate == "left" else [0, 0, 0, 0, 0]
        first = [1, 1, 1, 1, 1] if truncate == "left" else [0, 0, 1, 1, 1]
        assert weights.tolist() == [first, [1, 1, 1, 0, 0], last]
        assert preprocessor.num_cut_rows == 2

    def test_conversations_that_are_cut(self):
        chat = {"messages": [ask("ab", "cab")]}  # <s> a b c c a b </s>
        for truncate, ids in ((None, [3, 0, 1, 2]), ("right", [3, 0, 1, 2]), ("left", [3, 0, 1, 4])):
            x, y, _ = to_numpy(LlamaCausalLMPreprocessor(chat_letters(), 3, truncate=truncate)(chat))
            assert [*x["token_ids"][0], y[0, -1]] == ids

    def test_a_conversation_that_is_refused(self):
        with pytest.raises(ValueError, match="content") as caught:
            LlamaCausalLMPreprocessor(chat_letters()).call({"messages": [ask("a"), [{"role": "user"}]]})
        assert caught.value.__notes__ == ["It is conversation 1 of the batch."]

    def test_messages_need_a_template(self):
        class Other(keras_hub.tokenizers.Tokenizer):
            start_token_id, end_token_id, pad_token_id = 0, 1, 0

        with pytest.raises(TypeError, match="messages need a LlamaTokenizer"):
            LlamaCausalLMPreprocessor(Other())(CHATS)


class TestGeneration:
    def test_conversations(self):
        # KH-T4: one start token, though the preprocessor adds one to texts
        preprocessor = LlamaCausalLMPreprocessor(chat_letters(), 6)
        prompt = to_numpy(preprocessor.generate_preprocess({"messages": [ask("ab"), ask("b", "a")]}))
        assert prompt["token_ids"].tolist() == [[3, 0, 1, 2, 0, 0], [3, 1, 2, 0, 4, 2]]
        assert prompt["padding_mask"].sum(-1).tolist() == [4, 6]
        assert preprocessor.generate_preprocess({"messages": ask("ab")})["token_ids"].shape == (6,)
        with pytest.raises(TypeError, match="expected prompts alone"):
            preprocessor.generate_preprocess(PAIRS)

    @pytest.mark.parametrize("side, ids", [("right", [3, 0, 1, 2]), ("left", [3, 1, 2, 0])])
    def test_prompts_that_are_cut(self, side, ids):
        # One place stays free for a new token.
        preprocessor = LlamaCausalLMPreprocessor(chat_letters(), 5, truncate=side)
        prompt = to_numpy(preprocessor.generate_preprocess(["abcabca", "ab"]))
        assert prompt["token_ids"].tolist() == [[*ids, 0], [3, 0, 1, 0, 0]]
        assert prompt["padding_mask"].sum(-1).tolist() == [4, 3]
        chat = to_numpy(preprocessor.generate_preprocess({"messages": ask("abcabca")}))
        assert chat["token_ids"].tolist() == [3, 0, 1, 2, 0] if side == "right" else [3, 2, 0, 2, 0]
        preprocessor = LlamaCausalLMPreprocessor(letters(), 5, add_start_token=False, truncate=side)
        prompt = to_numpy(preprocessor.generate_preprocess("abcabc"))
        assert prompt["token_ids"].tolist() == ([0, 1, 2, 0, 0] if side == "right" else [2, 0, 1, 2, 0])

    def test_special_tokens_can_be_kept(self):
        # KH-T8
        preprocessor = LlamaCausalLMPreprocessor(letters(), 5)
        prompt = preprocessor.generate_preprocess(["ab", "c"])
        assert preprocessor.generate_postprocess(prompt) == ["ab", "c"]
        assert preprocessor.generate_postprocess(prompt, skip_special_tokens=False) == ["<s>ab", "<s>c"]

    def test_start_token_is_honoured(self):
        # KH-T4
        preprocessor = LlamaCausalLMPreprocessor(letters(parse_special=True), 5, add_start_token=False)
        prompt = to_numpy(preprocessor.generate_preprocess(["<s>ab", "c"]))
        assert prompt["token_ids"].tolist() == [[3, 0, 1, 0, 0], [2, 0, 0, 0, 0]]
        assert prompt["padding_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]

    def test_special_spellings_in_a_prompt_are_text(self, llama3):
        prompt = to_numpy(LlamaCausalLMPreprocessor(llama3, 32).generate_preprocess("<|eot_id|>"))
        assert prompt["token_ids"][:9].tolist() == [128000, 27, 91, 68, 354, 851, 91, 29, 0]

    def test_an_empty_prompt_is_the_start_token(self):
        prompt = to_numpy(LlamaCausalLMPreprocessor(letters(), 3).generate_preprocess(["", "a"]))
        assert prompt["token_ids"].tolist() == [[3, 0, 0], [3, 0, 0]]
        assert prompt["padding_mask"].tolist() == [[1, 0, 0], [1, 1, 0]]

    def test_a_prompt_that_is_too_long(self):
        # KH-T7
        preprocessor = LlamaCausalLMPreprocessor(letters(), 8)
        with pytest.raises(ValueError, match="prompt has 27 tokens, max_length is 8"):
            preprocessor.generate_preprocess("a" * 26)
        with pytest.raises(ValueError, match=r"inputs\[1\]: prompt has 9 .*; inputs\[3\]: prompt has 10 "):
            preprocessor.generate_preprocess(["a", "a" * 8, "a" * 7, "a" * 9])
        with pytest.raises(ValueError, match="and 5 more"):
            preprocessor.generate_preprocess(["a" * 8] * 15)
        with pytest.raises(ValueError, match="prompt has 4 tokens, max_length is 3"):
            preprocessor.generate_preprocess("aaa", sequence_length=3)
        assert to_numpy(preprocessor.generate_preprocess("a" * 7))["padding_mask"].all()

    def test_a_pad_id_that_is_a_real_token_survives(self, llama3):
        # KH-T6
        assert llama3.pad_token_id == 0 and llama3.id_to_token(0) == "!"
        preprocessor = LlamaCausalLMPreprocessor(llama3, 10)
        for text in ("Hello!!", "!", "! !"):
            prompt = preprocessor.generate_preprocess(text)
            assert preprocessor.generate_postprocess(prompt) == text

    def test_postprocess_reads_the_mask(self):
        preprocessor = LlamaCausalLMPreprocessor(letters())
        token_ids = np.array([[3, 0, 1, 4, 2], [0, 0, 3, 2, 4]], "int32")
        padding_mask = np.array([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
        expected = ["ab", "c"]
        for convert in (np.asarray, keras.ops.convert_to_tensor):
            for dtype in ("bool", "int32"):
                outputs = {"token_ids": convert(token_ids), "padding_mask": convert(padding_mask.astype(dtype))}
                assert preprocessor.generate_postprocess(outputs) == expected
        row = {"token_ids": token_ids[0], "padding_mask": padding_mask[0]}
        assert preprocessor.generate_postprocess(row) == "ab"

    def test_postprocess_drops_all_special_tokens(self, llama3):
        token_ids = np.array([128000, 9906, 128001, 128006, 0, 128009])
        outputs = {"token_ids": token_ids, "padding_mask": np.ones(6, bool)}
        assert LlamaCausalLMPreprocessor(llama3).generate_postprocess(outputs) == "Hello!"

    def test_postprocess_of_other_shapes(self):
        with pytest.raises(ValueError, match=r"shape \(2, 3\) and padding_mask \(3,\)"):
            LlamaCausalLMPreprocessor(letters()).generate_postprocess(
                {"token_ids": np.zeros((2, 3), "int32"), "padding_mask": np.ones(3)}
            )

    def test_inputs_are_left_alone(self):
        outputs = {"token_ids": np.array([3, 0, 4]), "padding_mask": np.array([1, 1, 1])}
        before = copy.deepcopy(outputs)
        LlamaCausalLMPreprocessor(letters()).generate_postprocess(outputs)
        assert all((outputs[key] == before[key]).all() for key in before)


class TestArguments:
    @pytest.mark.parametrize("value, error", [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)])
    def test_sequence_length(self, value, error):
        with pytest.raises(error, match="sequence_length = "):
            LlamaCausalLMPreprocessor(letters(), sequence_length=value)
        preprocessor = LlamaCausalLMPreprocessor(letters())
        for call in (preprocessor, preprocessor.generate_preprocess):
            with pytest.raises(error, match="sequence_length = "):
                call("a", sequence_length=value)
        with pytest.raises(error, match="sequence_length = "):
            preprocessor.sequence_length = value

    @pytest.mark.parametrize("name, value", [("loss_on", "prompts"), ("loss_on", None), ("truncate", "middle")])
    def test_choices(self, name, value):
        with pytest.raises(ValueError, match=f"{name} = {value!r}; expected one of"):
            LlamaCausalLMPreprocessor(letters(), **{name: value})

    def test_sequence_length_can_be_set(self):
        preprocessor = LlamaCausalLMPreprocessor(letters(), sequence_length=4)
        preprocessor("a")
        preprocessor.sequence_length = 6
        assert preprocessor("a")[1].shape == (6,)
        assert preprocessor.generate_preprocess("a")["token_ids"].shape == (6,)
        assert preprocessor.get_config()["sequence_length"] == 6

    def test_kinds(self):
        with pytest.raises(TypeError, match="expected a LlamaTokenizer"):
            LlamaCausalLMPreprocessor("tokenizer.json")
        with pytest.raises(TypeError, match="add_start_token = 1"):
            LlamaCausalLMPreprocessor(letters(), add_start_token=1)
        with pytest.raises((TypeError, ValueError), match="add_start"):
            LlamaCausalLMPreprocessor(letters(), add_start=True)

    def test_any_tokenizer_of_keras_hub(self):
        class Letters(keras_hub.tokenizers.Tokenizer):
            start_token_id, end_token_id, pad_token_id = 26, 27, 0

            def tokenize(self, inputs):
                return [[ord(letter) - 97 for letter in text] for text in inputs]

            def detokenize(self, inputs):
                return "".join(chr(token_id + 97) for token_id in inputs)

        preprocessor = LlamaCausalLMPreprocessor(Letters(), 4)
        prompt = preprocessor.generate_preprocess(["ab", "c"])
        assert to_numpy(prompt)["token_ids"].tolist() == [[26, 0, 1, 0], [26, 2, 0, 0]]


class TestSaving:
    OPTIONS = {
        "sequence_length": 7,
        "add_start_token": False,
        "add_end_token": False,
        "loss_on": "all",
        "truncate": "left",
        "name": "other",
        "dtype": "float16",
        "trainable": False,
        "config_file": "other.json",
    }

    def test_config_round_trip(self):
        preprocessor = LlamaCausalLMPreprocessor(letters(parse_special=True), **self.OPTIONS)
        config = preprocessor.get_config()
        assert set(config) == {*self.OPTIONS, "tokenizer"}
        assert all(config[key] == value for key, value in self.OPTIONS.items() if key != "dtype")
        before = copy.deepcopy(config)
        again = LlamaCausalLMPreprocessor.from_config(config)
        assert config == before and again.get_config() == config and again.tokenizer.parse_special

    def test_keras_serialization(self):
        preprocessor = LlamaCausalLMPreprocessor(letters(), **self.OPTIONS)
        config = keras.saving.serialize_keras_object(preprocessor)
        assert config["registered_name"] == "kllama>LlamaCausalLMPreprocessor"
        again = keras.saving.deserialize_keras_object(json.loads(json.dumps(config)))
        assert again.get_config() == preprocessor.get_config()

    def test_pickle(self):
        again = pickle.loads(pickle.dumps(LlamaCausalLMPreprocessor(letters(), 4)))
        assert to_numpy(again.generate_preprocess("ab"))["token_ids"].tolist() == [3, 0, 1, 0]

    def test_preset_layout(self, tmp_path):
        LlamaCausalLMPreprocessor(letters(), 4, add_start_token=False).save_to_preset(str(tmp_path))
        config = json.loads((tmp_path / "preprocessor.json").read_text(encoding="utf-8"))
        again = keras.saving.deserialize_keras_object(config)
        again.load_preset_assets(str(tmp_path))
        assert to_numpy(again.generate_preprocess("ab"))["token_ids"].tolist() == [0, 1, 0, 0]

    def test_class_attributes(self):
        assert issubclass(LlamaCausalLMPreprocessor, keras_hub.models.CausalLMPreprocessor)
        assert LlamaCausalLMPreprocessor.tokenizer_cls is LlamaTokenizer


def chat_columns(tf, chats: dict) -> dict:
    """Give conversations as string tensors, ragged unless all have the same number of turns."""
    columns = {
        name: tf.ragged.constant([[turn[name] for turn in chat] for chat in chats["messages"]])
        for name in ("role", "content")
    }
    is_even = len({len(chat) for chat in chats["messages"]}) == 1
    return {"messages": {name: column.to_tensor() if is_even else column for name, column in columns.items()}}


class TestTensorFlowGraph:
    @pytest.fixture
    def tf(self):
        return pytest.importorskip("tensorflow", reason="a tf.data pipeline needs TensorFlow")

    def test_rows_are_those_of_an_eager_call(self, tf, stories):
        # KH-T2
        preprocessor = LlamaCausalLMPreprocessor(stories, 12)
        dataset = tf.data.Dataset.from_tensor_slices(TEXTS)
        expected = to_numpy(preprocessor(TEXTS))
        batch = next(iter(dataset.batch(4).map(preprocessor, num_parallel_calls=2)))
        singles = next(iter(dataset.map(preprocessor).batch(4)))
        for outputs in (batch, singles):
            for output, other in zip(keras.tree.flatten(outputs), keras.tree.flatten(expected), strict=True):
                assert output.numpy().tolist() == other.tolist()

    def test_element_types_are_those_of_keras_hub(self, tf, stories):
        preprocessor = LlamaCausalLMPreprocessor(stories, 12)
        dataset = tf.data.Dataset.from_tensor_slices((TEXTS, [1, 2, 3, 4]))
        for rows, shape in ((dataset, (12,)), (dataset.batch(4), (None, 12)), (dataset.batch(4, True), (4, 12))):
            ids, mask = tf.TensorSpec(shape, "int32"), tf.TensorSpec(shape, "bool")
            assert rows.map(preprocessor).element_spec == ({"token_ids": ids, "padding_mask": mask}, ids, mask)

    def test_generation(self, tf, stories):
        preprocessor = LlamaCausalLMPreprocessor(stories, 12)
        dataset = tf.data.Dataset.from_tensor_slices(["hello"]).map(preprocessor.generate_preprocess)
        expected = to_numpy(preprocessor.generate_preprocess("hello"))
        prompt = next(iter(dataset))
        assert prompt["token_ids"].numpy().tolist() == expected["token_ids"].tolist()
        assert preprocessor.generate_postprocess(prompt) == "hello"

    @pytest.mark.parametrize("batched", [True, False])
    @pytest.mark.parametrize("x", [PAIRS, CHATS, {"messages": [ask("ab", "c"), ask("b", "a")]}])
    def test_replies(self, tf, x, batched):
        # KH-T2
        preprocessor = LlamaCausalLMPreprocessor(chat_letters(), 8)
        columns = {name: tf.constant(column) for name, column in x.items()} if x is PAIRS else chat_columns(tf, x)
        dataset = tf.data.Dataset.from_tensor_slices(columns)
        num_rows = len(next(iter(x.values())))
        dataset = dataset.batch(num_rows).map(preprocessor) if batched else dataset.map(preprocessor).batch(num_rows)
        outputs, expected = next(iter(dataset)), to_numpy(preprocessor(x))
        for output, other in zip(keras.tree.flatten(outputs), keras.tree.flatten(expected), strict=True):
            assert output.numpy().tolist() == other.tolist()
        assert_equal(to_numpy(preprocessor(columns)), expected)  # outside of a graph they may be tensors too

    def test_static_shapes_of_replies(self, tf):
        preprocessor = LlamaCausalLMPreprocessor(chat_letters(), 8)
        rows = tf.data.Dataset.from_tensor_slices(chat_columns(tf, CHATS))
        for dataset, shape in ((rows, (8,)), (rows.batch(2), (None, 8))):
            mask = tf.TensorSpec(shape, "bool")
            assert dataset.map(preprocessor).element_spec[2] == mask

    def test_conversations_to_continue(self, tf):
        preprocessor = LlamaCausalLMPreprocessor(chat_letters(), 8)
        dataset = tf.data.Dataset.from_tensor_slices(chat_columns(tf, CHATS)).batch(2)
        prompt = next(iter(dataset.map(preprocessor.generate_preprocess)))
        expected = to_numpy(preprocessor.generate_preprocess(CHATS))
        assert prompt["token_ids"].numpy().tolist() == expected["token_ids"].tolist()

    def test_the_message_of_an_error_arrives(self, tf, stories):
        preprocessor = LlamaCausalLMPreprocessor(stories, 2)
        dataset = tf.data.Dataset.from_tensor_slices(["hello"]).map(preprocessor.generate_preprocess)
        with pytest.raises(tf.errors.InvalidArgumentError, match="prompt has 4 tokens, max_length is 2"):
            next(iter(dataset))
