"""Faults of KerasHub's Llama that kllama does not share and that no other test shows; see docs/from-kerashub.md."""

import ast
import inspect
import re

import keras
import numpy as np
import pytest
from keras import ops

import kllama

SIZES = {"vocabulary_size": 50, "num_layers": 2, "num_query_heads": 4, "hidden_dim": 16, "intermediate_dim": 24}
SIZES |= {"num_key_value_heads": 2}
IDS = np.random.default_rng(1).integers(0, 50, (2, 6)).astype("int32")


def make_model(**arguments) -> kllama.LlamaCausalLM:
    keras.utils.set_random_seed(1)
    return kllama.LlamaCausalLM(kllama.LlamaBackbone(**SIZES, **arguments, initializer_range=0.3))


def spy_on_shapes(layer, monkeypatch) -> list[tuple]:
    """Note how wide the ids or hidden states of each call of the embedding layer are, and whether it was the head."""
    calls, call = [], layer.call

    def noting(inputs, reverse=False):
        calls.append(("head" if reverse else "ids", int(inputs.shape[1])))
        return call(inputs, reverse=reverse)

    monkeypatch.setattr(layer, "call", noting)
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
    """The calls of the embedding layer while two prompts of 6 ids grow to 9 of at most 200."""
    model = make_model()
    model.compile(sampler="greedy", run_eagerly=True)
    calls = spy_on_shapes(model.backbone.token_embedding, monkeypatch)
    inputs = {"token_ids": np.pad(IDS, ((0, 0), (0, 194))), "padding_mask": np.arange(200) < np.full((2, 1), 6)}
    model.generate(inputs, max_length=9, stop_token_ids=None)
    return calls


def test_prompts_are_read_at_their_own_length(generated):
    """KH-G2: KerasHub runs the whole of `max_length` through the model, padding and all."""
    widths = [width for kind, width in generated if kind == "ids"]
    assert 6 <= widths[0] < 200 and set(widths[1:]) == {1}


def test_prompts_get_no_logits(generated):
    """KH-A11: KerasHub computes logits for every position of the prompt, and drops them."""
    assert {width for kind, width in generated if kind == "head"} == {1}


def test_another_sampler_leaves_training_alone():
    """KH-G9: in KerasHub a new sampler takes a new `compile`, which throws the optimizer away."""
    model = make_model()
    model.compile(optimizer=keras.optimizers.Adam(0.01), sampler="greedy")
    model.fit({"token_ids": IDS}, verbose=0)
    optimizer, steps = model.optimizer, int(ops.convert_to_numpy(model.optimizer.iterations))
    model.sampler = "top_p"
    model.generate({"token_ids": IDS}, max_new_tokens=1, stop_token_ids=None, temperature=0.5)
    assert model.optimizer is optimizer and int(ops.convert_to_numpy(optimizer.iterations)) == steps == 1
