"""What subclasses, samplers and callers may put in the place of parts of `generate`, as in KerasHub."""

import inspect
import re
import threading
from unittest.mock import patch

import keras_hub
import numpy as np
import pytest
from keras import ops

import kllama
from kllama.checkpoints.presets.sampler import SAMPLER_NAMES
from kllama.generation.programs import Programs

GREEDY = {"temperature": 0}


class Last(keras_hub.samplers.Sampler):
    """A sampler that has only `get_next_token`: always the last token of the vocabulary."""

    def get_next_token(self, probabilities):
        return ops.full((probabilities.shape[0],), probabilities.shape[-1] - 1, dtype="int32")


def always(model, token):
    """Make a `call_with_cache` like the model's, but for `token`, which always has the largest logit."""
    call_with_cache = model.call_with_cache

    def call(*arguments, **keywords):
        logits, hidden_states, cache = call_with_cache(*arguments, **keywords)
        update = ops.full((*logits.shape[:-1], 1), 1e9, dtype=logits.dtype)
        return ops.slice_update(logits, (0, 0, token), update), hidden_states, cache

    return call


class TestGenerateFunction:
    def test_is_kept_between_calls_and_made_anew_by_compile(self, random_model, token_ids):
        model, prompt = random_model(), {"token_ids": token_ids}
        assert model.generate_function is None
        functions = []
        for _ in range(2):
            model.generate(prompt, max_new_tokens=2, stop_token_ids=None)
            functions.append(model.generate_function)
        assert functions[0] is functions[1] is model.make_generate_function() is not None
        model.compile(sampler="greedy")
        assert model.generate_function is None

    def test_runs_on_padded_ids(self, random_model, token_ids):
        model = random_model()
        model.compile(sampler="greedy")
        inputs = {"token_ids": np.pad(token_ids, ((0, 0), (0, 4))), "padding_mask": np.arange(16)[None] < [[12]] * 4}
        expected = model.generate(inputs, stop_token_ids=None)
        outputs = model.make_generate_function()(inputs, stop_token_ids=None)
        assert ops.convert_to_numpy(outputs["token_ids"]).tolist() == expected["token_ids"].tolist()

    def test_new_variables_need_new_programs(self, random_model, token_ids):
        model, prompt = random_model(), {"token_ids": token_ids}
        arguments = {"max_length": 20, "stop_token_ids": None}
        for sampler in ("greedy", keras_hub.samplers.BeamSampler(num_beams=1)):
            model = random_model()
            model.compile(sampler=sampler)
            before = model.generate(prompt, **arguments)["token_ids"]
            model.backbone.enable_lora(2)
            for weight in model.backbone.trainable_variables:
                weight.assign(3 * ops.ones(weight.shape))
            after = model.generate(prompt, **arguments)["token_ids"]
            assert before.tolist() != after.tolist()

    def test_threads_share_it(self, random_model):
        model, functions = random_model(), []
        for _ in range(20):
            model.generate_function = None
            threads = [
                threading.Thread(target=lambda: functions.append(model.make_generate_function())) for _ in range(8)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(set(map(id, functions))) == 1 and isinstance(functions[0], Programs)
            functions.clear()

    def test_one_that_a_subclass_makes(self, random_model, token_ids):
        class Echo(kllama.LlamaCausalLM):
            def make_generate_function(self):
                return lambda inputs, stop_token_ids=None: inputs

        output = Echo(random_model().backbone).generate({"token_ids": token_ids}, max_length=14, stop_token_ids=None)
        assert output["token_ids"].tolist() == token_ids.tolist()


class TestSampler:
    def test_can_be_set(self, random_model, token_ids):
        model, arguments = random_model(), {"max_new_tokens": 8, "stop_token_ids": None}
        greedy = model.generate({"token_ids": token_ids}, **arguments, **GREEDY)["token_ids"].tolist()
        model.sampler = keras_hub.samplers.GreedySampler()
        assert model.generate({"token_ids": token_ids}, **arguments)["token_ids"].tolist() == greedy
        model.sampler = Last()
        output = model.generate({"token_ids": token_ids}, max_length=14, stop_token_ids=None)["token_ids"]
        assert output[:, 12:].tolist() == [[299, 299]] * 4
        assert type(model.sampler) is Last

    @pytest.mark.parametrize("name", ["greedy", "top_k", "top_p", "random", "beam", "contrastive"])
    def test_every_name(self, random_model, token_ids, name):
        model = random_model()
        model.compile(sampler=name)
        output = model.generate({"token_ids": token_ids}, max_length=16, stop_token_ids=None)["token_ids"]
        assert output.shape == (4, 16) and output[:, :12].tolist() == token_ids.tolist()

    @pytest.mark.parametrize(
        ("sampler", "error", "words"),
        [
            ("beem", ValueError, "sampler ('beem') must be one of beam, contrastive, greedy,"),
            ("Greedy", ValueError, "sampler ('Greedy')"),
            (5, TypeError, "sampler (5) must be a keras_hub.samplers.Sampler"),
            (None, TypeError, "sampler (None)"),
        ],
    )
    def test_unknown(self, random_model, sampler, error, words):
        with pytest.raises(error) as caught:
            random_model().compile(sampler=sampler)
        assert words in str(caught.value)

    def test_one_that_gives_all_beams(self, random_model, token_ids):
        model = random_model()
        model.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2, return_all_beams=True))
        with pytest.raises(ValueError, match="BeamSampler gave more than token ids"):
            model.generate({"token_ids": token_ids}, max_length=14, stop_token_ids=None)

    def test_a_class(self, random_model):
        model = random_model()
        model.compile(sampler=keras_hub.samplers.GreedySampler)
        assert isinstance(model.sampler, keras_hub.samplers.GreedySampler)
        assert model.get_config()["sampler"]["class_name"] == "GreedySampler"

    def test_every_name_of_keras_hub_is_listed(self):
        source = inspect.getsource(keras_hub.samplers.deserialize)
        assert sorted(re.findall(r'"(\w+)": \w+Sampler', source)) == list(SAMPLER_NAMES)


