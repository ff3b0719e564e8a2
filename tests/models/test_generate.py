"""`generate`: known texts of trained models, equivalences that need no oracle, and every wrong argument."""

import json

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import kllama
from kllama.generation import engine

GREEDY = {"temperature": 0}


@pytest.mark.parametrize(
    ("model", "text", "num_tokens"), [("stories260K", "greedy_200", 200), ("stories15M", "greedy_256", 255)]
)
def test_published_stories(assets, model, text, num_tokens):
    folder = assets / "models" / model
    story = kllama.LlamaCausalLM.from_preset(folder).generate("", max_new_tokens=num_tokens, **GREEDY)
    assert story == (folder / "expected" / f"{text}.txt").read_text("utf-8")


def forbid_words(words):
    """Make a processor that forbids what would complete one of some words, one or two ids each."""

    def process(token_ids, lengths, logits):
        last = ops.take_along_axis(token_ids, lengths[:, None] - 1, axis=1)
        for *before, word in words:
            is_completed = ops.arange(logits.shape[1])[None] == word
            if before:
                is_completed = is_completed & (last == before[0])
            logits = ops.where(is_completed, float("-inf"), logits)
        return logits

    return process


@pytest.mark.parametrize(
    "name",
    [
        "greedy",
        "greedy_left_padded_batch",
        "eos_single",
        "eos_list",
        "repetition_penalty_1.8",
        "bad_words",
        "min_new_tokens",
    ],
)
def test_recorded_tokens_and_probabilities_of_transformers(assets, stories260k, name):
    case = json.loads((assets / "goldens" / "generation" / "stories260K.json").read_text())["cases"][name]
    prompts, sequences, expected = (case[key] * 3 for key in ("prompts", "sequences", "logprobs"))
    stop_token_ids = np.atleast_1d(case["kwargs"]["eos_token_id"] or []).astype(int).tolist()
    options = {key: case["kwargs"][key] for key in ("repetition_penalty", "min_new_tokens") if key in case["kwargs"]}
    if "bad_words_ids" in case["kwargs"]:
        options["logits_processors"] = [forbid_words(case["kwargs"]["bad_words_ids"])]
    width = case["prompt_length"]
    ids = np.array([prompt + [0] * (width - len(prompt)) for prompt in prompts[:3]])  # three rows, for all cases
    mask = np.arange(width) < np.array([[len(prompt)] for prompt in prompts[:3]])
    options |= {"max_new_tokens": 24, "stop_token_ids": stop_token_ids, "return_dict": True}
    output = stories260k.generate({"token_ids": ids, "padding_mask": mask}, **options, **GREEDY)
    names = ("token_ids", "padding_mask", "log_probs")
    for index, (row, is_real, log_probs) in enumerate(zip(*(output[name] for name in names), strict=True)):
        prompt, new = prompts[index], sequences[index][width:]
        length = next((i + 1 for i, token in enumerate(new) if token in stop_token_ids), len(new))
        assert row[is_real].tolist() == prompt + new[:length]
        np.testing.assert_allclose(log_probs[is_real][len(prompt) :], expected[index][:length], atol=2e-4)


@pytest.mark.parametrize(
    "name",
    [
        "llama_gqa",
        "llama_mha",
        "llama_head_dim",
        "llama_rope_llama3",
        "llama_rope_yarn",
        "mistral_sliding_window",
        "qwen2",
    ],
)
def test_recorded_tokens_of_tiny_models(assets, name):
    folder = assets / "goldens" / "hf_tiny" / name
    model = kllama.LlamaCausalLM.from_preset(folder)
    expected = np.load(folder / "expected.npz")
    width = expected["input_ids"].shape[1]
    for row in range(2):
        real = expected["attention_mask"][row] > 0
        prompt = {"token_ids": expected["input_ids"][row][None, real]}
        output = model.generate(prompt, max_new_tokens=12, stop_token_ids=None, **GREEDY)
        assert output["token_ids"][0, -12:].tolist() == expected["generated"][row, width:].tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "head_dim": 6, "attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "qk_norm": True},
    ],
)
def test_cached_decoding_equals_whole_forward_passes(random_model, token_ids, arguments):
    model = random_model(**arguments)
    row = np.zeros((1, 11), "int32")
    row[:, :3] = token_ids[:1, :3]
    for length in range(3, 11):
        logits = ops.convert_to_numpy(model({"token_ids": row, "padding_mask": np.arange(11)[None] < length}))
        row[0, length] = logits[0, length - 1].argmax()
    output = model.generate({"token_ids": token_ids[:1, :3]}, max_new_tokens=8, stop_token_ids=None, **GREEDY)
    assert output["token_ids"].tolist() == row.tolist()


