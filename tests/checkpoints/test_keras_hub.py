"""Presets that KerasHub's own Llama classes wrote: the same logits, the same token ids, the same text."""

import contextlib
import gc
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import keras
import keras_hub
import numpy as np
import pytest

import kllama
from kllama.checkpoints.presets.keras_hub import KerasHubCheckpoint
from kllama.errors import CheckpointError
from kllama.text.formats.rules import byte_characters
from tests.checkpoints.damage import refuses

SIZES = {
    "num_layers": 2,
    "num_query_heads": 4,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "num_key_value_heads": 2,
    "layer_norm_epsilon": 1e-3,
    "rope_max_wavelength": 500,
}
ROPE = {
    "rope_frequency_adjustment_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_pretraining_sequence_length": 16,
}
IDS = np.random.default_rng(0).integers(0, 24, (2, 24))
MASK = np.arange(24) < np.array([[24], [17]])


class Kind(NamedTuple):
    """A preset to be written, and what kllama makes of it."""

    class_name: str
    arguments: dict
    change: Callable | None = None
    is_tied: bool = False
    tolerance: float = 1e-5
    max_shard_size: float = 10


def copy_table(backbone):
    embedding = backbone.token_embedding
    embedding.reverse_embeddings.assign(keras.ops.transpose(embedding.embeddings))


def copy_all_but_one(backbone):
    copy_table(backbone)
    head = keras.ops.convert_to_numpy(backbone.token_embedding.reverse_embeddings).copy()
    head[-1, -1] += 1
    backbone.token_embedding.reverse_embeddings.assign(head)


def to_int8(backbone, filters=None):
    gc.freeze()  # Keras collects garbage with each layer
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Layer .* does not have a `quantize` method")
        backbone.quantize("int8", filters=filters)
    gc.unfreeze()


def copy_to_int8(backbone):
    copy_table(backbone)
    to_int8(backbone)


def some_to_int8(backbone):
    to_int8(backbone, ["query", "feedforward_output_dense"])


KINDS = {
    "llama": Kind("LlamaBackbone", {}),
    "llama tied": Kind("LlamaBackbone", {"tie_word_embeddings": True}, is_tied=True),
    "llama sharded": Kind("LlamaBackbone", {}, max_shard_size=5e-6),
    "llama bfloat16": Kind("LlamaBackbone", {"dtype": "bfloat16"}, tolerance=0.25),
    "llama int8": Kind("LlamaBackbone", {}, to_int8),
    "llama3": Kind("Llama3Backbone", ROPE),
    "llama3 copied head": Kind("Llama3Backbone", {}, copy_table, is_tied=True),
    "llama3 head nearly copied": Kind("Llama3Backbone", {}, copy_all_but_one),
    "llama3 int8 tied": Kind("Llama3Backbone", {"tie_word_embeddings": True}, to_int8, is_tied=True),
    "llama3 int8 copied head": Kind("Llama3Backbone", {}, copy_to_int8, is_tied=True),
    "llama3 int8 in part": Kind("Llama3Backbone", {}, some_to_int8),
}


class Written(NamedTuple):
    kind: Kind
    path: Path
    backbone: keras.Model
    logits: np.ndarray


def logits(backbone) -> np.ndarray:
    hidden_states = backbone({"token_ids": IDS, "padding_mask": MASK.astype("int32")})
    outputs = backbone.token_embedding(hidden_states, reverse=True)
    return keras.ops.convert_to_numpy(keras.ops.cast(outputs, "float32"))[MASK]


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory) -> Written:
    kind = KINDS[request.param]
    keras.utils.set_random_seed(0)
    backbone = getattr(keras_hub.models, kind.class_name)(vocabulary_size=24, **SIZES, **kind.arguments)
    rng = np.random.default_rng(0)
    for weight in backbone.weights:
        is_scale = weight.path.endswith("/scale")
        weight.assign(rng.normal(is_scale, 0.3, weight.shape).astype("float32"))
    if kind.change is not None:
        kind.change(backbone)
    path = tmp_path_factory.mktemp("preset")
    backbone.save_to_preset(str(path), max_shard_size=kind.max_shard_size)
    return Written(kind, path, backbone, logits(backbone))


