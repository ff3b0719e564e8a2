"""What `generate` is told: every argument, wrong and right, and what is left of calls that break off."""

import threading

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import kllama
from kllama.errors import ResourceError
from kllama.generation.decoding import Decoding
from kllama.models import generating
from kllama.models import memory as memory_check

GREEDY = {"temperature": 0}
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model():
    """A model without text, always the same."""
    keras.utils.set_random_seed(1)
    sizes = {"num_query_heads": 4, "hidden_dim": 16, "intermediate_dim": 24, "num_key_value_heads": 2}
    return kllama.LlamaCausalLM(kllama.LlamaBackbone(300, 2, **sizes, initializer_range=0.3))


@pytest.fixture
def nothing_runs(monkeypatch):
    """Let a test fail whose call gets as far as writing."""

    def fail(*_):
        raise AssertionError("the call was not refused")

    monkeypatch.setattr(generating, "continue_prompts", fail)


@pytest.mark.usefixtures("nothing_runs")
class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"max_length": 0}, ValueError, "max_length (0) must be at least 1"),
            ({"max_length": -5}, ValueError, "max_length (-5)"),
            ({"max_length": 1.5}, TypeError, "max_length (1.5) must be an integer"),
            ({"max_length": True}, TypeError, "max_length (True)"),
            (
                {"max_length": 10**12},
                ValueError,
                "max_length (1000000000000, prompt included) must be less than 2 ** 31",
            ),
            ({"max_length": 513}, ValueError, "max_length (513) asks for 513 positions"),
            ({"max_length": 3}, ValueError, "the prompt has 5 tokens, max_length is 3"),
            ({"max_new_tokens": 0}, ValueError, "max_new_tokens (0)"),
            ({"max_new_tokens": 10**30}, ValueError, "must be less than 2 ** 31"),
            ({"max_new_tokens": 510}, ValueError, "max_new_tokens (510) asks for 515 positions"),
            ({"max_new_tokens": 5, "max_length": 50}, ValueError, "both given"),
            ({"min_new_tokens": -1}, ValueError, "min_new_tokens (-1) must be at least 0"),
            ({"min_new_tokens": 1.0}, TypeError, "min_new_tokens (1.0)"),
            ({"min_new_tokens": 6, "max_new_tokens": 5}, ValueError, "(6) must be at most max_new_tokens (5)"),
            ({"min_new_tokens": 6, "max_length": 10}, ValueError, "min_new_tokens (6) is more than max_length (10)"),
            ({"temperature": -1}, ValueError, "temperature (-1)"),
            ({"temperature": float("nan")}, ValueError, "temperature (nan)"),
            ({"temperature": float("inf")}, ValueError, "temperature (inf)"),
            ({"temperature": "hot"}, TypeError, "temperature ('hot')"),
            ({"top_k": 0}, ValueError, "top_k (0)"),
            ({"top_k": 1.5}, TypeError, "top_k (1.5)"),
            ({"top_p": 0}, ValueError, "top_p (0)"),
            ({"top_p": 2}, ValueError, "top_p (2)"),
            ({"top_p": float("nan")}, ValueError, "top_p (nan)"),
            ({"min_p": -0.1}, ValueError, "min_p (-0.1)"),
            ({"repetition_penalty": 0}, ValueError, "repetition_penalty (0)"),
            ({"sampler": "beem"}, ValueError, "sampler ('beem') must be one of beam, contrastive, greedy,"),
            ({"sampler": 5}, TypeError, "sampler (5)"),
            ({"sampler": "beam"}, ValueError, "give the sampler to compile(sampler=...)"),
            ({"seed": -1}, ValueError, "seed (-1)"),
            ({"seed": 2**64}, ValueError, "seed (18446744073709551616) must be less than 2 ** 63"),
            ({"seed": 1.5}, TypeError, "seed (1.5)"),
            ({"seed": True}, TypeError, "seed (True)"),
            ({"stop_token_ids": "bogus"}, TypeError, "stop_token_ids ('bogus')"),
            ({"stop_token_ids": [512]}, ValueError, "stop_token_ids holds [512]; expected ids from 0 to 511"),
            ({"stop_token_ids": [-1]}, ValueError, "stop_token_ids holds [-1]"),
            ({"stop_strings": ""}, ValueError, "stop_strings ([''])"),
            ({"stop_strings": ["a", ""]}, ValueError, "must not be empty"),
            ({"stop_strings": [b"a"]}, TypeError, "stop_strings ([b'a'])"),
            ({"stop_strings": 5}, TypeError, "stop_strings (5)"),
            ({"stop_strings": ["word"] * 10_000}, ValueError, "stop_strings has 10000 strings; expected at most 256"),
            ({"logits_processors": len}, TypeError, "must be a list of functions"),
            ({"logits_processors": ["f"]}, TypeError, "logits_processors holds 'f'"),
            ({"num_return_sequences": 0}, ValueError, "num_return_sequences (0)"),
            ({"num_return_sequences": 2, **GREEDY}, ValueError, "must be 1 without sampling"),
            ({"prompt_lookup_num_tokens": 0}, ValueError, "prompt_lookup_num_tokens (0)"),
            ({"return_dict": 1}, TypeError, "return_dict (1) must be True or False"),
            ({"strip_prompt": "yes"}, TypeError, "strip_prompt ('yes')"),
        ],
        ids=str,
    )
    def test_arguments(self, stories260k, arguments, error, words):
        with pytest.raises(error) as caught:
            stories260k.generate(PROMPT, **arguments)
        assert words in str(caught.value)

    @pytest.mark.parametrize("inputs", [None, 5, b"Once", [["Once"]], ["Once", None], {"prompts": ["Once"]}], ids=str)
    def test_inputs(self, stories260k, inputs):
        with pytest.raises((TypeError, ValueError), match="inputs"):
            stories260k.generate(inputs)

    @pytest.mark.parametrize(
        ("inputs", "error", "words"),
        [
            ({"token_ids": [[5, 6], [5, 300]]}, ValueError, "inputs row 1 holds the token id 300; expected ids from 0"),
            ({"token_ids": [[5, -1]]}, ValueError, "token id -1"),
            ({"token_ids": [[5, 2.0**80]]}, ValueError, "inputs row 0 holds the token id"),
            ({"token_ids": [5, 6]}, ValueError, "shape (2,)"),
            ({"token_ids": [[5, 6], [7]]}, ValueError, "inputs['token_ids'] ([[5, 6], [7]])"),
            ({"token_ids": [[5.5]]}, ValueError, "not whole"),
            ({"token_ids": [[float("nan")]]}, ValueError, "not whole"),
            ({"token_ids": [[True, False]]}, TypeError, "inputs['token_ids'] has dtype bool"),
            ({"token_ids": [["a"]]}, TypeError, "inputs['token_ids'] has dtype"),
            ({"token_ids": [[5, 6]], "padding_mask": [[0, 0]]}, ValueError, "inputs row 0 has no tokens"),
            ({"token_ids": [[5, 6, 7]], "padding_mask": [[1, 0, 1]]}, ValueError, "between the real tokens of row 0"),
            ({"token_ids": [[5, 6]], "padding_mask": [[1]]}, ValueError, "shape (1, 1)"),
            ({"token_ids": [[5, 6]], "padding_mask": [[1, 2]]}, ValueError, "other values than 0 and 1"),
            ({"token_ids": [[5, 6]], "mask": [[1, 1]]}, ValueError, "inputs has the keys ['mask', 'token_ids']"),
        ],
        ids=str,
    )
    def test_token_ids(self, model, inputs, error, words):
        with pytest.raises(error) as caught:
            model.generate(inputs, max_new_tokens=2)
        assert words in str(caught.value)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"seed": 3}, "seed (3) must be None with BeamSampler"),
            ({"repetition_penalty": 1.5}, "repetition_penalty (1.5) must be None with BeamSampler"),
            ({"min_new_tokens": 2}, "min_new_tokens (2) must be 0 with BeamSampler"),
            ({"num_return_sequences": 2}, "num_return_sequences (2) must be 1 with BeamSampler"),
            ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens (2) must be None with BeamSampler"),
            ({"logits_processors": [print]}, "must be None with BeamSampler"),
        ],
        ids=str,
    )
    def test_what_a_loop_of_somebody_elses_cannot_do(self, model, token_ids, arguments, words):
        model.sampler = keras_hub.samplers.BeamSampler(num_beams=2)
        with pytest.raises(ValueError) as caught:
            model.generate({"token_ids": token_ids}, max_length=14, stop_token_ids=None, **arguments)
        model.sampler = "auto"
        assert words in str(caught.value)

    @pytest.mark.parametrize(
        ("inputs", "arguments"), [("Once", {}), ({"token_ids": [[5]]}, {"stop_strings": "a"})], ids=["text", "strings"]
    )
    def test_what_needs_a_preprocessor(self, model, inputs, arguments):
        with pytest.raises(ValueError, match="the model has no preprocessor"):
            model.generate(inputs, max_new_tokens=2, **arguments)

    def test_rows_that_do_not_fit_into_memory(self, model, monkeypatch):
        monkeypatch.setattr(memory_check.backend, "device_memory", lambda: 10**6)
        with pytest.raises(ResourceError, match="1000 rows of up to 12 positions need 1536000 bytes .* 1000000 bytes"):
            model.generate({"token_ids": np.ones((1000, 4), "int32")}, max_new_tokens=8)


