"""GGUF files as they are written, without a model: random arrays, read again by our own reader and by `gguf`'s."""

import gguf
import ml_dtypes
import numpy as np
import pytest

from kllama.checkpoints.gguf.file import GgufFile
from kllama.checkpoints.gguf.writing import GGUF_DTYPES, gguf_architecture, gguf_metadata, write_gguf
from kllama.checkpoints.name_map import GGUF_LLAMA, expected_tensors
from kllama.errors import NonFiniteError, UnsupportedError

pytestmark = pytest.mark.backend_independent

CONFIG = {
    "vocabulary_size": 50,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "head_dim": 8,
    "intermediate_dim": 40,  # rows of 40 do not fill blocks of 32
    "max_sequence_length": 64,
    "layer_norm_epsilon": 1e-5,
    "rope_max_wavelength": 20000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "sliding_window": None,
    "layer_types": None,
    "activation": "silu",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def config(**values):
    return {**CONFIG, **values}


def random_weights(config, scale=0.3):
    source = np.random.default_rng(1)
    shapes = {tensor.path: tensor.shape for tensor in expected_tensors(config)}
    return {path: source.normal(0, scale, shape).astype("float32") for path, shape in shapes.items()}


def write(path, config, dtype, weights, **kwargs):
    metadata = {"tokenizer.ggml.tokens": ["a", "ü"], "tokenizer.ggml.scores": [0.5, -1.0], "tokenizer.ggml.on": True}
    write_gguf(path, config, dtype, metadata, weights.items(), kwargs.pop("factors", {}), **kwargs)
    return GgufFile(path)


def step(values, kind):
    """The distance of two neighbours on the scale of each block of 32."""
    blocks = values.reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    return np.abs(largest) / {"Q8_0": 127, "Q4_0": 8}[kind]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", GGUF_DTYPES)
def test_every_tensor_comes_back(dtype, tied, tmp_path):
    settings = config(tie_word_embeddings=tied, attention_bias=True, attention_output_bias=True)
    weights = random_weights(settings)
    file = write(tmp_path / "model.gguf", settings, dtype, weights)
    assert [*file.tensors] == [tensor.name for tensor in expected_tensors(settings, GGUF_LLAMA)]
    head = "token_embd.weight" if tied else "output.weight"
    for tensor in expected_tensors(settings, GGUF_LLAMA):
        stored = tensor.to_stored(weights[tensor.path])
        kind, read = file.tensors[tensor.name].type, file.read(tensor.name)
        wanted = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}[dtype]
        if stored.ndim == 1:
            wanted = "F32"
        elif stored.shape[1] == 40 and dtype.startswith("q"):
            wanted = "F16"
        elif (dtype, tensor.name) == ("q4_0", head):
            wanted = "Q8_0"
        assert kind == wanted, tensor.name
        if kind in ("F32", "F16", "BF16"):
            exact = {"F32": "float32", "F16": "float16", "BF16": ml_dtypes.bfloat16}[kind]
            np.testing.assert_array_equal(read.astype("float32"), stored.astype(exact).astype("float32"))
        else:
            # Half a step, and what the largest code loses as the scale is rounded to float16. A code for +8 is missing.
            steps = np.abs(read - stored).reshape(-1, 32) / step(stored, kind)
            half = 0.5 + {"Q8_0": 127, "Q4_0": 8}[kind] / 2**11
            assert steps.max() <= (half if kind == "Q8_0" else 1 + half)
            assert np.mean(steps <= half) > 0.97


def test_the_other_reader_agrees(tmp_path):
    weights = random_weights(CONFIG)
    write(tmp_path / "model.gguf", CONFIG, "q8_0", weights, factors={"rope_freqs.weight": np.array([1, 2, 4, 8.0])})
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    ours = GgufFile(tmp_path / "model.gguf")
    assert {tensor.name for tensor in reader.tensors} == {*ours.tensors}
    for tensor in reader.tensors:
        assert tensor.data_offset % 32 == 0
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values, ours.read(tensor.name).astype("float32"))
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "ü"]
    assert reader.fields["tokenizer.ggml.scores"].contents() == [0.5, -1.0]
    assert reader.fields["tokenizer.ggml.on"].contents() is True


def test_metadata():
    settings = config(rope_scaling={**YARN, "attention_factor": 0.8}, sliding_window=64)
    keys = gguf_metadata(settings, "q4_0", "tiny", 64, attention_factor=0.8)
    assert keys == {
        "general.type": "model",
        "general.name": "tiny",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.vocab_size": 50,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 40,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.attention.sliding_window": 64,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 20000.0,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
        "llama.rope.scaling.attn_factor": pytest.approx(0.8 / (1 + 0.1 * np.log(4))),
    }


