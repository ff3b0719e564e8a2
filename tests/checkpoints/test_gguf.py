"""GGUF checkpoints: real files, files that llama.cpp's library writes, and what is refused."""

import logging
import struct
import time
import tracemalloc

import numpy as np
import pytest

from kllama.checkpoints.checkpoint import STRICT
from kllama.checkpoints.gguf.reading import GgufCheckpoint, is_gguf
from kllama.checkpoints.huggingface.reading import HuggingFaceCheckpoint
from kllama.core.rope import RotaryFrequencies
from kllama.errors import CheckpointError, KllamaError, MissingFileError, UnsupportedError
from kllama.text.tokenizer import LlamaTokenizer
from tests.checkpoints.damage import refuses
from tests.checkpoints.gguf_files import (
    ARRAY,
    CONFIG,
    KEYS,
    SENTENCEPIECE,
    SlowReader,
    gguf,
    random_tensors,
    write_model,
)
from tests.checkpoints.mutation import mutate

pytestmark = pytest.mark.backend_independent

TENSORS, OWN = random_tensors()
SMOLLM2 = "models/smollm2-135m-instruct"


@pytest.fixture
def write(tmp_path):
    """Return a function that writes the small model, with changes, and gives its path."""

    def write_small(keys=None, tensors=None, architecture="llama", name="model.gguf", **options):
        path = tmp_path / name
        return write_model(path, TENSORS if tensors is None else tensors, keys, architecture, **options)

    return write_small


def assert_same_tensors(checkpoint, expected):
    found = dict(checkpoint.tensors())
    assert list(found) == list(expected)
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


# === Real files ===


@pytest.mark.parametrize("kind, dtype, step", [("f32", "float32", 0), ("f16", "float16", 2**-11)])
def test_floats_of_a_real_model(assets, kind, dtype, step):
    checkpoint = GgufCheckpoint(assets / f"gguf/stories260K-{kind}.gguf")
    expected = HuggingFaceCheckpoint(assets / "models/stories260K")
    defaults = {"attention_dropout": 0.0, "initializer_range": 0.02}
    assert {**defaults, **checkpoint.backbone_config} == expected.backbone_config
    assert (checkpoint.dtype, checkpoint.has_head, checkpoint.open_questions) == (dtype, True, {})
    expected = dict(expected.tensors())
    for path, array in checkpoint.tensors():
        np.testing.assert_allclose(array, expected.pop(path), rtol=step, atol=step * 2**-13, err_msg=path)
    assert not expected


@pytest.mark.parametrize("kind, levels", [("q8_0", 127), ("q4_0", 8)])
def test_quantised_values_are_a_step_away_at_most(assets, kind, levels):
    checkpoint = GgufCheckpoint(assets / f"gguf/stories260K-{kind}.gguf")
    assert checkpoint.dtype == "float32"
    assert {"float32", "float16", "Q8_0"} <= set(checkpoint.stored_bytes)
    expected = dict(HuggingFaceCheckpoint(assets / "models/stories260K").tensors())
    for path, array in checkpoint.tensors():
        reference = expected.pop(path)
        assert np.max(np.abs(array - reference)) <= np.max(np.abs(reference)) / levels, path
    assert not expected


def test_a_file_without_theta_and_size(assets):
    checkpoint = GgufCheckpoint(assets / "gguf/llama-2-tiny-random.gguf")
    config = checkpoint.backbone_config
    assert (config["rope_max_wavelength"], config["vocabulary_size"]) == (10000.0, 32000)
    assert (config["layer_norm_epsilon"], config["tie_word_embeddings"]) == (1e-05, False)
    assert checkpoint.stored_bytes == {"float16": 1026048, "float32": 96}
    assert len(list(checkpoint.tensors())) == 12