class TestOwnGenerateStep:
    @pytest.fixture
    def model(self, random_model):
        class Filling(kllama.LlamaCausalLM):
            def generate_step(self, inputs, stop_token_ids=None):
                token_ids = ops.where(inputs["padding_mask"], inputs["token_ids"], 7)
                return {"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids)}

        return Filling(random_model().backbone)

    def test_runs(self, model, token_ids):
        output = model.generate({"token_ids": token_ids}, max_length=14, stop_token_ids=None)["token_ids"]
        assert output[:, 12:].tolist() == [[7, 7]] * 4

    @pytest.mark.parametrize("call", [{"temperature": 0.5}, {"top_k": 3}, {"seed": 1}], ids=str)
    def test_cannot_be_given_settings_of_a_call(self, model, token_ids, call):
        name = next(iter(call))
        with pytest.raises(ValueError, match=f"{name} .* must be None with a generate_step of your own"):
            model.generate({"token_ids": token_ids}, max_length=14, stop_token_ids=None, **call)

    def test_may_build_on_the_models_own_parts(self, random_model, token_ids):
        class Once(kllama.LlamaCausalLM):
            def generate_step(self, inputs, stop_token_ids=None):
                token_ids = inputs["token_ids"]
                hidden_states, cache = self._build_cache(token_ids)
                logits, _, _ = self.call_with_cache(token_ids[:, 11:12], cache, 11)
                following = ops.cast(ops.argmax(logits, axis=-1), token_ids.dtype)
                token_ids = ops.slice_update(token_ids, (0, 12), following)
                return {"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids)}

        backbone = random_model().backbone
        arguments = {"max_length": 13, "stop_token_ids": None}
        greedy = kllama.LlamaCausalLM(backbone).generate({"token_ids": token_ids}, **arguments, **GREEDY)
        output = Once(backbone).generate({"token_ids": token_ids}, **arguments)
        assert output["token_ids"].tolist() == greedy["token_ids"].tolist()


class TestCallWithCache:
    def test_one_that_is_put_in_its_place_for_a_while(self, random_model, token_ids):
        model, arguments = random_model(), {"max_new_tokens": 3, "stop_token_ids": None, **GREEDY}
        before = model.generate({"token_ids": token_ids}, **arguments)["token_ids"].tolist()
        with patch.object(model, "call_with_cache", wraps=always(model, 17)):
            output = model.generate({"token_ids": token_ids}, **arguments)["token_ids"]
        assert output[:, 12:].tolist() == [[17] * 3] * 4
        assert model.generate({"token_ids": token_ids}, **arguments)["token_ids"].tolist() == before

    def test_stopping_at_once_gives_the_prompts(self, stories260k):
        prompts = ["Once upon a time", "Lily"]
        end = stories260k.preprocessor.tokenizer.end_token_id
        with patch.object(stories260k, "call_with_cache", wraps=always(stories260k, end)):
            assert stories260k.generate(prompts, max_length=30) == prompts

    def test_fills_the_cache_too(self, random_model, token_ids):
        class Watching(kllama.LlamaCausalLM):
            widths = ()

            def call_with_cache(self, token_ids, cache, cache_update_index):
                object.__setattr__(self, "widths", (*self.widths, token_ids.shape[1]))
                return super().call_with_cache(token_ids, cache, cache_update_index)

        model = Watching(random_model().backbone)
        model.generate({"token_ids": token_ids}, max_new_tokens=2, stop_token_ids=None, **GREEDY)
        assert model.widths[0] >= 12 and set(model.widths[1:]) == {1}


def test_an_in_memory_llama_3_stops_at_both_of_its_end_tokens(random_model):
    vocabulary = [
        "a",
        "b",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ]
    tokenizer = kllama.Llama3Tokenizer(vocabulary={token: i for i, token in enumerate(vocabulary)}, merges=[])
    preprocessor = kllama.Llama3CausalLMPreprocessor(tokenizer, sequence_length=8)
    model = kllama.Llama3CausalLM(random_model().backbone, preprocessor)
    for token, text in ((3, "ab"), (4, "ab"), (1, "abbbbbb")):
        with patch.object(model, "call_with_cache", wraps=always(model, token)):
            assert model.generate("ab") == text


class TestWidth:
    """Padded ids without a length of their own fill their width, as in KerasHub."""

    @pytest.mark.parametrize("sampler", ["greedy", "beam"])
    def test_is_kept(self, random_model, token_ids, sampler):
        model = random_model()
        model.compile(sampler=sampler)
        inputs = {"token_ids": np.pad(token_ids, ((0, 0), (0, 8))), "padding_mask": np.arange(20)[None] < [[12]] * 4}
        free = model.generate(inputs, stop_token_ids=None)
        stopped = model.generate(inputs, stop_token_ids=np.unique(free["token_ids"][:, 12]).tolist())
        assert free["token_ids"].shape == stopped["token_ids"].shape == stopped["padding_mask"].shape == (4, 20)
        assert free["padding_mask"].all() and stopped["padding_mask"].sum(-1).min() == 13
        assert free["padding_mask"].dtype == bool and free["token_ids"].dtype == np.int32

    def test_is_not_for_a_length_of_the_call(self, random_model, token_ids):
        output = random_model().generate({"token_ids": token_ids}, max_length=15, stop_token_ids=None)
        assert output["token_ids"].shape == (4, 15)


class TestDataset:
    @pytest.fixture
    def tf(self):
        return pytest.importorskip("tensorflow")

    def test_of_texts(self, stories260k, tf):
        prompts = ["Once upon", "One day", "Lily"]
        arguments = {"max_new_tokens": 6, **GREEDY}
        expected = stories260k.generate(prompts, **arguments)
        dataset = tf.data.Dataset.from_tensor_slices(prompts)
        assert stories260k.generate(dataset.batch(2), **arguments) == expected
        assert stories260k.generate(dataset, **arguments) == expected
        assert stories260k.generate(tf.constant(prompts), **arguments) == expected
        assert stories260k.generate(tf.constant("Lily"), **arguments) == expected[2]

    def test_of_ids(self, random_model, token_ids, tf):
        model, arguments = random_model(), {"max_new_tokens": 4, "stop_token_ids": None, **GREEDY}
        inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
        output = model.generate(tf.data.Dataset.from_tensor_slices(inputs).batch(3), **arguments)
        expected = model.generate(inputs, **arguments)
        assert output["token_ids"].tolist() == expected["token_ids"].tolist()
        assert output["padding_mask"].shape == expected["padding_mask"].shape

    def test_batches_have_seeds_of_their_own(self, stories260k, tf):
        dataset = tf.data.Dataset.from_tensor_slices(["Once"] * 3).batch(1)
        texts = [stories260k.generate(dataset, max_new_tokens=12, temperature=2.0, seed=4) for _ in range(2)]
        assert texts[0] == texts[1] and len(set(texts[0])) == 3