def test_a_row_of_a_ragged_batch_is_the_prompt_alone(stories260k):
    prompts = ["Once", "Lily and her dog went to the park. They saw", "", "One day, a boy"]
    texts = stories260k.generate(prompts, max_new_tokens=20, **GREEDY)
    assert texts == [stories260k.generate(prompt, max_new_tokens=20, **GREEDY) for prompt in prompts]


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 9.0], "factor": 4.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_both_loops_keep_the_frequencies_of_the_prompts(random_model, token_ids, scaling):
    class OwnLoop(keras_hub.samplers.GreedySampler):
        def __call__(self, *arguments, **keywords):
            return super().__call__(*arguments, **keywords)

    scaling = {**scaling, "original_max_position_embeddings": 8} if scaling["rope_type"] == "longrope" else scaling
    model = random_model(rope_scaling=scaling, max_sequence_length=8, num_query_heads=4)
    model.backbone.max_sequence_length = None  # only `generate` reads it from here on
    prompt = {"token_ids": token_ids[:2, :4]}
    arguments = {"max_length": 16, "stop_token_ids": None}
    greedy = model.generate(prompt, **arguments, **GREEDY)["token_ids"].tolist()
    model.compile(sampler=OwnLoop())
    assert model.generate(prompt, **arguments)["token_ids"].tolist() == greedy


def test_an_overridden_call_with_cache_is_used(random_model, token_ids):
    class Counting(kllama.LlamaCausalLM):
        num_calls = 0

        def call_with_cache(self, token_ids, cache, cache_update_index):
            self.num_calls += 1
            logits, hidden_states, cache = super().call_with_cache(token_ids, cache, cache_update_index)
            return -logits, hidden_states, cache

    backbone = random_model().backbone
    arguments = {"max_new_tokens": 4, "stop_token_ids": None, **GREEDY}
    plain = kllama.LlamaCausalLM(backbone).generate({"token_ids": token_ids}, **arguments)["token_ids"]
    model = Counting(backbone)
    assert model.generate({"token_ids": token_ids}, **arguments)["token_ids"].tolist() != plain.tolist()
    assert model.num_calls >= 1


def test_an_overridden_forward_pass_of_the_backbone_is_used(random_model, token_ids):
    class Reversed(kllama.LlamaBackbone):
        def run_layers_with_cache(self, *arguments, **keywords):
            hidden_states, cache = super().run_layers_with_cache(*arguments, **keywords)
            return -hidden_states, cache

    plain = random_model().backbone
    backbone = Reversed.from_config(plain.get_config())
    backbone.set_weights(plain.get_weights())
    arguments = {"max_new_tokens": 1, "stop_token_ids": None, **GREEDY}
    given = kllama.LlamaCausalLM(backbone).generate({"token_ids": token_ids}, **arguments)["token_ids"][:, -1]
    logits = kllama.LlamaCausalLM(plain).predict({"token_ids": token_ids}, verbose=0)[:, -1]
    assert given.tolist() == logits.argmin(-1).tolist()


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": False}])
def test_ways_of_compiling(random_model, token_ids, options):
    model = random_model()
    arguments = {"max_new_tokens": 3, "stop_token_ids": None, **GREEDY}
    expected = model.generate({"token_ids": token_ids}, **arguments)["token_ids"].tolist()
    model.compile(**options)
    assert model.generate({"token_ids": token_ids}, **arguments)["token_ids"].tolist() == expected


def test_generating_in_the_middle_of_fit(random_model, token_ids):
    model, texts = random_model(), []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            texts.append(model.generate({"token_ids": token_ids[:1]}, max_new_tokens=2, stop_token_ids=None))

    history = model.fit(token_ids, batch_size=2, epochs=2, verbose=0, callbacks=[Look()]).history
    assert len(texts) == 4 and np.all(np.isfinite(history["loss"]))


