import json
import random
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from kllama.checkpoints.checkpoint import Strictness
from kllama.checkpoints.huggingface.reading import HuggingFaceCheckpoint
from kllama.checkpoints.meta.params import read_params
from kllama.checkpoints.meta.reading import MetaCheckpoint, is_meta
from kllama.errors import CheckpointError, KllamaError, MissingFileError, UnsupportedError
from tests.checkpoints.damage import JSON_FAULTS, change_json, refuses
from tests.checkpoints.mutation import mutate

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.backend_independent

PARAMS = {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 24,
    "multiple_of": 4,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 2e-5,
    "rope_theta": 5000.0,
}
FEED_FORWARD_DIM = 56  # int(1.3 * 42) = 54, up to a multiple of 4
AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


# === Writing ===


def random_tensors(params: dict = PARAMS, feed_forward_dim: int = FEED_FORWARD_DIM, vocabulary_size: int = 24) -> dict:
    """Give the tensors of a whole model under Meta's names."""
    dim, key_dim = params["dim"], params["dim"] // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    numbers = np.random.default_rng(0)
    shapes = {"tok_embeddings": (vocabulary_size, dim), "norm": (dim,), "output": (vocabulary_size, dim)}
    for i in range(params["n_layers"]):
        shapes |= {f"layers.{i}.attention.{name}": (dim, dim) for name in ("wq", "wo")}
        shapes |= {f"layers.{i}.attention.{name}": (key_dim, dim) for name in ("wk", "wv")}
        shapes |= {f"layers.{i}.feed_forward.{name}": (feed_forward_dim, dim) for name in ("w1", "w3")}
        shapes |= {f"layers.{i}.feed_forward.w2": (dim, feed_forward_dim)}
        shapes |= {f"layers.{i}.{name}": (dim,) for name in ("attention_norm", "ffn_norm")}
    return {f"{name}.weight": numbers.normal(size=shape).astype("float32") for name, shape in shapes.items()}