def test_what_a_real_file_says_of_its_tokenizer(assets):
    checkpoint = GgufCheckpoint(assets / SMOLLM2 / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert checkpoint.tokenizer_config.pop("chat_template").startswith("{% for message in messages %}{% if loop.first")
    assert checkpoint.tokenizer_config == {
        "tokenizer": str(checkpoint.path),
        "start_token": 1,
        "end_token": 2,
        "pad_token": "<|im_end|>",
    }
    assert checkpoint.preprocessor_config == {"add_start_token": False}
    assert checkpoint.generation_config == {"stop_token_ids": [2]}


# === Architectures ===


def test_a_small_llama(write):
    checkpoint = GgufCheckpoint(write())
    expected = {
        **CONFIG,
        "max_sequence_length": 128,
        "layer_norm_epsilon": 1e-5,
        "rope_max_wavelength": 10000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "layer_types": None,
        "activation": "silu",
    }
    assert checkpoint.backbone_config == expected
    assert (checkpoint.tokenizer_config, checkpoint.generation_config) == (None, {})
    assert_same_tensors(checkpoint, OWN)


@pytest.mark.parametrize(
    "architecture, changes",
    [
        ("llama", {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"attention_bias": True}),
        ("qwen3", {"qk_norm": True, "tie_word_embeddings": True}),
    ],
)
def test_flags_follow_from_the_tensors(write, architecture, changes):
    tensors, own = random_tensors(architecture, **changes)
    checkpoint = GgufCheckpoint(write(tensors=tensors, architecture=architecture))
    assert {name: checkpoint.backbone_config[name] for name in changes} == changes
    assert_same_tensors(checkpoint, own)


def test_rows_of_q_and_k_are_interleaved_in_llama_alone(write):
    llama = dict(GgufCheckpoint(write()).tensors())
    qwen = dict(GgufCheckpoint(write(architecture="qwen2", name="q.gguf")).tensors())
    differ = {path.split("/", 1)[1] for path in llama if not np.array_equal(llama[path], qwen[path])}
    assert differ == {"self_attention/query/kernel", "self_attention/key/kernel"}
    stored = TENSORS["blk.0.attn_q.weight"].reshape(4, 4, 2, 32)  # heads, pairs, members of a pair, in
    kernel = llama["transformer_layer_0/self_attention/query/kernel"]
    np.testing.assert_array_equal(kernel[:, :, :4], stored[:, :, 0].transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_quantised_models(write, kind):
    checkpoint = GgufCheckpoint(write(kind=kind))
    assert checkpoint.dtype == "float32"
    assert set(checkpoint.stored_bytes) == {kind, "float32"}
    for path, array in checkpoint.tensors():
        assert array.dtype == np.float32
        assert np.mean(np.abs(array - OWN[path])) < 0.25, path


def test_the_dtype_is_that_of_most_parameters(write):
    half = {name: array.astype("float16") if array.ndim == 2 else array for name, array in TENSORS.items()}
    checkpoint = GgufCheckpoint(write(tensors=half))
    assert checkpoint.dtype == "float16"
    assert {array.dtype.name for _, array in checkpoint.tensors()} == {"float16", "float32"}
    assert GgufCheckpoint(write(kind="BF16", name="b.gguf")).dtype == "bfloat16"


def test_a_model_in_parts(write):
    path = write(split_max_tensors=8)
    first = path.with_name("model-00001-of-00003.gguf")
    assert_same_tensors(GgufCheckpoint(first), OWN)
    assert_same_tensors(GgufCheckpoint(first.parent), OWN)


# === Keys ===


@pytest.mark.parametrize(
    "keys, argument, value",
    [
        ({"attention.head_count_kv": None}, "num_key_value_heads", 4),
        ({"attention.head_count_kv": [2, 2]}, "num_key_value_heads", 2),
        ({"feed_forward_length": [64, 64]}, "intermediate_dim", 64),
        ({"attention.key_length": 8, "attention.value_length": 8}, "head_dim", 8),
        ({"rope.dimension_count": None}, "head_dim", 8),
        ({"attention.layer_norm_rms_epsilon": 1e-6}, "layer_norm_epsilon", 1e-6),
        ({"rope.freq_base": 500000.0}, "rope_max_wavelength", 500000.0),
        ({"rope.freq_base": None}, "rope_max_wavelength", 10000.0),
        ({"attention.sliding_window": 16}, "sliding_window", 16),
        ({"attention.sliding_window": 0}, "sliding_window", None),
        ({"vocab_size": 40, "tensor_data_layout": "Meta AI original pth"}, "vocabulary_size", 40),
        ({"expert_count": 0, "attention.causal": True, "rope.scaling.finetuned": False}, "qk_norm", False),
        ({"pooling_type": 3}, "qk_norm", False),
        # as in the files of Qwen3: all of a key turns, however long it is
        ({"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": None}, "head_dim", 16),
    ],
)
def test_keys(write, keys, argument, value):
    tensors = TENSORS
    if keys.get("attention.head_count_kv", 2) is None:
        tensors, _ = random_tensors(num_key_value_heads=4)
    if value == 16 and argument == "head_dim":
        tensors, _ = random_tensors(head_dim=16)
    assert GgufCheckpoint(write(keys, tensors)).backbone_config[argument] == value


@pytest.mark.parametrize(
    "keys, error, message",
    [
        ({"block_count": None, "context_length": None}, CheckpointError, "llama.context_length, llama.block_count"),
        ({"block_count": 0}, CheckpointError, "llama.block_count = 0"),
        ({"block_count": 2.0}, CheckpointError, "llama.block_count = 2.0"),
        ({"block_count": "2"}, CheckpointError, 'llama.block_count = "2"'),
        ({"block_count": True}, CheckpointError, "llama.block_count = true"),
        ({"block_count": [2, 2]}, CheckpointError, "llama.block_count = [2, 2]"),
        ({"embedding_length": 2**31}, CheckpointError, "from 1 to 16777216"),
        ({"attention.head_count": 3}, CheckpointError, "multiple of"),
        ({"attention.head_count_kv": 3}, CheckpointError, "multiple of"),
        ({"attention.head_count_kv": [2, 1]}, UnsupportedError, "the same for all layers"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, CheckpointError, "above 0"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, CheckpointError, "NaN"),
        ({"attention.key_length": 8, "attention.value_length": 16}, UnsupportedError, "value_length = 16; expected 8"),
        ({"attention.key_length": 16}, UnsupportedError, "value_length = 8; expected 16"),
        ({"rope.dimension_count": 4}, UnsupportedError, "dimension_count = 4; expected 8"),
        ({"rope.freq_base": 0.5}, CheckpointError, "above 1"),
        ({"vocab_size": 41}, CheckpointError, "llama.vocab_size = 41; expected 40"),
        ({"expert_count": 8}, UnsupportedError, "llama.expert_count = 8; expected 0"),
        ({"expert_count": [0]}, UnsupportedError, "llama.expert_count = [0]"),
        ({"attention.causal": False}, UnsupportedError, "attention.causal = false"),
        ({"attention.scale": 0.5}, UnsupportedError, '"llama.attention.scale"'),
        ({"block_count": 1}, CheckpointError, '"blk.1.attn_norm.weight"'),
        ({"block_count": 3}, CheckpointError, "missing tensors: blk.2.attn_norm.weight"),
        ({"feed_forward_length": 32}, CheckpointError, "ffn_gate.weight = (64, 32); expected (32, 32)"),
    ],
)
def test_wrong_keys(write, keys, error, message):
    with refuses(error, "model.gguf", message):
        GgufCheckpoint(write(keys))


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"general.type": "adapter"}, 'general.type = "adapter"'),
        ({"general.quantization_version": 1}, "general.quantization_version = 1"),
    ],
)
def test_files_of_other_kinds(write, entries, message):
    with refuses(UnsupportedError, message):
        GgufCheckpoint(write(entries=entries))