def test_the_memory_of_the_device(model):
    """On the machine as it is: what surely fits passes, what surely does not is refused."""
    backbone = model.backbone
    memory_check.check_memory(backbone, np.array([100]), 1)
    with pytest.raises(ResourceError, match="bytes"):
        memory_check.check_memory(backbone, np.full(10**4, 2**31 - 1), 10**6)


class TestPrompts:
    def test_empty_text_begins_with_the_start_token(self, stories260k):
        result = stories260k.generate("", max_new_tokens=5, return_dict=True, **GREEDY)
        assert result["token_ids"][0, 0] == stories260k.preprocessor.tokenizer.start_token_id
        assert result["padding_mask"].sum() == 6 and isinstance(result["texts"], str)

    def test_no_prompts(self, stories260k, model):
        assert stories260k.generate([]) == []
        result = stories260k.generate([], return_dict=True)
        assert result["texts"] == result["finish_reasons"] == [] and len(result["token_ids"]) == 0
        assert result["log_probs"].shape == result["token_ids"].shape
        assert model.generate({"token_ids": np.zeros((0, 3))})["token_ids"].shape == (0, 3)

    def test_one_as_long_as_max_length(self, stories260k):
        # Its last token may be a stop token: nothing was written, so nothing has stopped.
        stop = stories260k.preprocessor.tokenizer(PROMPT)[-1:]
        arguments = {"max_length": 5, "stop_token_ids": stop, "return_dict": True, **GREEDY}
        result = stories260k.generate([PROMPT, "Once"], **arguments)
        assert result["texts"][0] == PROMPT and result["texts"][1] != "Once"
        assert result["finish_reasons"] == ["length", "stop"]
        assert np.isnan(result["log_probs"][0]).all()

    @pytest.mark.parametrize("convert", [np.asarray, np.float64, list, ops.convert_to_tensor], ids=lambda f: f.__name__)
    def test_kinds_of_ids(self, model, token_ids, convert):
        arguments = {"max_new_tokens": 3, "stop_token_ids": None, **GREEDY}
        expected = model.generate({"token_ids": token_ids}, **arguments)["token_ids"].tolist()
        converted = convert(token_ids.tolist() if convert is list else token_ids)
        mask = convert(np.ones_like(token_ids).tolist() if convert is list else np.ones_like(token_ids))
        assert model.generate({"token_ids": converted}, **arguments)["token_ids"].tolist() == expected
        output = model.generate({"token_ids": converted, "padding_mask": mask}, **arguments)
        assert output["token_ids"].tolist() == expected

    def test_padding_on_either_side(self, model, token_ids):
        arguments = {"max_new_tokens": 3, "stop_token_ids": None, **GREEDY}
        outputs = []
        for side in ("right", "left", "both"):
            ids, mask = np.full((4, 12), 7), np.zeros((4, 12), "int32")
            for row, length in enumerate((3, 9, 1, 7)):
                start = {"right": 0, "left": 12 - length, "both": 1}[side]
                ids[row, start : start + length], mask[row, start : start + length] = token_ids[row, :length], 1
            outputs.append(model.generate({"token_ids": ids, "padding_mask": mask}, **arguments))
        for output in outputs:
            assert output["token_ids"].tolist() == outputs[0]["token_ids"].tolist()
            assert output["padding_mask"].sum(1).tolist() == [6, 12, 4, 10]
            assert (np.diff(output["padding_mask"].astype(int)) <= 0).all()