def test_frozen_frequencies_of_dynamic_rope(random_model, token_ids):
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    model = random_model(rope_scaling=scaling, max_sequence_length=8)
    longer = random_model(rope_scaling=scaling, max_sequence_length=8)
    longer.set_weights(model.get_weights())
    # Within the limit dynamic scaling does nothing, whatever the width of the bucket that the prompt is padded to.
    plain = random_model()
    plain.set_weights(model.get_weights())
    prompt = {"token_ids": token_ids[:1, :3]}
    arguments = {"max_new_tokens": 4, "stop_token_ids": None, **GREEDY}
    assert (
        model.generate(prompt, **arguments)["token_ids"].tolist()
        == plain.generate(prompt, **arguments)["token_ids"].tolist()
    )


class TestLengths:
    def test_max_length_counts_the_prompt(self, stories260k):
        texts = stories260k.generate(["Once upon", "One day"], max_length=12, stop_token_ids=None, **GREEDY)
        assert [len(stories260k.preprocessor.tokenizer(text)) + 1 for text in texts] == [12, 12]

    def test_a_prompt_as_long_as_max_length_stays(self, stories260k):
        prompt = "Once upon a time"
        length = len(stories260k.preprocessor.tokenizer(prompt)) + 1
        assert stories260k.generate(prompt, max_length=length, **GREEDY) == prompt

    def test_the_default_is_what_the_model_and_the_preprocessor_allow(self, random_model, assets):
        model = kllama.LlamaCausalLM.from_preset(assets / "models" / "stories260K")
        model.preprocessor.sequence_length = 30
        text = model.generate("Once", stop_token_ids=None, **GREEDY)
        assert len(model.preprocessor.tokenizer(text)) + 1 == 30

    def test_padded_ids_fill_their_width(self, random_model, token_ids):
        prompt = {"token_ids": token_ids, "padding_mask": np.arange(12) < np.array([[3], [12], [1], [7]])}
        output = random_model().generate(prompt, stop_token_ids=None, **GREEDY)
        assert output["token_ids"].shape == (4, 12) and output["padding_mask"].all()

    def test_padded_ids_with_max_new_tokens(self, random_model, token_ids):
        prompt = {"token_ids": token_ids, "padding_mask": np.arange(12) < np.array([[3], [12], [1], [7]])}
        output = random_model().generate(prompt, max_new_tokens=5, stop_token_ids=None, **GREEDY)
        assert output["padding_mask"].sum(1).tolist() == [8, 17, 6, 12]

    def test_padded_ids_obey_max_length(self, random_model, token_ids):
        output = random_model().generate({"token_ids": token_ids[:, :4]}, max_length=9, stop_token_ids=None)
        assert output["token_ids"].shape == (4, 9)

    def test_the_callers_dict_is_left_alone(self, random_model, token_ids):
        prompt = {"token_ids": token_ids.copy(), "padding_mask": np.ones_like(token_ids)}
        random_model().generate(prompt, max_new_tokens=2, stop_token_ids=None)
        assert prompt["token_ids"].tolist() == token_ids.tolist() and list(prompt) == ["token_ids", "padding_mask"]


class TestStopping:
    def test_stories_end_at_a_start_token_too(self, stories260k):
        # generation_config.json of this model says [1, 2]; the tokenizer's end token alone is 2.
        assert stories260k.generation_config["stop_token_ids"] == [1, 2]
        story = stories260k.generate("", max_length=512, **GREEDY)
        endless = stories260k.generate("", max_length=512, stop_token_ids=None, **GREEDY)
        assert endless.startswith(story) and len(endless) > len(story)

    def test_a_stop_token_ends_its_row_and_no_other(self, random_model, token_ids):
        model = random_model()
        arguments = {"max_new_tokens": 6, **GREEDY}
        free = model.generate({"token_ids": token_ids}, stop_token_ids=None, **arguments)["token_ids"]
        stop = int(free[1, 14])
        stopped = model.generate({"token_ids": token_ids}, stop_token_ids=[stop], **arguments)
        for row, keep, whole in zip(*stopped.values(), free, strict=True):
            new = whole[12:].tolist()
            end = 12 + (new.index(stop) + 1 if stop in new else len(new))
            assert row[keep].tolist() == whole[:end].tolist()