@pytest.mark.parametrize(
    ("scaling", "attention_factor", "expected"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 1.0, {"type": "linear", "factor": 2.0}),
        ({"rope_type": "yarn"}, 1.0, {"type": "yarn", "factor": 1.0, "original_context_length": 64}),
        # A factor would have llama.cpp divide the positions by it.
        (LLAMA3, 1.0, {"original_context_length": 16}),
        (
            {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16},
            1.2,
            {"type": "longrope", "original_context_length": 16, "attn_factor": 1.2},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:rope_scaling. llama.cpp takes the long factors")
def test_position_scaling(scaling, attention_factor, expected):
    keys = gguf_metadata(config(rope_scaling=scaling), "float32", "tiny", 64, attention_factor)
    prefix = "llama.rope.scaling."
    assert {key.removeprefix(prefix): value for key, value in keys.items() if key.startswith(prefix)} == expected


@pytest.mark.parametrize(
    ("values", "architecture"),
    [
        ({}, "llama"),
        ({"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}, "llama"),
        ({"attention_bias": True}, "qwen2"),
        ({"attention_bias": True, "rope_scaling": LLAMA3}, "llama"),
        ({"attention_bias": True, "head_dim": 16}, "llama"),
        ({"attention_bias": True, "rope_scaling": YARN}, "qwen2"),
        ({"qk_norm": True, "head_dim": 16}, "qwen3"),
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 5}, "llama"),
    ],
)
def test_architectures(values, architecture):
    assert gguf_architecture(config(**values)) == architecture


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation": "gelu"}, "activation = 'gelu'"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5}, "layer_types = "),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling = "),
        ({"rope_scaling": {**YARN, "truncate": False}}, r"rope_scaling\['truncate'\] = False"),
        ({"qk_norm": True, "attention_bias": True}, "attention_bias = True"),
        ({"qk_norm": True, "mlp_bias": True}, "mlp_bias = True"),
        ({"qk_norm": True, "rope_scaling": LLAMA3}, "rope_scaling = "),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(values, message):
    with pytest.raises(UnsupportedError, match=f"^{message}.*; expected .* llama.cpp cannot run"):
        gguf_architecture(config(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sliding_window": 5}, "sliding_window: .* more than 5 tokens"),
        ({"rope_scaling": {**YARN, "beta_fast": 8.0}}, "--yarn-beta-fast 8.0 --yarn-beta-slow 1"),
        ({"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 16}}, "longer than 16"),
    ],
)
def test_what_llama_cpp_runs_otherwise_is_said(values, message):
    with pytest.warns(UserWarning, match=message):
        gguf_metadata(config(**values), "float32", "tiny", 64, 1.0)


@pytest.mark.parametrize(
    ("dtype", "value", "fails"),
    [
        ("float32", np.nan, True),
        ("float32", np.inf, True),
        ("float32", 3e38, False),
        ("float16", 65504, False),
        ("float16", 65600, True),
        ("bfloat16", 3.4e38, True),
        ("q8_0", 127 * 65000, False),
        ("q8_0", 127 * 65600, True),
        ("q4_0", -8 * 65600, True),
        ("q4_0", np.nan, True),
    ],
)
def test_values_that_a_dtype_cannot_hold_are_refused(dtype, value, fails, tmp_path):
    weights = random_weights(CONFIG)
    path = "transformer_layer_1/self_attention/value/kernel"
    weights[path][3, 1, 2] = value
    if not fails:
        file = write(tmp_path / "model.gguf", CONFIG, dtype, weights)
        assert np.abs(file.read("blk.1.attn_v.weight").astype("float32")).max() == pytest.approx(value, rel=1e-2)
        return
    with pytest.raises(NonFiniteError, match=f"^{path}: largest absolute value = "):
        write(tmp_path / "model.gguf", CONFIG, dtype, weights)
    assert not [*tmp_path.iterdir()]


def test_a_file_that_is_there_stays_unless_it_may_be_replaced(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"precious")
    weights = random_weights(CONFIG)
    with pytest.raises(ValueError, match="overwrite=True"):
        write(path, CONFIG, "float32", weights)
    assert path.read_bytes() == b"precious"
    file = write(path, CONFIG, "float32", weights, overwrite=True)
    assert file.metadata["general.architecture"] == "llama"