class TestSequences:
    def test_of_each_prompt_in_succession(self, stories260k):
        arguments = {"max_new_tokens": 8, "temperature": 2.0, "seed": 1, "num_return_sequences": 3}
        texts = stories260k.generate(["Lily", "One day"], **arguments)
        assert [text[:3] for text in texts] == ["Lil"] * 3 + ["One"] * 3 and len(set(texts)) == 6
        assert stories260k.generate("Lily", **arguments) == texts[:3]
        stripped = stories260k.generate(["Lily", "One day"], strip_prompt=True, **arguments)
        prompts = ["Lily"] * 3 + ["One day"] * 3
        assert stripped == [text[len(prompt) :].lstrip() for text, prompt in zip(texts, prompts, strict=True)]

    def test_as_ids(self, model, token_ids):
        output = model.generate(
            {"token_ids": token_ids[:2]}, num_return_sequences=2, max_new_tokens=4, stop_token_ids=None
        )
        assert output["token_ids"][:, :12].tolist() == np.repeat(token_ids[:2], 2, axis=0).tolist()


class TestDict:
    def test_what_ends_a_row(self, model, token_ids):
        arguments = {"max_new_tokens": 6, "return_dict": True, **GREEDY}
        free = model.generate({"token_ids": token_ids}, stop_token_ids=None, **arguments)
        assert free["finish_reasons"] == ["length"] * 4 and "texts" not in free
        stop = int(free["token_ids"][2, -1])  # as the last token that there is room for it is a stop token all the same
        stopped = model.generate({"token_ids": token_ids}, stop_token_ids=[stop], **arguments)
        expected = ["stop" if stop in row[12:] else "length" for row in free["token_ids"]]
        assert stopped["finish_reasons"] == expected and "stop" in expected
        for row, keep in zip(stopped["log_probs"], stopped["padding_mask"], strict=True):
            assert np.isnan(row).tolist() == (~keep | (np.arange(len(row)) < 12)).tolist()

    def test_log_probs(self, model, token_ids):
        """Under the raw logits, whatever sampling does to them."""
        output = model.generate(
            {"token_ids": token_ids}, max_new_tokens=4, stop_token_ids=None, return_dict=True, temperature=3.0, top_k=9
        )
        logits = model.predict({"token_ids": output["token_ids"]}, verbose=0)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = np.take_along_axis(expected[:, 11:-1], output["token_ids"][:, 12:, None], axis=2)[..., 0]
        np.testing.assert_allclose(output["log_probs"][:, 12:], expected, rtol=1e-4, atol=1e-4)
        assert output["log_probs"].dtype == "float32" and output["log_probs"].shape == output["token_ids"].shape

    def test_processors_get_arrays_of_their_own(self, model, token_ids):
        """On PyTorch a function may write to what it is given; what the model gave each token stays as it was."""

        def forbid(token_ids, lengths, logits):
            if not hasattr(logits, "index_fill_"):
                return ops.where(ops.arange(300) < 290, -1e9, logits)
            token_ids[:], lengths[:], logits[:, :290] = 0, 0, -1e9
            return logits

        arguments = {"max_new_tokens": 3, "stop_token_ids": None, "return_dict": True, **GREEDY}
        output = model.generate({"token_ids": token_ids}, logits_processors=[forbid], **arguments)
        assert output["token_ids"][:, 12:].min() >= 290
        assert (output["log_probs"][:, 12:] < -1).all()

    def test_without_the_prompt(self, stories260k):
        arguments = {"max_new_tokens": 6, "return_dict": True, **GREEDY}
        whole = stories260k.generate(PROMPT, **arguments)
        new = stories260k.generate(PROMPT, strip_prompt=True, **arguments)
        assert whole["texts"].endswith(new["texts"]) and new["token_ids"].shape == (1, 6)
        assert new["log_probs"].tolist() == whole["log_probs"][:, -6:].tolist()

    def test_of_a_dataset(self, stories260k):
        tf = pytest.importorskip("tensorflow")
        arguments = {"max_new_tokens": 4, "return_dict": True, **GREEDY}
        prompts = ["Once", "Lily and her dog"]
        joined = stories260k.generate(tf.data.Dataset.from_tensor_slices(prompts), **arguments)
        expected = stories260k.generate(prompts, **arguments)
        for name in ("texts", "finish_reasons"):
            assert joined[name] == expected[name]
        for name in ("token_ids", "padding_mask"):
            assert joined[name].tolist() == expected[name].tolist()
        np.testing.assert_allclose(joined["log_probs"], expected["log_probs"], rtol=1e-3, atol=1e-4)