class TestSampling:
    def test_seeds(self, stories260k):
        def story(**arguments):
            return stories260k.generate("Once upon a time", max_new_tokens=30, **arguments)

        assert story(temperature=1.0, seed=5) == story(temperature=1.0, seed=5)
        assert story(temperature=1.0, seed=5) != story(temperature=1.0, seed=6)
        assert story(temperature=1.0) != story(temperature=1.0)

    def test_keras_seeds_repeat(self, stories260k):
        texts = []
        for _ in range(2):
            keras.utils.set_random_seed(3)
            texts.append(stories260k.generate("Once", max_new_tokens=20, temperature=1.0))
        assert texts[0] == texts[1]

    def test_rows_differ_from_each_other(self, stories260k):
        texts = stories260k.generate(["Once upon a time"] * 4, max_new_tokens=30, temperature=1.0, seed=1)
        assert len(set(texts)) == 4

    def test_top_k_of_one_is_greedy(self, stories260k):
        greedy = stories260k.generate("Once", max_new_tokens=10, **GREEDY)
        assert stories260k.generate("Once", max_new_tokens=10, top_k=1, seed=3) == greedy
        assert stories260k.generate("Once", max_new_tokens=10, top_p=1e-6, seed=3) == greedy

    @pytest.mark.parametrize(
        ("generation_config", "sampler", "call", "is_greedy"),
        [
            ({}, "auto", {}, False),
            ({"do_sample": False}, "auto", {}, True),
            ({"do_sample": True, "temperature": 5.0}, "auto", {}, False),
            ({"temperature": 5.0}, "greedy", {}, True),
            ({"do_sample": False}, "random", {}, False),
            ({"do_sample": False}, "greedy", {"temperature": 5.0}, False),
            # One setting leaves the others as they are; but asking for one is asking to sample.
            ({"temperature": 5.0, "top_k": 1}, "auto", {"temperature": 4.0}, False),
            ({"temperature": 1e-4}, "auto", {"top_k": 40}, True),
            ({}, "greedy", {"top_k": 40}, False),
            ({"temperature": 5.0}, "random", {"temperature": 0}, True),
        ],
    )
    def test_the_call_beats_compile_beats_the_checkpoint(
        self, random_model, token_ids, generation_config, sampler, call, is_greedy
    ):
        model = random_model()
        model.generation_config = generation_config
        model.compile(sampler=sampler)
        arguments = {"max_new_tokens": 20, "stop_token_ids": None, "seed": 1}
        greedy = model.generate({"token_ids": token_ids}, **arguments, **GREEDY)["token_ids"]
        output = model.generate({"token_ids": token_ids}, **arguments, **call)["token_ids"]
        assert (output.tolist() == greedy.tolist()) == is_greedy

    def test_a_sampler_with_a_seed(self, stories260k):
        texts = []
        for _ in range(2):
            stories260k.compile(sampler=keras_hub.samplers.RandomSampler(seed=7))
            texts.append([stories260k.generate("Once", max_new_tokens=10) for _ in range(2)])
        stories260k.compile()
        assert texts[0] == texts[1] and texts[0][0] != texts[0][1]

    def test_a_sampler_with_its_own_loop(self, stories260k):
        stories260k.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=1))
        beam = stories260k.generate(["Once upon", "One day"], max_length=16)
        stories260k.compile()
        assert beam == stories260k.generate(["Once upon", "One day"], max_length=16, **GREEDY)

    def test_a_sampler_that_forbids_a_token(self, random_model, token_ids):
        class Forbidding(keras_hub.samplers.Sampler):
            def get_next_token(self, probabilities):
                return ops.argmax(probabilities[:, :10], axis=-1)

        model = random_model()
        model.compile(sampler=Forbidding())
        output = model.generate({"token_ids": token_ids}, max_length=20, stop_token_ids=None)["token_ids"]
        assert output[:, :12].tolist() == token_ids.tolist() and output[:, 12:].max() < 10


class TestText:
    def test_kinds_of_input(self, stories260k):
        arguments = {"max_new_tokens": 5, **GREEDY}
        text = stories260k.generate("Once", **arguments)
        assert isinstance(text, str)
        assert stories260k.generate(["Once"], **arguments) == [text]
        assert stories260k.generate(("Once",), **arguments) == [text]
        assert stories260k.generate(np.array(["Once"]), **arguments) == [text]
        assert stories260k.generate([], **arguments) == []

    def test_strip_prompt(self, stories260k):
        arguments = {"max_new_tokens": 10, **GREEDY}
        whole = stories260k.generate(["Once upon a", "One"], **arguments)
        new = stories260k.generate(["Once upon a", "One"], strip_prompt=True, **arguments)
        assert [w.endswith(n) and len(n) < len(w) for w, n in zip(whole, new, strict=True)] == [True, True]


