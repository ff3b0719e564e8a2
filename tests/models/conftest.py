"""Small models that the tests of this folder share."""

import numpy as np
import pytest

import kllama


@pytest.fixture(scope="module")
def stories260k(assets):
    """The trained 260K model with grouped heads, as a Hugging Face directory holds it."""
    return kllama.LlamaCausalLM.from_preset(assets / "models" / "stories260K")


@pytest.fixture
def random_model():
    """Build a function (arguments of the backbone that differ) -> a language model with random weights, no text."""

    def build(**arguments):
        defaults = {
            "vocabulary_size": 300,
            "num_layers": 2,
            "num_query_heads": 4,
            "hidden_dim": 16,
            "intermediate_dim": 24,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
        }
        return kllama.LlamaCausalLM(kllama.LlamaBackbone(**{**defaults, **arguments}))

    return build


@pytest.fixture
def token_ids():
    """Give ids (4, 12) for a vocabulary of 300."""
    return np.random.default_rng(2).integers(0, 300, (4, 12)).astype("int32")