class TestSeeds:
    @pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1, np.int64(7)], ids=str)
    def test_repeat(self, stories260k, seed):
        texts = [stories260k.generate("Lily", max_new_tokens=12, temperature=2.0, seed=seed) for _ in range(2)]
        assert texts[0] == texts[1]

    def test_all_of_their_bits_count(self, stories260k):
        seeds = (1, 1 + 2**31, 1 + 2**62, None)
        texts = [stories260k.generate("Lily", max_new_tokens=12, temperature=2.0, seed=seed) for seed in seeds]
        assert len(set(texts)) == 4


class TestBrokenCalls:
    @pytest.mark.parametrize("chunk", [0, 1])
    def test_the_model_goes_on_after_an_interrupt(self, stories260k, monkeypatch, chunk):
        # With stop strings there are several chunks.
        arguments = {"max_new_tokens": 40, "stop_token_ids": None, "stop_strings": "no such", "return_dict": True}
        arguments |= GREEDY
        expected = stories260k.generate(PROMPT, **arguments)["texts"]
        read, seen = Decoding._read, []

        def interrupted(decoding, *written):
            seen.append(written)
            if len(seen) > chunk:
                raise KeyboardInterrupt
            return read(decoding, *written)

        with monkeypatch.context() as patch:
            patch.setattr(Decoding, "_read", interrupted)
            with pytest.raises(KeyboardInterrupt):
                stories260k.generate("Lily and her dog", **arguments)
        assert len(seen) == chunk + 1
        assert stories260k.generate(PROMPT, **arguments)["texts"] == expected

    def test_threads_do_not_mix(self, stories260k):
        prompts = ["Lily", "One day", PROMPT, "Tom and his dog"]
        arguments = {"max_new_tokens": 30, "temperature": 1.0, "seed": 5}
        expected = [stories260k.generate(prompt, **arguments) for prompt in prompts]
        texts = {}

        def write(prompt):
            texts[prompt] = [stories260k.generate(prompt, **arguments) for _ in range(3)]

        threads = [threading.Thread(target=write, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [texts[prompt] for prompt in prompts] == [[text] * 3 for text in expected]