def test_a_long_array_in_a_numbers_place_costs_no_more_than_its_bytes(tmp_path):
    count = 2**20
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf({"general.type": struct.pack("<IIQ", ARRAY, 0, count) + bytes(count)}))
    tracemalloc.start()
    try:
        with refuses(UnsupportedError, "general.type = [0, 0, 0"):
            GgufCheckpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * count
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("model", [[1, 2], ["llama"], True])
def test_a_kind_of_tokenizer_that_is_no_text_is_refused(write, model):
    path = write(entries={**SENTENCEPIECE, "tokenizer.ggml.model": model})
    with refuses(UnsupportedError, "model.gguf", "tokenizer.ggml.model"):
        LlamaTokenizer.from_preset(path)


@pytest.mark.parametrize("architecture", ["gemma3", "bert", "mistral", "qwen2moe"])
def test_other_architectures(write, architecture):
    with refuses(UnsupportedError, f'= "{architecture}"; expected one of llama, qwen2, qwen3'):
        GgufCheckpoint(write(architecture=architecture))


def test_a_file_of_a_thousand_claims_is_refused_at_once(write):
    path = write({"block_count": 2**16, "feed_forward_length": 2**24})
    start = time.perf_counter()
    with refuses(CheckpointError, "missing tensors: blk.2."):
        GgufCheckpoint(path)
    assert time.perf_counter() - start < 1


# === Rope ===


