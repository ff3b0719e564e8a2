"""Faults of KerasHub's Llama that kllama does not share and that no other test shows; see docs/from-kerashub.md."""

import ast
import inspect
import re

import keras
import numpy as np
import pytest
from keras import ops

import kllama
from kllama.generation.decoding import Decoding
from kllama.generation.network import Network

SIZES = {"vocabulary_size": 50, "num_layers": 2, "num_query_heads": 4, "hidden_dim": 16, "intermediate_dim": 24}
SIZES |= {"num_key_value_heads": 2}
IDS = np.random.default_rng(1).integers(0, 50, (2, 6)).astype("int32")


def make_model(**arguments) -> kllama.LlamaCausalLM:
    keras.utils.set_random_seed(1)
    return kllama.LlamaCausalLM(kllama.LlamaBackbone(**SIZES, **arguments, initializer_range=0.3))


def spy_on_shapes(monkeypatch) -> list[tuple]:
    """Note how many rows of ids or hidden states the engine runs through the network, and how many through the head."""
    calls, run, logits = [], Network.run, Network.logits

    def noting_run(network, token_ids, *arguments):
        calls.append(("ids", tuple(token_ids.shape)))
        return run(network, token_ids, *arguments)

    def noting_logits(network, hidden_states):
        calls.append(("head", tuple(hidden_states.shape[:-1])))
        return logits(network, hidden_states)

    monkeypatch.setattr(Network, "run", noting_run)
    monkeypatch.setattr(Network, "logits", noting_logits)
    return calls


def documented_defaults(cls) -> dict:
    """The values that "Defaults to" introduces in the Args of a class, by argument."""
    (section,) = re.findall(r"^Args:\n(.*?)^\w", inspect.getdoc(cls), re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^    (\w+): (.*?)(?=^    [\w*]|\Z)", section, re.MULTILINE | re.DOTALL)
    found = {name: re.search(r"Defaults to `?(\"\w+\"|True|False|-?\d[\d.e-]*\d|\d)", text) for name, text in entries}
    return {name: ast.literal_eval(match[1]) for name, match in found.items() if match}


@pytest.mark.backend_independent
def test_documented_defaults_are_those_of_the_signature():
    """KH-S13."""
    parameters = inspect.signature(kllama.LlamaBackbone.__init__).parameters
    documented = documented_defaults(kllama.LlamaBackbone)
    assert {"layer_norm_epsilon", "tie_word_embeddings", "activation"} <= documented.keys()
    assert documented == {name: parameters[name].default for name in documented}


@pytest.fixture
def generated(monkeypatch):
    """What the engine runs while two prompts of 6 ids grow to 9 of at most 200."""
    model, calls = make_model(), spy_on_shapes(monkeypatch)
    inputs = {"token_ids": np.pad(IDS, ((0, 0), (0, 194))), "padding_mask": np.arange(200) < np.full((2, 1), 6)}
    model.generate(inputs, max_length=9, stop_token_ids=None, temperature=0)
    return calls


def test_prompts_are_read_at_their_own_length(generated):
    """KH-G2: KerasHub runs the whole of `max_length` through the model, padding and all, and its last token twice."""
    shapes = [shape for kind, shape in generated if kind == "ids"]
    assert 6 <= shapes[0][1] < 32 and set(shapes[1:]) == {(2, 1)}


def test_prompts_get_no_logits(generated):
    """KH-A11: KerasHub computes logits for every position of the prompt, and drops them."""
    assert {shape for kind, shape in generated if kind == "head"} == {(2,)}


def test_a_ragged_batch_reads_each_prompt_once(monkeypatch):
    """KH-G4: KerasHub reads what a prompt has beyond the shortest one token by token."""
    sizes, read, shapes = [], Decoding._read, spy_on_shapes(monkeypatch)

    def noting(*arguments):
        chunk = read(*arguments)
        sizes.append(chunk.tokens.shape[1])
        return chunk

    monkeypatch.setattr(Decoding, "_read", noting)
    inputs = {"token_ids": np.resize(IDS, (2, 19)), "padding_mask": np.arange(19) < [[2], [19]]}
    make_model().generate(inputs, max_new_tokens=5, stop_token_ids=None, temperature=0)
    assert sizes == [1, 4]  # the first token of each row comes of reading the prompts
    assert shapes[0][1][1] >= 19 and {shape for kind, shape in shapes[1:] if kind == "ids"} == {(2, 1)}


def test_a_call_lists_the_variables_once(monkeypatch):
    """KH-G10: KerasHub lists all variables for each run of its program; here a call makes several runs."""
    model, lists = make_model(), []
    arguments = {"max_new_tokens": 40, "stop_token_ids": None, "temperature": 0}
    model.generate({"token_ids": IDS}, **arguments)
    variables = keras.Model.variables

    def counting(model):
        lists.append(model)
        return variables.fget(model)

    monkeypatch.setattr(kllama.LlamaCausalLM, "variables", property(counting))
    model.generate({"token_ids": IDS}, **arguments)
    assert len(lists) == 1


def test_another_sampler_leaves_training_alone():
    """KH-G9: in KerasHub a new sampler takes a new `compile`, which throws the optimizer away."""
    model = make_model()
    model.compile(optimizer=keras.optimizers.Adam(0.01), sampler="greedy")
    model.fit({"token_ids": IDS}, verbose=0)
    optimizer, steps = model.optimizer, int(ops.convert_to_numpy(model.optimizer.iterations))
    model.sampler = "top_p"
    model.generate({"token_ids": IDS}, max_new_tokens=1, stop_token_ids=None, temperature=0.5)
    assert model.optimizer is optimizer and int(ops.convert_to_numpy(optimizer.iterations)) == steps == 1
