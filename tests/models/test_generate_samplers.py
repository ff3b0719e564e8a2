"""KerasHub's samplers in `generate`: those that only draw run in the engine, those with a loop keep it."""

import dataclasses

import keras_hub
import numpy as np
import pytest
from keras import ops

import kllama

ARGUMENTS = {"max_length": 20, "stop_token_ids": None}
ONE_TOKEN = {"max_length": 13, "stop_token_ids": None}


class Draws(keras_hub.samplers.TopPSampler):
    """Draws by itself; runs in the engine."""

    def __init__(self):
        super().__init__(p=0.9, k=40, seed=5, temperature=2.0)


class DrawsInItsLoop(Draws):
    """The same with a loop of its own, KerasHub's."""

    def __call__(self, *arguments, **keywords):
        return super().__call__(*arguments, **keywords)


@pytest.fixture(scope="module")
def model():
    sizes = {"num_layers": 2, "num_query_heads": 4, "hidden_dim": 16, "intermediate_dim": 24, "num_key_value_heads": 2}
    return kllama.LlamaCausalLM(kllama.LlamaBackbone(300, **sizes, initializer_range=0.3))


def state_of(sampler) -> list[int]:
    return ops.convert_to_numpy(sampler.seed_generator.state).tolist()


def test_the_engine_draws_as_the_samplers_own_loop(model, token_ids):
    results = []
    for sampler in (Draws(), DrawsInItsLoop()):
        model.compile(sampler=sampler, jit_compile=False)  # XLA for TensorFlow has other random numbers
        results.append([model.generate({"token_ids": token_ids}, **ARGUMENTS)["token_ids"].tolist() for _ in range(2)])
        assert state_of(sampler) == [5, 16]  # a draw for each of 8 tokens, twice
    assert results[0] == results[1]
    assert results[0][0] != results[0][1]


def test_the_state_is_kept_when_a_row_ends_early(model, token_ids):
    sampler, prompt = Draws(), {"token_ids": token_ids[:1]}
    ids = model.generate(prompt, sampler=sampler, max_length=20, stop_token_ids=[0])["token_ids"][0, 12:].tolist()
    sampler.seed_generator.state.assign([5, 0])
    model.generate(prompt, sampler=sampler, max_length=20, stop_token_ids=ids[2:3])
    assert state_of(sampler) == [5, ids.index(ids[2]) + 1]


def test_another_number_of_a_sampler_counts_from_the_next_call_on(model, token_ids):
    sampler = keras_hub.samplers.TopPSampler(p=0.9, k=40, seed=5, temperature=5.0)
    inputs = {"token_ids": np.repeat(token_ids[:1], 8, axis=0)}
    hot = model.generate(inputs, sampler=sampler, **ONE_TOKEN)["token_ids"][:, -1]
    sampler.temperature = 1e-3
    cold = model.generate(inputs, sampler=sampler, **ONE_TOKEN)["token_ids"][:, -1]
    assert len(set(hot.tolist())) > 1 and len(set(cold.tolist())) == 1


def test_a_sampler_of_the_call_beats_that_of_compile(model, token_ids):
    model.compile(sampler=Draws())
    greedy = model.generate({"token_ids": token_ids}, temperature=0, **ONE_TOKEN)["token_ids"].tolist()
    for sampler in ("greedy", {"class_name": "greedy", "config": {}}, keras_hub.samplers.GreedySampler()):
        output = model.generate({"token_ids": token_ids}, sampler=sampler, **ONE_TOKEN)
        assert output["token_ids"].tolist() == greedy


def test_options_beside_a_sampler(model, token_ids):
    def forbid(token_ids, lengths, logits):
        return ops.where(ops.arange(logits.shape[1])[None] < 290, float("-inf"), logits)

    output = model.generate({"token_ids": token_ids}, sampler=Draws(), logits_processors=[forbid], **ONE_TOKEN)
    assert output["token_ids"][:, 12:].min() >= 290


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 3}, "seed (3) must be None with Draws, which draws for itself"),
        ({"temperature": 0.5}, "temperature and sampler (Draws) are both given"),
    ],
)
def test_what_a_sampler_that_draws_cannot_use(model, token_ids, options, words):
    with pytest.raises(ValueError) as caught:
        model.generate({"token_ids": token_ids}, sampler=Draws(), **options, **ONE_TOKEN)
    assert words in str(caught.value)


def test_a_sampler_that_gives_another_shape(model, token_ids):
    class Wrong(keras_hub.samplers.Sampler):
        def get_next_token(self, probabilities):
            return ops.argmax(probabilities, axis=-1)[:, None]

    with pytest.raises(ValueError, match=r"Wrong.get_next_token gave shape \(4, 1\); expected one token for each row"):
        model.generate({"token_ids": token_ids}, sampler=Wrong(), **ONE_TOKEN)


@pytest.mark.parametrize(
    ("processor", "error", "words"),
    [
        (lambda token_ids, lengths, logits: logits[:, :5], ValueError, r"logits_processors\[0\] gave shape \(4, 5\)"),
        (lambda token_ids, lengths, logits: None, TypeError, r"logits_processors\[0\] gave None"),
    ],
)
def test_processors_that_give_something_else(model, token_ids, processor, error, words):
    with pytest.raises(error, match=words):
        model.generate({"token_ids": token_ids}, logits_processors=[processor], temperature=0, **ONE_TOKEN)


def test_processors_are_told_apart(model, token_ids):
    """Also where they cannot be hashed, and are the same code."""

    @dataclasses.dataclass
    class Only:
        token: int

        def __call__(self, token_ids, lengths, logits):
            return ops.where(ops.arange(logits.shape[1])[None] == self.token, logits, float("-inf"))

    processors = [Only(5), Only(6)]
    for processor in processors + processors:
        output = model.generate({"token_ids": token_ids}, logits_processors=[processor], **ONE_TOKEN)
        assert set(output["token_ids"][:, 12:].ravel()) == {processor.token}