def llama3_table(factor, low, high, original, theta=500000.0, head_dim=8):
    """The divisors as llama.cpp's converter computes them."""
    table = []
    for place in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (place / head_dim)
        if wavelength < original / high:
            table.append(1)
        elif wavelength > original / low:
            table.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            table.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(table, "float32")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "numbers", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.5, 1.0, 4.0, 4096), (4.0, 1.5, 6.0, 2000)]
)
def test_llama3_divisors(write, numbers, head_dim):
    table = llama3_table(*numbers, head_dim=head_dim)
    sizes = {"num_query_heads": 1, "num_key_value_heads": 1, "head_dim": head_dim, "num_layers": 1}
    keys = {"attention.head_count": 1, "attention.head_count_kv": 1, "block_count": 1, "rope.freq_base": 500000.0}
    keys |= {f"attention.{name}_length": head_dim for name in ("key", "value")} | {"rope.dimension_count": head_dim}
    tensors, _ = random_tensors(**sizes)
    path = write(keys, {**tensors, "rope_freqs.weight": table})
    scaling = GgufCheckpoint(path).backbone_config["rope_scaling"]
    found = tuple(scaling.values())[1:]
    assert found == (numbers if numbers[1] == 1 else pytest.approx((4.0, 1.0, 4.0, 2000 / 1.5), rel=1e-3))
    plain, scaled = (RotaryFrequencies(head_dim, 500000.0, kind) for kind in (None, scaling))
    np.testing.assert_allclose(scaled._static("llama3"), plain._static("default") / table, rtol=5e-6)


@pytest.mark.parametrize("numbers", [(8.0, 1.0, 4.0, 16), (4.0, 1.0, 4.0, 20), (8.0, 1.0, 4.0, 64), (2.0, 1.0, 4.0, 8)])
def test_llama3_divisors_of_small_models(write, numbers):
    table = llama3_table(*numbers, theta=10000.0)
    scaling = GgufCheckpoint(write(tensors={**TENSORS, "rope_freqs.weight": table})).backbone_config["rope_scaling"]
    plain, scaled = (RotaryFrequencies(8, 10000.0, kind) for kind in (None, scaling))
    np.testing.assert_allclose(scaled._static("llama3"), plain._static("default") / table, rtol=5e-6)


def test_divisors_of_ones_are_no_scaling(write):
    path = write(tensors={**TENSORS, "rope_freqs.weight": np.ones(4, "float32")})
    assert GgufCheckpoint(path).backbone_config["rope_scaling"] is None


@pytest.mark.parametrize(
    "table, keys, error, message",
    [
        ([1, 2, 3, 4], {}, UnsupportedError, "rope_freqs.weight = [1.0, 2.0, 3.0, 4.0]"),
        ([8, 8, 8, 1], {}, UnsupportedError, "rope_freqs.weight"),
        ([1, 1, 0, 8], {}, CheckpointError, "expected positive numbers"),
        ([1, 1, np.nan, 8], {}, CheckpointError, "NaN"),
        ([1, 1, 8], {}, CheckpointError, "rope_freqs.weight = (3,); expected (4,)"),
        ([1, 1, 1, 8], {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, CheckpointError, "expected none"),
    ],
)
def test_other_divisors(write, table, keys, error, message):
    tensors = {**TENSORS, "rope_freqs.weight": np.array(table, "float32")}
    with refuses(error, message):
        GgufCheckpoint(write(keys, tensors))


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        (
            {**YARN, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.attn_factor": 0.5},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 0.5 * (1 + 0.1 * np.log(4)),
                "beta_fast": 16.0,
            },
        ),
    ],
)
def test_position_scaling(write, keys, expected):
    assert GgufCheckpoint(write(keys)).backbone_config["rope_scaling"] == expected


def test_longrope(write):
    short, long = np.array([1, 1.1, 1.2, 1.3], "float32"), np.array([1, 2, 4, 8.5], "float32")
    tensors = {**TENSORS, "rope_factors_short.weight": short, "rope_factors_long.weight": long}
    keys = {**YARN, "rope.scaling.type": "longrope", "rope.scaling.factor": None, "rope.scaling.attn_factor": 1.19}
    assert GgufCheckpoint(write(keys, tensors)).backbone_config["rope_scaling"] == {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 4.0, 8.5],
        "original_max_position_embeddings": 32,
        "attention_factor": 1.19,
    }