def split(tensors: dict, num_shards: int, embedding_axis: int = 0, num_kv_heads: int | None = None) -> list[dict]:
    """Cut a model as Meta does; with fewer key/value heads than shards, neighbours get the same head."""
    shards = [{"rope.freqs": np.ones(2, "float32")} for _ in range(num_shards)]
    for name, array in tensors.items():
        module = name.removesuffix(".weight").rsplit(".", 1)[-1]
        axis = embedding_axis if module == "tok_embeddings" else AXES.get(module)
        copies = num_shards // num_kv_heads if num_kv_heads and module in ("wk", "wv") else 1
        parts = [array] * num_shards if axis is None else np.split(array, num_shards // copies, axis)
        for rank, shard in enumerate(shards):
            shard[name] = parts[rank // copies]
    return shards


def write(directory: Path, shards: list[dict], params: dict = PARAMS, dtype=torch.float32) -> Path:
    directory.mkdir(exist_ok=True)
    for rank, shard in enumerate(shards):
        state = {name: torch.tensor(np.ascontiguousarray(array)).to(dtype) for name, array in shard.items()}
        torch.save(state, directory / f"consolidated.{rank:02d}.pth")
    (directory / "params.json").write_text(json.dumps(params))
    return directory


def change_shard(directory: Path, rank: int, change) -> None:
    file = directory / f"consolidated.{rank:02d}.pth"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


@pytest.fixture
def directory(tmp_path) -> Path:
    """A model in two shards."""
    return write(tmp_path / "model", split(random_tensors(), 2))


# === What is read ===


def turned(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Put the rows of q or k into the order of Hugging Face, number by number."""
    head_dim = len(array) // num_heads
    order = [n * head_dim + 2 * i + j for n in range(num_heads) for j in range(2) for i in range(head_dim // 2)]
    return array[order]


def in_kllama(tensors: dict, params: dict = PARAMS) -> dict:
    """Say what Meta's tensors are in kllama, one by one."""
    dim, heads = params["dim"], params["n_heads"]
    key_heads = params.get("n_kv_heads", heads)
    size = dim // heads
    tensors = {name.removesuffix(".weight"): array for name, array in tensors.items()}
    expected = {
        "token_embedding/embeddings": tensors["tok_embeddings"],
        "token_embedding/reverse_embeddings": tensors["output"].T,
        "sequence_output_layernorm/scale": tensors["norm"],
    }
    for i in range(params["n_layers"]):
        layer, attention = f"transformer_layer_{i}", f"transformer_layer_{i}/self_attention"
        wq, wk, wv, wo = (tensors[f"layers.{i}.attention.{name}"] for name in ("wq", "wk", "wv", "wo"))
        w1, w2, w3 = (tensors[f"layers.{i}.feed_forward.{name}"] for name in ("w1", "w2", "w3"))
        expected |= {
            f"{attention}_layernorm/scale": tensors[f"layers.{i}.attention_norm"],
            f"{attention}/query/kernel": turned(wq, heads).T.reshape(dim, heads, size),
            f"{attention}/key/kernel": turned(wk, key_heads).T.reshape(dim, key_heads, size),
            f"{attention}/value/kernel": wv.T.reshape(dim, key_heads, size),
            f"{attention}/attention_output/kernel": wo.T.reshape(heads, size, dim),
            f"{layer}/feedforward_layernorm/scale": tensors[f"layers.{i}.ffn_norm"],
            f"{layer}/feedforward_gate_dense/kernel": w1.T,
            f"{layer}/feedforward_intermediate_dense/kernel": w3.T,
            f"{layer}/feedforward_output_dense/kernel": w2.T,
        }
    return expected


def assert_holds(checkpoint: MetaCheckpoint, expected: dict) -> None:
    tensors = dict(checkpoint.tensors())
    assert tensors.keys() == expected.keys()
    for path, array in tensors.items():
        np.testing.assert_array_equal(array, expected[path], strict=True)


@pytest.mark.parametrize("name", ["stories260K", "stories260K-mp2"])
def test_real_model_equals_that_of_hugging_face(assets, name):
    assert is_meta(assets / "meta" / name) and not is_meta(assets / "models/stories260K")
    checkpoint = MetaCheckpoint(assets / "meta" / name)
    reference = HuggingFaceCheckpoint(assets / "models/stories260K")
    assert_holds(checkpoint, dict(reference.tensors()))
    # No file of Meta's says how long a text may be.
    expected = {**reference.backbone_config, "max_sequence_length": None}
    assert checkpoint.backbone_config.items() <= expected.items()
    assert checkpoint.dtype == "float32" and checkpoint.has_head and checkpoint.open_questions == {}
    assert checkpoint.tokenizer_config == {"tokenizer": str(assets / "meta" / name / "tokenizer.model")}


@pytest.mark.parametrize("embedding_axis", [0, 1], ids=["Llama 3", "Llama 2"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_shards_are_joined(tmp_path, num_shards, embedding_axis):
    tensors = random_tensors()
    checkpoint = MetaCheckpoint(write(tmp_path / "model", split(tensors, num_shards, embedding_axis)))
    assert_holds(checkpoint, in_kllama(tensors))
    assert checkpoint.backbone_config == {
        "vocabulary_size": 24,
        "num_layers": 2,
        "num_query_heads": 4,
        "hidden_dim": 16,
        "intermediate_dim": FEED_FORWARD_DIM,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "layer_norm_epsilon": 2e-5,
        "rope_max_wavelength": 5000.0,
        "rope_scaling": None,
        "max_sequence_length": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_output_bias": False,
        "qk_norm": False,
        "mlp_bias": False,
    }
    num_norms = 5 * 16 * 4
    size = sum(array.nbytes for array in tensors.values()) + (num_shards - 1) * num_norms
    assert checkpoint.stored_bytes == {"float32": size}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtype_stays(tmp_path, dtype):
    checkpoint = MetaCheckpoint(write(tmp_path / "model", split(random_tensors(), 2), dtype=dtype))
    expected = random_tensors()["norm.weight"].astype(ml_dtypes.bfloat16 if dtype == torch.bfloat16 else "float16")
    assert checkpoint.dtype == expected.dtype.name and checkpoint.stored_bytes.keys() == {expected.dtype.name}
    np.testing.assert_array_equal(dict(checkpoint.tensors())["sequence_output_layernorm/scale"], expected, strict=True)


@pytest.mark.parametrize("name", ["rope.freqs", "layers.1.attention.inner_attention.rope.freqs"])
def test_frequencies_are_ignored(tmp_path, name):
    """Those of Llama 1 are in each layer."""
    tensors = random_tensors()
    shards = [{**shard, name: np.ones(2, "float32")} for shard in split(tensors, 2)]
    assert_holds(MetaCheckpoint(write(tmp_path / "model", shards)), in_kllama(tensors))


def test_heads_that_shards_share(tmp_path):
    """Sixteen shards of the model of 405B have eight heads between them; here four have two."""
    tensors = random_tensors()
    directory = write(tmp_path / "model", split(tensors, 4, num_kv_heads=2))
    assert_holds(MetaCheckpoint(directory), in_kllama(tensors))
    change_shard(directory, 3, lambda state: state["layers.1.attention.wv.weight"][0].neg_())
    with refuses(
        CheckpointError, "consolidated.03.pth", "layers.1.attention.wv.weight differs from", "expected the same"
    ):
        dict(MetaCheckpoint(directory).tensors())


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("place", [None, 0, -1])
def test_a_head_that_is_a_copy_is_tied(tmp_path, num_shards, embedding_axis, place):
    tensors = random_tensors()
    tensors["output.weight"] = tensors["tok_embeddings.weight"].copy()
    if place is not None:
        tensors["output.weight"][place, place] += 1
    checkpoint = MetaCheckpoint(write(tmp_path / "model", split(tensors, num_shards, embedding_axis)))
    assert checkpoint.backbone_config["tie_word_embeddings"] == (place is None)
    expected = in_kllama(tensors)
    if place is None:
        del expected["token_embedding/reverse_embeddings"]
    assert_holds(checkpoint, expected)


def test_defaults_are_those_of_the_code(tmp_path):
    params = {"dim": 16, "n_layers": 1, "n_heads": 2}
    tensors = random_tensors(params, feed_forward_dim=256)  # int(8 * 16 / 3) = 42, up to a multiple of 256
    checkpoint = MetaCheckpoint(write(tmp_path / "model", split(tensors, 2, embedding_axis=1), params))
    assert_holds(checkpoint, in_kllama(tensors, params))
    config = checkpoint.backbone_config
    assert (config["vocabulary_size"], config["num_key_value_heads"]) == (24, 2)
    assert (config["layer_norm_epsilon"], config["rope_max_wavelength"]) == (1e-5, 10000.0)
    assert checkpoint.generation_config == {}


@pytest.mark.parametrize("vocabulary_size", [-1, 128256])
def test_vocabulary_of_llama_3(tmp_path, vocabulary_size):
    params = {"dim": 4, "n_layers": 1, "n_heads": 2, "multiple_of": 4, "vocab_size": vocabulary_size}
    tensors = random_tensors(params, feed_forward_dim=12, vocabulary_size=128256)
    checkpoint = MetaCheckpoint(write(tmp_path / "model", split(tensors, 2), params))
    assert checkpoint.backbone_config["vocabulary_size"] == 128256
    assert checkpoint.backbone_config["rope_max_wavelength"] == 500000.0
    assert checkpoint.generation_config == {"stop_token_ids": [128001, 128008, 128009]}


# dim, multiple_of and ffn_dim_multiplier of released models, and the size in Meta's model cards.
SIZES = {
    "rounded down": (64, 1, None, 170),
    "rounded down twice": (64, 1, 1.5, 255),
    "7B": (4096, 256, None, 11008),
    "13B": (5120, 256, None, 13824),
    "33B": (6656, 256, None, 17920),
    "65B": (8192, 256, None, 22016),
    "2-70B": (8192, 4096, 1.3, 28672),
    "3-8B": (4096, 1024, 1.3, 14336),
    "3.2-1B": (2048, 256, 1.5, 8192),
    "3.2-3B": (3072, 256, 1.0, 8192),
    "405B": (16384, 4096, 1.2, 53248),
}


@pytest.mark.parametrize("dim, multiple_of, multiplier, expected", SIZES.values(), ids=SIZES)
def test_size_of_the_feed_forward(directory, dim, multiple_of, multiplier, expected):
    """The message about the first tensor that is too small says which size was computed."""
    heads = {"dim": dim, "n_heads": dim // 64, "n_kv_heads": dim // 64}
    size = {"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
    change_json(directory / "params.json", lambda params: params.update(heads | size))
    assert read_params(directory / "params.json")[0]["intermediate_dim"] == expected


FACTORS = {
    "3.2-1B": (2048, 16, {}, 32.0, 4.0),
    "3.2-3B": (3072, 28, {}, 32.0, 4.0),
    "3.1-8B": (4096, 32, {}, 8.0, 4.0),
    "3.1-70B": (8192, 80, {}, 8.0, 4.0),
    "3.1-405B": (16384, 126, {}, 8.0, 4.0),
    "given": (2048, 16, {"rope_scaling_factor": 16, "rope_high_freq_factor": 2}, 16, 2),
    "unknown": (2048, 17, {}, None, None),
}


@pytest.mark.parametrize("dim, num_layers, more, factor, high", FACTORS.values(), ids=FACTORS)
def test_scaled_rope(directory, dim, num_layers, more, factor, high):
    change = {"dim": dim, "n_layers": num_layers, "use_scaled_rope": True, **more}
    change_json(directory / "params.json", lambda params: params.update(change))
    config, questions = read_params(directory / "params.json")
    if factor is None:
        assert config["rope_scaling"] is None
        assert "dim 2048 with 17 layers" in questions["rope_scaling"]
    else:
        assert questions == {}
        assert config["rope_scaling"] == {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": 8192,
        }


def test_an_open_question_is_the_checkpoints(directory):
    change_json(directory / "params.json", lambda params: params.update(use_scaled_rope=True))
    questions = MetaCheckpoint(directory).open_questions
    assert list(questions) == ["rope_scaling"] and "Pass rope_scaling=" in questions["rope_scaling"]


@pytest.mark.parametrize("place", ["inside", "above", "both", "nowhere"])
def test_tokenizer(directory, monkeypatch, place):
    if place in ("inside", "both"):
        (directory / "tokenizer.model").write_bytes(b"inside")
    if place in ("above", "both"):
        (directory.parent / "tokenizer.model").write_bytes(b"above")
    monkeypatch.chdir(directory)
    expected = {"inside": directory, "both": directory, "above": directory.parent}.get(place)
    for path in (directory, "."):
        found = MetaCheckpoint(path).tokenizer_config
        assert (found and Path(found["tokenizer"]).resolve().parent) == (expected and expected.resolve())


# === Faults ===

PARAMS_FAULTS = {
    "no dim": ({"dim": None}, CheckpointError, "dim = null; expected an integer from 1"),
    "a flag": ({"n_layers": True}, CheckpointError, "n_layers = true"),
    "no layers": ({"n_layers": 0}, CheckpointError, "n_layers = 0"),
    "a billion layers": ({"n_layers": 10**9}, CheckpointError, "n_layers = 1000000000"),
    "more layers": ({"n_layers": 60000}, CheckpointError, "missing tensors: layers.2.attention_norm.weight"),
    "fewer layers": ({"n_layers": 1}, CheckpointError, 'does not use: "layers.1.attention.wk.weight"'),
    "no heads": ({"n_heads": 0}, CheckpointError, "n_heads = 0"),
    "heads that do not divide dim": ({"n_heads": 3}, CheckpointError, "dim = 16; expected a multiple of 2 * n_heads"),
    "an odd head": ({"n_heads": 16}, CheckpointError, "dim = 16; expected a multiple of 2 * n_heads (32)"),
    "other heads": ({"n_kv_heads": 3}, CheckpointError, "n_heads = 4; expected a multiple of n_kv_heads (3)"),
    "fewer key heads": (
        {"n_kv_heads": 1},
        CheckpointError,
        "consolidated.01.pth: layers.0.attention.wk.weight differs",
    ),
    "another vocabulary": ({"vocab_size": 23}, CheckpointError, "[24, 16] when joined; expected [23, 16]"),
    "a vocabulary of -2": ({"vocab_size": -2}, CheckpointError, "vocab_size = -2; expected -1 or an integer"),
    "another multiple": ({"multiple_of": 64}, CheckpointError, "computes that size from dim, multiple_of"),
    "another multiplier": ({"ffn_dim_multiplier": 1}, CheckpointError, "w1.weight = [28, 16] in each of 2 shards"),
    "a negative multiplier": ({"ffn_dim_multiplier": -1}, CheckpointError, "ffn_dim_multiplier = -1"),
    "a multiplier that is text": ({"ffn_dim_multiplier": "1"}, CheckpointError, 'ffn_dim_multiplier = "1"'),
    "a larger multiplier than any": ({"ffn_dim_multiplier": 1e30}, CheckpointError, "ffn_dim_multiplier = 1e+30"),
    "multiples of nothing": ({"multiple_of": 0}, CheckpointError, "multiple_of = 0"),
    "no epsilon": ({"norm_eps": 0}, CheckpointError, "norm_eps = 0"),
    "a negative theta": ({"rope_theta": -1.0}, CheckpointError, "rope_theta = -1.0"),
    "a factor that is not used": ({"rope_scaling_factor": 8}, CheckpointError, "use_scaled_rope = false"),
    "an unknown key": ({"n_experts": 8}, CheckpointError, 'unknown keys: "n_experts"'),
    "quantised": ({"quantization_args": {"scheme": "int8"}}, UnsupportedError, "not quantised"),
    "adapters": ({"lora_args": {"rank": 16}}, UnsupportedError, "weights without adapters"),
    "images": ({"vision_chunk_size": 448}, UnsupportedError, "a model of text alone"),
    "experts": ({"moe_args": {}}, UnsupportedError, "a Llama without experts"),
    "Mistral's": ({"sliding_window": 4096}, UnsupportedError, "look like Mistral's"),
}


@pytest.mark.parametrize("changes, error, message", PARAMS_FAULTS.values(), ids=PARAMS_FAULTS)
def test_params_that_are_refused(directory, changes, error, message):
    change_json(directory / "params.json", lambda params: params.update(changes))
    with refuses(error, directory, message):
        dict(MetaCheckpoint(directory).tensors())


def test_keys_that_change_nothing(directory):
    more = {"max_seq_len": 2048, "max_batch_size": 32, "vision_chunk_size": -1, "lora_args": None}
    change_json(directory / "params.json", lambda params: params.update(more))
    assert MetaCheckpoint(directory).backbone_config["hidden_dim"] == 16


@pytest.mark.parametrize("content, message", JSON_FAULTS.values(), ids=JSON_FAULTS)
def test_params_that_are_damaged(directory, content, message):
    (directory / "params.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        MetaCheckpoint(directory)


def copy_shard(source: int, target: str):
    return lambda path: shutil.copy(path / f"consolidated.{source:02d}.pth", path / target)


def rename_shard(source: int, target: str):
    return lambda path: (path / f"consolidated.{source:02d}.pth").rename(path / target)


FILES_FAULTS = {
    "no directory": (shutil.rmtree, MissingFileError, "not a directory"),
    "no params": (lambda path: (path / "params.json").unlink(), MissingFileError, "params.json"),
    "no shards": (lambda path: [file.unlink() for file in path.glob("*.pth")], MissingFileError, "consolidated.00.pth"),
    "the first shard only": (
        lambda path: (path / "consolidated.01.pth").unlink(),
        CheckpointError,
        "1 files consolidated.*.pth; expected 2",
    ),
    "the second shard only": (
        lambda path: (path / "consolidated.00.pth").unlink(),
        MissingFileError,
        "1 shards without consolidated.00.pth",
    ),
    "a gap": (rename_shard(1, "consolidated.02.pth"), MissingFileError, "2 shards without consolidated.01.pth"),
    "a shard too many": (
        copy_shard(0, "consolidated.02.pth"),
        CheckpointError,
        "3 files consolidated.*.pth; expected 2",
    ),
    "a shard of another number": (copy_shard(0, "consolidated.1.pth"), MissingFileError, "consolidated.02.pth"),
    "two kinds of files": (
        copy_shard(0, "consolidated.safetensors"),
        CheckpointError,
        '"consolidated.safetensors" beside consolidated.00.pth',
    ),
    "an empty shard": (lambda path: (path / "consolidated.01.pth").write_bytes(b""), CheckpointError, "is empty"),
}


@pytest.mark.parametrize("change, error, message", FILES_FAULTS.values(), ids=FILES_FAULTS)
def test_files_that_are_missing_or_too_many(directory, change, error, message):
    change(directory)
    with refuses(error, directory, message):
        MetaCheckpoint(directory)


def test_files_of_mistral(directory):
    for file in directory.glob("*.pth"):
        file.unlink()
    (directory / "consolidated.safetensors").write_bytes(b"")
    assert is_meta(directory)
    with refuses(UnsupportedError, "consolidated.safetensors", "Mistral's"):
        MetaCheckpoint(directory)


def put(name: str, value):
    return lambda state: state.__setitem__(name, value)


SHARD_FAULTS = {
    "a tensor too few": (lambda state: state.pop("norm.weight"), "not the same tensors as in consolidated.00.pth"),
    "a tensor too many": (put("a", torch.ones(1)), 'not the same tensors as in consolidated.00.pth: "a"'),
    "another shape": (put("norm.weight", torch.ones(8)), '"norm.weight" = F32 [8]; expected F32 [16]'),
    "another type": (put("norm.weight", torch.ones(16).half()), '"norm.weight" = F16 [16]; expected F32 [16]'),
}


@pytest.mark.parametrize("change, message", SHARD_FAULTS.values(), ids=SHARD_FAULTS)
def test_shards_that_differ(directory, change, message):
    change_shard(directory, 1, change)
    with refuses(CheckpointError, "consolidated.01.pth", message):
        MetaCheckpoint(directory)


TENSOR_FAULTS = {
    "no head": (lambda state: state.pop("output.weight"), CheckpointError, "missing tensors: output.weight"),
    "no norm": (lambda state: state.pop("norm.weight"), CheckpointError, "missing tensors: norm.weight"),
    "a number for a head": (put("output.weight", torch.ones(())), CheckpointError, "output.weight = []"),
    "a number for queries": (
        put("layers.0.attention.wq.weight", torch.ones(())),
        CheckpointError,
        "layers.0.attention.wq.weight = []",
    ),
    "int8": (put("norm.weight", torch.ones(16).to(torch.int8)), UnsupportedError, "norm.weight = I8: looks quantised"),
    "float64": (
        put("norm.weight", torch.ones(16).double()),
        UnsupportedError,
        "norm.weight = F64: float64 is not read",
    ),
    "transposed": (
        put("layers.1.feed_forward.w2.weight", torch.ones(28, 16)),
        CheckpointError,
        "layers.1.feed_forward.w2.weight = [28, 16] in each of 2 shards",
    ),
}


@pytest.mark.parametrize("change, error, message", TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_tensors_that_are_refused(directory, change, error, message):
    for rank in range(2):
        change_shard(directory, rank, change)
    with refuses(error, directory, message):
        MetaCheckpoint(directory)


def test_norms_are_the_same_in_all_shards(directory):
    change_shard(directory, 1, lambda state: state["layers.0.ffn_norm.weight"][3].mul_(2))
    checkpoint = MetaCheckpoint(directory)
    with refuses(
        CheckpointError, "consolidated.01.pth: layers.0.ffn_norm.weight differs from that of consolidated.00.pth"
    ):
        dict(checkpoint.tensors())


def test_what_strictness_lets_pass(directory, caplog):
    for rank in range(2):
        change_shard(directory, rank, put("extra", torch.ones(1)))
    change_shard(directory, 1, lambda state: state["layers.1.attention.wo.weight"][3].fill_(torch.nan))
    with refuses(CheckpointError, 'does not use: "extra"'):
        MetaCheckpoint(directory)
    checkpoint = MetaCheckpoint(directory, Strictness(unused=False))
    assert '"extra"' in caplog.text
    with refuses(CheckpointError, "consolidated.01.pth: layers.1.attention.wo.weight = NaN or infinity in 8 of 128"):
        dict(checkpoint.tensors())
    tensors = dict(MetaCheckpoint(directory, Strictness(unused=False, check_finite=False)).tensors())
    assert np.isnan(tensors["transformer_layer_1/self_attention/attention_output/kernel"]).sum() == 8


def test_no_more_than_one_tensor_is_held(tmp_path):
    """Shards are joined one tensor at a time: at most the tensor, and a part of it."""
    params = {"dim": 256, "n_layers": 2, "n_heads": 2, "multiple_of": 1024}
    tensors = random_tensors(params, feed_forward_dim=1024)
    checkpoint = MetaCheckpoint(write(tmp_path / "model", split(tensors, 2), params))
    largest = 1024 * 256 * 4
    tracemalloc.start()
    for path, array in checkpoint.tensors():
        del path, array
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * largest


# === Mutants ===

UNCONFIRMED = ("layer_norm_epsilon", "rope_max_wavelength")  # no tensor says them again


def change_digit(text: bytes, seed: int) -> bytes:
    """Put another digit for one of those in a JSON file."""
    numbers = random.Random(seed)
    at = numbers.choice([i for i, character in enumerate(text) if chr(character).isdigit()])
    return text[:at] + str(numbers.randrange(10)).encode() + text[at + 1 :]


def check_mutants(directory: Path, count: int) -> dict[str, int]:
    """Read models of which the second shard or the parameters are a mutant: each is refused, or as it should be."""
    expected = {path: array.tobytes() for path, array in MetaCheckpoint(directory).tensors()}
    config = MetaCheckpoint(directory).backbone_config
    shard, params = directory / "consolidated.01.pth", directory / "params.json"
    sound = {file: file.read_bytes() for file in (shard, params)}
    places = [range(sound[shard].rindex(b"PK\x03\x04"), len(sound[shard]))]
    outcomes = {"refused": 0, "read": 0}
    for seed in range(count):
        shard.write_bytes(mutate(sound[shard], seed, places) if seed % 2 else sound[shard])
        changed = sound[params] if seed % 2 else (change_digit if seed % 4 else mutate)(sound[params], seed)
        params.write_bytes(changed)
        try:
            checkpoint = MetaCheckpoint(directory)
            found = {path: array.tobytes() for path, array in checkpoint.tensors()}
            meant = {**config, **{key: checkpoint.backbone_config[key] for key in UNCONFIRMED}}
            assert (checkpoint.backbone_config, found) == (meant, expected), seed
            outcomes["read"] += 1
        except KllamaError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    return outcomes


def test_mutants(directory):
    outcomes = check_mutants(directory, 100)
    assert outcomes["refused"] > 50 and outcomes["read"] > 5


@pytest.mark.slow
def test_many_mutants(directory):
    print(check_mutants(directory, 2000))
