"""Two preset directories that KerasHub writes: a tiny Llama and a tiny Llama 3."""

import io

import keras
import keras_hub
import numpy as np
import pytest

TEXTS = [
    "the quick brown fox jumped over the lazy dog",
    "once upon a time there was a little girl who had a dog",
    "the little dog saw a quick fox and the fox saw the dog",
    "a girl and a fox went over the hill to see the time",
    "who was there when the lazy dog jumped",
]

SIZES = {
    "num_layers": 1,
    "num_query_heads": 4,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "num_key_value_heads": 2,
}

LLAMA3_SPECIAL_TOKENS = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
LLAMA3_MERGES = ["t h", "Ġ th", "Ġth e", "Ġ d", "o g", "Ġd og", "Ġ f", "o x", "Ġf ox", "th e", "Ġ a", "Ġ l"]


def train_sentencepiece() -> bytes:
    """A vocabulary as Llama's: unknown, start, end, the 256 bytes, and pieces of the texts."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=400,
        model_type="BPE",
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def byte_letters() -> list[str]:
    """The 256 letters that a byte-level vocabulary writes bytes in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def llama3_vocabulary() -> dict[str, int]:
    """The bytes, what the merges make, and the special tokens, in this order."""
    special = [f"<|{name}|>" for name in LLAMA3_SPECIAL_TOKENS]
    merged = ["".join(merge.split()) for merge in LLAMA3_MERGES]
    return {token: i for i, token in enumerate([*byte_letters(), *merged, *special])}


def draw_weights(model, seed: int) -> None:
    """Give a model weights whose logits lie well apart, so that rounding never decides which one is largest.

    It prefers the tokens after the first 259, which are the bytes: words make better texts than halves of letters.
    """
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        if "layernorm" not in variable.path and "layer_norm" not in variable.path:
            variable.assign(generator.normal(0, 0.3, variable.shape).astype("float32"))
    head = keras.ops.convert_to_numpy(model.backbone.token_embedding.reverse_embeddings).copy()
    head[:, :259] *= 0.1
    model.backbone.token_embedding.reverse_embeddings.assign(head)


def save(model, directory) -> str:
    draw_weights(model, seed=1)
    model.save_to_preset(str(directory))
    return str(directory)


@pytest.fixture(scope="session")
def proto() -> bytes:
    pytest.importorskip("tensorflow", reason="KerasHub's own Llama needs TensorFlow for its text")
    return train_sentencepiece()


@pytest.fixture(scope="session")
def llama_preset(proto, tmp_path_factory) -> str:
    """A Llama with a SentencePiece vocabulary, as KerasHub saves it."""
    tokenizer = keras_hub.models.LlamaTokenizer(proto=proto)
    backbone = keras_hub.models.LlamaBackbone(vocabulary_size=tokenizer.vocabulary_size(), **SIZES)
    preprocessor = keras_hub.models.LlamaCausalLMPreprocessor(tokenizer, sequence_length=16)
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor)
    return save(model, tmp_path_factory.mktemp("presets") / "llama")


@pytest.fixture(scope="session")
def llama3_preset(proto, tmp_path_factory) -> str:
    """A Llama 3 with a byte-level vocabulary and scaled rotary frequencies, as KerasHub saves it."""
    tokenizer = keras_hub.models.Llama3Tokenizer(vocabulary=llama3_vocabulary(), merges=LLAMA3_MERGES)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        rope_max_wavelength=500000,
        rope_frequency_adjustment_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_pretraining_sequence_length=32,
        **{**SIZES, "num_layers": 2},
    )
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(tokenizer, sequence_length=16)
    model = keras_hub.models.Llama3CausalLM(backbone, preprocessor)
    return save(model, tmp_path_factory.mktemp("presets") / "llama3")


@pytest.fixture(scope="session")
def lora_file(llama_preset, tmp_path_factory) -> str:
    """An adapter of rank 4 for the Llama, as KerasHub saves it."""
    backbone = keras_hub.models.LlamaBackbone.from_preset(llama_preset)
    backbone.enable_lora(rank=4)
    generator = np.random.default_rng(3)
    for variable in backbone.trainable_weights:
        variable.assign(generator.normal(0, 0.3, variable.shape).astype("float32"))
    path = tmp_path_factory.mktemp("adapters") / "keras_hub.lora.h5"
    backbone.save_lora_weights(str(path))
    return str(path)


@pytest.fixture(autouse=True)
def fresh_keras():
    """No test sees the names or the dtype policy of another."""
    keras.backend.clear_session()