@pytest.mark.parametrize(
    "keys, error, message",
    [
        ({"rope.scaling.type": "su"}, UnsupportedError, 'rope.scaling.type = "su"'),
        ({"rope.scaling.type": 1}, CheckpointError, "expected a text"),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, CheckpointError, "rope.scaling.factor = 2.0"),
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, CheckpointError, "expected the same"),
        ({"rope.scaling.factor": 0.5}, CheckpointError, "at least 1"),
        ({"rope.scaling.factor": float("inf")}, CheckpointError, "rope.scaling.factor"),
        ({"rope.scaling.type": "longrope"}, CheckpointError, "expected rope_factors_short.weight and"),
        ({"rope.scaling.attn_factor": 2.0}, UnsupportedError, "rope.scaling.attn_factor = 2.0"),
        ({**YARN, "rope.scaling.yarn_log_multiplier": 0.1}, UnsupportedError, "yarn_log_multiplier"),
        ({**YARN, "rope.scaling.original_context_length": 32.5}, CheckpointError, "original_context_length = 32.5"),
    ],
)
def test_wrong_position_scaling(write, keys, error, message):
    with refuses(error, message):
        GgufCheckpoint(write(keys))


# === Tensors ===


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), CheckpointError, "missing tensors: blk.1.ffn_up.weight"),
        (lambda t: t.pop("token_embd.weight"), CheckpointError, "missing tensors: token_embd.weight"),
        (lambda t: t.update({"aux.weight": np.ones(3, "f4")}), CheckpointError, '"aux.weight"'),
        (
            lambda t: t.update({"blk.0.attn_q.bias": np.ones(32, "f4")}),
            CheckpointError,
            "missing tensors: blk.0.attn_k.b",
        ),
        (lambda t: t.update({"blk.0.attn_qkv.weight": np.ones(3, "f4")}), UnsupportedError, "a fused projection"),
        (lambda t: t.update({"blk.0.attn_rot_embd.weight": np.ones(3, "f4")}), UnsupportedError, "attn_rot_embd"),
        (lambda t: t.update({"blk.0.ffn_gate_exps.weight": np.ones(3, "f4")}), UnsupportedError, "experts"),
        (lambda t: t.update({"blk.0.attn_q_norm.weight": np.ones(8, "f4")}), CheckpointError, "attn_q_norm"),
        (
            lambda t: t.update({"output.weight": np.ones((32, 40), "f4")}),
            CheckpointError,
            "(32, 40); expected (40, 32)",
        ),
    ],
)
def test_wrong_tensors(write, change, error, message):
    tensors = dict(TENSORS)
    change(tensors)
    with refuses(error, "model.gguf", message):
        GgufCheckpoint(write(tensors=tensors))


def test_unused_tensors_may_be_left_out(write, caplog):
    path = write(tensors={**TENSORS, "aux.weight": np.ones(3, "f4")})
    with caplog.at_level(logging.WARNING):
        assert_same_tensors(GgufCheckpoint(path, STRICT._replace(unused=False)), OWN)
    assert '"aux.weight"' in caplog.text


def test_weights_that_are_not_finite(write):
    path = write(tensors={**TENSORS, "output_norm.weight": np.full(32, np.nan, "f4")})
    with refuses(CheckpointError, "output_norm.weight = NaN or infinity in 32"):
        list(GgufCheckpoint(path).tensors())
    allowed = dict(GgufCheckpoint(path, STRICT._replace(check_finite=False)).tensors())
    assert np.all(np.isnan(allowed["sequence_output_layernorm/scale"]))


# === Tokenizers ===


def test_what_a_file_says_of_its_tokenizer(write):
    entries = {
        **SENTENCEPIECE,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eot_token_id": 32,
        "tokenizer.ggml.eom_token_id": 2,
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "with tools",
        "tokenizer.chat_templates": ["tool_use"],
    }
    checkpoint = GgufCheckpoint(write(entries=entries))
    assert checkpoint.tokenizer_config == {
        "tokenizer": str(checkpoint.path),
        "start_token": 1,
        "end_token": 2,
        "pad_token": "<pad>",
        "chat_template": {"default": "plain", "tool_use": "with tools"},
    }
    assert checkpoint.preprocessor_config == {"add_start_token": False}
    assert checkpoint.generation_config == {"stop_token_ids": [2, 32]}