@pytest.fixture(scope="module")
def loaded(written):
    with logs() as messages:
        backbone = kllama.LlamaBackbone.from_preset(written.path)
    return backbone, messages


@contextlib.contextmanager
def logs() -> Iterator[list[str]]:
    """Collect what kllama says."""
    messages, logger, handler = [], logging.getLogger("kllama"), logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.setLevel(level)
    logger.removeHandler(handler)


def test_logits(written, loaded):
    np.testing.assert_allclose(logits(loaded[0]), written.logits, rtol=0, atol=written.kind.tolerance)
    assert np.ptp(written.logits) > 1
    assert loaded[0].tie_word_embeddings == written.kind.is_tied


def test_weights_keep_their_dtypes(written, loaded):
    dtypes = {weight.path: weight.dtype for weight in written.backbone.weights}
    if written.kind.is_tied:
        dtypes = {path: dtype for path, dtype in dtypes.items() if "reverse" not in path}
    assert {weight.path: weight.dtype for weight in loaded[0].weights} == dtypes


@pytest.mark.parametrize("written", ["llama int8"], indirect=True)
@pytest.mark.parametrize(
    "group",
    [
        "reversible_embedding",
        "llama_transformer_decoder/_self_attention_layer/_query_dense",
        "llama_transformer_decoder/_feedforward_gate_dense",
    ],
)
def test_scales_that_int8_cannot_be_divided_by(written, tmp_path, group):
    folder, name = shutil.copytree(written.path, tmp_path / "preset"), f"layers/{group}/vars/1"
    with h5py.File(folder / "model.weights.h5", "r+") as file:
        file[name][(0,) * file[name].ndim] = 0
    with refuses(CheckpointError, folder / "model.weights.h5", name, "1 of "):
        list(KerasHubCheckpoint(folder).tensors())


def test_says_that_it_ties_a_copied_head(written, loaded):
    is_copied = written.kind.is_tied and "tie_word_embeddings" not in written.kind.arguments
    assert [str(written.path) in message and "tied" in message for message in loaded[1]] == [True] * is_copied


def test_saved_again_it_is_kllamas(written, loaded, tmp_path):
    loaded[0].save_to_preset(str(tmp_path))
    np.testing.assert_array_equal(logits(kllama.LlamaBackbone.from_preset(tmp_path)), logits(loaded[0]))


# Whole models

TEXTS = ["", "Once upon a time", "  two  spaces\n\nand lines", "naïve café 🦙 日本", "a b ab abc </s> <s>", "1234.5"]
SPM_TEXTS = ["Once upon a time there was a fox.", "Two foxes ran and ran.", "abc abc ab 1234"]