def test_without_compile(random_model, token_ids):
    backbone = random_model().backbone
    model = kllama.LlamaCausalLM(backbone, compile=False)
    assert model.generate({"token_ids": token_ids}, max_new_tokens=2, stop_token_ids=None)["token_ids"].shape == (4, 14)
    assert model.get_compile_config() == {}


def test_text_is_made_of_the_tokenizers_tokens(stories260k):
    """A model may have more embedding rows than its tokenizer has tokens."""
    config = {**stories260k.backbone.get_config(), "vocabulary_size": 700, "name": "wide"}
    model = kllama.LlamaCausalLM(kllama.LlamaBackbone.from_config(config), stories260k.preprocessor)
    assert isinstance(model.generate("Once", max_new_tokens=40, temperature=5.0, seed=1), str)


@pytest.mark.parametrize(
    ("generation_config", "error", "words"),
    [
        ({"temprature": 1.0}, ValueError, "unknown keys ['temprature']"),
        ({"temperature": -1}, ValueError, "temperature (-1)"),
        ({"do_sample": 1}, TypeError, "generation_config['do_sample'] (1)"),
        ({"stop_token_ids": [1.5]}, TypeError, "generation_config['stop_token_ids'] ([1.5])"),
        ({"stop_token_ids": 3}, TypeError, "generation_config['stop_token_ids'] (3)"),
        ({"stop_token_ids": [300]}, ValueError, "holds [300]; expected ids from 0 to 299"),
        ({"repetition_penalty": -3}, ValueError, "repetition_penalty (-3)"),
    ],
)
def test_generation_config_is_checked(random_model, generation_config, error, words):
    with pytest.raises(error) as caught:
        kllama.LlamaCausalLM(random_model().backbone, generation_config=generation_config)
    assert words in str(caught.value)


@pytest.mark.parametrize("call", [{}, {"temperature": 0.7}, GREEDY], ids=str)
def test_the_checkpoints_repetition_penalty(random_model, token_ids, call):
    model = random_model()
    arguments = {"max_new_tokens": 8, "stop_token_ids": None, "seed": 3, **call}
    without = model.generate({"token_ids": token_ids}, **arguments)["token_ids"].tolist()
    said = model.generate({"token_ids": token_ids}, **arguments, repetition_penalty=5.0)["token_ids"].tolist()
    assert said != without
    model.generation_config = {"repetition_penalty": 5.0}
    assert model.generate({"token_ids": token_ids}, **arguments)["token_ids"].tolist() == said


def test_weights_are_never_stale(random_model, token_ids):
    model, other = random_model(), random_model()
    prompt, arguments = {"token_ids": token_ids}, {"max_new_tokens": 8, "stop_token_ids": None, **GREEDY}
    before = model.generate(prompt, **arguments)["token_ids"]
    expected = other.generate(prompt, **arguments)["token_ids"]
    assert before.tolist() != expected.tolist()
    model.set_weights(other.get_weights())
    assert model.generate(prompt, **arguments)["token_ids"].tolist() == expected.tolist()


def test_compilations_do_not_grow_with_prompt_lengths(random_model, monkeypatch):
    """JAX and TensorFlow trace a program once for each bucket; PyTorch compiles nothing and runs it at each call."""
    traces = []
    for name in ("prefill", "decode"):
        original = getattr(engine, name)

        def counting(*arguments, name=name, original=original, **settings):
            traces.append(name)
            return original(*arguments, **settings)

        monkeypatch.setattr(engine, name, counting)
    model = random_model()
    for length in range(1, 40):
        model.generate({"token_ids": np.ones((1, length), "int32")}, max_new_tokens=3, stop_token_ids=None, seed=length)
    is_compiled = keras.config.backend() != "torch"
    assert traces.count("prefill") == (3 if is_compiled else 39)  # 16, 32 and 64 positions
    assert traces.count("decode") == (1 if is_compiled else 39)  # 64 slots