TOKENS = SENTENCEPIECE["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("tokenizer.ggml.tokens", TOKENS[:-1], "number of tokenizer.ggml.scores = 40; expected 39"),
        ("tokenizer.ggml.tokens", "text", "expected a list of texts"),
        ("tokenizer.ggml.scores", [0.0] * 39, "number of tokenizer.ggml.scores = 39; expected 40"),
        ("tokenizer.ggml.scores", [1] * 40, "tokenizer.ggml.scores"),
        ("tokenizer.ggml.token_type", [1] * 41, "number of tokenizer.ggml.token_type = 41"),
        ("tokenizer.ggml.merges", "a b", "tokenizer.ggml.merges"),
        ("tokenizer.ggml.bos_token_id", 40, "tokenizer.ggml.bos_token_id"),
        ("tokenizer.ggml.eom_token_id", "2", "tokenizer.ggml.eom_token_id"),
        ("tokenizer.ggml.add_bos_token", 1, "expected true or false"),
        ("tokenizer.chat_template", 1, "expected a text"),
    ],
)
def test_wrong_tokenizers(write, key, value, message):
    with refuses(CheckpointError, "model.gguf", message):
        GgufCheckpoint(write(entries={**SENTENCEPIECE, key: value}))


def test_tokens_that_do_not_fit_the_embeddings(write):
    tensors, _ = random_tensors(vocabulary_size=48)
    with refuses(CheckpointError, "number of tokens = 40; expected 48"):
        GgufCheckpoint(write(tensors=tensors, entries=SENTENCEPIECE))


@pytest.mark.parametrize("entries", [{"tokenizer.ggml.model": "none"}, {"tokenizer.ggml.model": "llama"}])
def test_files_without_a_tokenizer(write, entries):
    assert GgufCheckpoint(write(entries=entries)).tokenizer_config is None


# === Paths ===


def test_what_is_a_gguf_model(write, tmp_path):
    path = write(name="models.gguf")
    plain = path.rename(tmp_path / "weights")
    assert is_gguf(plain)
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "missing.gguf")
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert is_gguf(tmp_path / "pointer.gguf")
    with refuses(CheckpointError, "git lfs pull"):
        GgufCheckpoint(tmp_path / "pointer.gguf")


def test_directories(write, tmp_path):
    with refuses(MissingFileError, "no .gguf file"):
        GgufCheckpoint(tmp_path)
    path = write(name="a.gguf")
    assert is_gguf(tmp_path)
    assert GgufCheckpoint(tmp_path).path == path
    write(name="b.gguf")
    with refuses(CheckpointError, "several models: a.gguf, b.gguf"):
        GgufCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not is_gguf(tmp_path)


# === Mutants ===


def check_mutants(path, sound, count):
    """Open mutants of a model; return how many were accepted, each with a config and tensors that fit each other."""
    header, accepted = SlowReader(sound).data_start, 0
    for seed in range(count):
        data = mutate(sound, seed, [range(header)])
        path.write_bytes(data)
        try:
            checkpoint = GgufCheckpoint(path)
            tensors = dict(checkpoint.tensors())
        except KllamaError as error:
            assert "\n" not in str(error), seed
            continue
        accepted += 1
        assert_as_said(checkpoint, tensors, SlowReader(data))
    return accepted


def assert_as_said(checkpoint, tensors, slow):
    """Compare with what an independent reader finds in the file."""
    config = checkpoint.backbone_config
    said = {key.removeprefix("llama."): value for key, value in slow.metadata.items()}
    expected = {"num_layers": "block_count", "hidden_dim": "embedding_length", "max_sequence_length": "context_length"}
    assert {name: config[name] for name in expected} == {name: said[key] for name, key in expected.items()}
    assert config["layer_norm_epsilon"] == pytest.approx(said["attention.layer_norm_rms_epsilon"])
    assert config["rope_max_wavelength"] == pytest.approx(said.get("rope.freq_base", 10000))
    shape, _, start = slow.tensors["output_norm.weight"]
    norm = np.frombuffer(slow._data, "<f4", shape[0], start)
    np.testing.assert_array_equal(tensors["sequence_output_layernorm/scale"], norm)
    assert sum(array.size for array in tensors.values()) == sum(int(np.prod(info[0])) for info in slow.tensors.values())


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutants_are_refused_or_whole(write, count):
    path = write(entries=SENTENCEPIECE)
    assert 0 < check_mutants(path, path.read_bytes(), count) < count


def test_the_small_model_says_what_the_tests_think(write):
    said = SlowReader(write().read_bytes()).metadata
    assert {key: said[f"llama.{key}"] for key in KEYS if "epsilon" not in key} == {
        key: value for key, value in KEYS.items() if "epsilon" not in key
    }