def sentencepiece_tokenizer(folder: Path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SPM_TEXTS * 9),
        model_prefix=str(folder / "spm"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return keras_hub.models.LlamaTokenizer(str(folder / "spm.model"))


def byte_pair_tokenizer(special=("<|end_of_text|>", "<|eot_id|>")):
    tokens = [*byte_characters().values(), "ab", "abc", "\u0120a", "on", "<|begin_of_text|>", *special]
    tokens += ["<|start_header_id|>", "<|end_header_id|>"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    return keras_hub.models.Llama3Tokenizer(vocabulary, ["a b", "ab c", "\u0120 a", "o n"])


@pytest.fixture(scope="module", params=["Llama", "Llama3"])
def task(request, tmp_path_factory):
    """A model of KerasHub's, and the preset that it wrote."""
    folder = tmp_path_factory.mktemp("task")
    tokenizer = sentencepiece_tokenizer(folder) if request.param == "Llama" else byte_pair_tokenizer()
    hub = keras_hub.models
    preprocessor = getattr(hub, f"{request.param}CausalLMPreprocessor")(
        tokenizer, sequence_length=40, add_end_token=False
    )
    keras.utils.set_random_seed(1)
    backbone = getattr(hub, f"{request.param}Backbone")(vocabulary_size=tokenizer.vocabulary_size(), **SIZES)
    rng = np.random.default_rng(1)
    for weight in backbone.weights:
        weight.assign(rng.normal(weight.path.endswith("/scale"), 0.3, weight.shape).astype("float32"))
    model = getattr(hub, f"{request.param}CausalLM")(backbone, preprocessor)
    model.compile(sampler="greedy")
    model.save_to_preset(str(folder / "preset"))
    return model, folder / "preset"


def ids(tokenizer, text: str) -> list[int]:
    return np.asarray(keras.ops.convert_to_numpy(tokenizer(text))).tolist()


def test_token_ids(task):
    model, path = task
    tokenizer, theirs = kllama.LlamaTokenizer.from_preset(path), model.preprocessor.tokenizer
    texts = [text for text in TEXTS if "<" not in text or isinstance(theirs, keras_hub.models.Llama3Tokenizer)]
    assert [ids(tokenizer, text) for text in texts] == [ids(theirs, text) for text in texts]
    assert tokenizer.vocabulary_size() == theirs.vocabulary_size()
    assert tokenizer.start_token_id == theirs.start_token_id
    assert tokenizer.end_token_id == theirs.end_token_id
    assert tokenizer.pad_token_id == theirs.pad_token_id
    for text in texts:
        assert tokenizer.detokenize(ids(tokenizer, text)) == theirs.detokenize(ids(theirs, text))


def test_rows(task):
    model, path = task
    preprocessor = kllama.LlamaCausalLMPreprocessor.from_preset(path)
    assert preprocessor.sequence_length == 40
    for ours, theirs in zip(preprocessor(TEXTS[1:3]), model.preprocessor(TEXTS[1:3]), strict=True):
        for one, other in zip(keras.tree.flatten(ours), keras.tree.flatten(theirs), strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(other))
    assert preprocessor.add_start_token is True and preprocessor.add_end_token is False


def test_generates_the_same(task):
    model, path = task
    loaded = kllama.LlamaCausalLM.from_preset(path)
    loaded.compile(sampler="greedy")
    rows = model.preprocessor.generate_preprocess(["Once upon", "abc"], sequence_length=14)
    theirs = model.make_generate_function()(rows, stop_token_ids=(7,))
    ours = loaded.generate(["Once upon", "abc"], max_length=14, stop_token_ids=[7])
    kept = keras.ops.convert_to_numpy(theirs["token_ids"]), keras.ops.convert_to_numpy(theirs["padding_mask"])
    tokenizer = loaded.preprocessor.tokenizer
    special = tokenizer.special_token_ids
    texts = [tokenizer.detokenize([i for i in row[mask] if i not in special]) for row, mask in zip(*kept, strict=True)]
    assert ours == texts


def test_a_class_of_either_name(task):
    _, path = task
    for name in ("LlamaCausalLM", "Llama3CausalLM"):
        assert isinstance(getattr(kllama, name).from_preset(path, load_weights=False), kllama.LlamaCausalLM)


def test_stops_at_both_tokens_of_a_llama_3(task):
    model, path = task
    loaded = kllama.LlamaCausalLM.from_preset(path, load_weights=False)
    tokenizer = model.preprocessor.tokenizer
    if isinstance(tokenizer, keras_hub.models.Llama3Tokenizer):
        stops = [tokenizer.end_token_id, tokenizer.end_token2_id]
        assert loaded.generation_config == {"stop_token_ids": stops}
    else:
        assert loaded.generation_config == {}


def test_a_tokenizer_alone(tmp_path):
    byte_pair_tokenizer().save_to_preset(str(tmp_path))
    assert ids(kllama.LlamaTokenizer.from_preset(tmp_path), "abc on") == ids(byte_pair_tokenizer(), "abc on")
    preprocessor = kllama.LlamaCausalLMPreprocessor.from_preset(tmp_path)
    assert (preprocessor.sequence_length, preprocessor.add_start_token, preprocessor.add_end_token) == (
        1024,
        True,
        True,
    )


def test_a_backbone_alone_makes_a_model_without_a_preprocessor(tmp_path):
    keras_hub.models.LlamaBackbone(vocabulary_size=24, **SIZES).save_to_preset(str(tmp_path))
    assert kllama.LlamaCausalLM.from_preset(tmp_path, load_weights=False).preprocessor is None
