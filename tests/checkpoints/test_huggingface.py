"""A Hugging Face directory: a sound one gives exactly its tensors, and each kind of fault is refused by name."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kllama.checkpoints.checkpoint import Strictness
from kllama.checkpoints.huggingface.reading import HuggingFaceCheckpoint, is_huggingface
from kllama.checkpoints.name_map import expected_tensors
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError
from kllama.models.llama_causal_lm import LlamaCausalLM

pytestmark = pytest.mark.backend_independent

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "head_dim": 6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"<unk>": 0, "a": 3, "b": 15}, "merges": []},
    "added_tokens": [{"id": 1, "content": "<s>"}, {"id": 2, "content": "</s>"}],
}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shapes(**changes) -> dict[str, tuple[int, ...]]:
    """Write out by hand what a Llama of this configuration stores."""
    c = CONFIG | changes
    width, inner = c["hidden_size"], c["intermediate_size"]
    queries, keys = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    layers = range(c["num_hidden_layers"])
    return {
        EMBEDDINGS: (c["vocab_size"], width),
        **{f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in layer.items()},
        "model.norm.weight": (width,),
        HEAD: (c["vocab_size"], width),
    }


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def change_config(folder: Path, **changes) -> None:
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)


def change_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def shard(folder: Path, num_shards: int = 3) -> None:
    """Turn the single file into shards and an index."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    weight_map = {name: names[i % num_shards] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    write_json(folder / INDEX, {"metadata": {"total_size": 0}, "weight_map": weight_map})


def change_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    write_json(folder / INDEX, index)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound directory of one float32 file and a tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    rng = np.random.default_rng(0)
    save_file({name: rng.normal(size=shape).astype("float32") for name, shape in shapes().items()}, folder / SINGLE)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "tokenizer.json", TOKENIZER)
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    return folder


def refuses(error: type, *parts: str):
    """Expect an error of exactly this class whose message says every part."""
    return pytest.raises(
        error, match="".join(f"(?=.*{re.escape(part)})" for part in parts), check=lambda e: type(e) is error
    )


# What a sound directory gives


def test_gives_every_tensor_in_kllamas_shape(folder):
    stored = load_file(folder / SINGLE)
    checkpoint = HuggingFaceCheckpoint(folder)
    assert checkpoint.path == folder
    assert checkpoint.dtype == "float32"
    tensors = dict(checkpoint.tensors())
    expected = list(expected_tensors(checkpoint.backbone_config))
    assert list(tensors) == [tensor.path for tensor in expected]
    assert {tensor.name for tensor in expected} == set(stored)
    for tensor in expected:
        np.testing.assert_array_equal(tensor.to_stored(tensors[tensor.path]), stored[tensor.name])
    kernel = tensors["transformer_layer_1/self_attention/query/kernel"]
    assert kernel[3, 2, 1] == stored[Q_PROJ][2 * 6 + 1, 3]


def test_tensors_are_read_one_at_a_time(folder):
    tensors = HuggingFaceCheckpoint(folder).tensors()
    next(tensors)
    os.truncate(folder / SINGLE, 100)
    with refuses(CheckpointError, SINGLE, "input_layernorm", "expected 32"):
        next(tensors)


def test_shards_give_what_the_single_file_gives(folder):
    expected = dict(HuggingFaceCheckpoint(folder).tensors())
    shard(folder)
    tensors = dict(HuggingFaceCheckpoint(folder).tensors())
    assert list(tensors) == list(expected)
    for path, array in tensors.items():
        np.testing.assert_array_equal(array, expected[path])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_dtypes_are_kept(folder, dtype):
    change_tensors(folder, lambda t: t.update({name: array.astype(dtype) for name, array in t.items()}))
    config = {"float32": {}, "float16": {"torch_dtype": None}, "bfloat16": {"torch_dtype": "float64"}}[dtype]
    change_config(folder, **config)
    checkpoint = HuggingFaceCheckpoint(folder)
    assert checkpoint.dtype == dtype
    assert {array.dtype for _, array in checkpoint.tensors()} == {np.dtype(dtype)}


def test_the_configurations_dtype_counts(folder):
    change_config(folder, dtype="bfloat16", torch_dtype="float16")
    assert HuggingFaceCheckpoint(folder).dtype == "bfloat16"


def test_old_rotary_frequencies_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda t: t.update({name: np.ones(3, "int8")}))
    assert len(list(HuggingFaceCheckpoint(folder).tensors())) == len(shapes())


def test_other_files_beside_safetensors_are_ignored(folder):
    for name in ("consolidated.00.pth", "pytorch_model.bin", "consolidated.safetensors"):
        (folder / name).write_bytes(b"pickle")
    (folder / "original").mkdir()
    assert HuggingFaceCheckpoint(folder).dtype == "float32"


def test_a_hub_cache_snapshot_opens(folder, tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    folder.rename(repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert len(list(HuggingFaceCheckpoint(snapshot).tensors())) == len(shapes())


# The head


def test_tied_without_a_head(folder):
    change_config(folder, tie_word_embeddings=True)
    change_tensors(folder, lambda t: t.pop(HEAD))
    paths = [path for path, _ in HuggingFaceCheckpoint(folder).tensors()]
    assert paths[-1] == "sequence_output_layernorm/scale"


def test_tied_with_an_equal_copy(folder):
    change_config(folder, tie_word_embeddings=True)
    change_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDINGS].copy()}))
    paths = [path for path, _ in HuggingFaceCheckpoint(folder).tensors()]
    assert len(paths) == len(shapes()) - 1


def test_tied_with_another_head(folder):
    change_config(folder, tie_word_embeddings=True)
    change_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDINGS] + np.float32(0.25)}))
    checkpoint = HuggingFaceCheckpoint(folder)
    with refuses(CheckpointError, SINGLE, "tie_word_embeddings", HEAD, "0.25"):
        next(checkpoint.tensors())


def test_untied_without_a_head(folder):
    change_tensors(folder, lambda t: t.pop(HEAD))
    assert not HuggingFaceCheckpoint(folder).has_head
    with refuses(CheckpointError, HEAD, "missing", "tie_word_embeddings is false", "LlamaBackbone"):
        LlamaCausalLM.from_preset(folder)


@pytest.mark.parametrize("head", [True, False])
def test_base_models_leave_out_the_prefix(folder, head):
    expected = dict(HuggingFaceCheckpoint(folder).tensors())
    change_config(folder, architectures=["LlamaModel"])
    tensors = {name.removeprefix("model."): array for name, array in load_file(folder / SINGLE).items()}
    if not head:
        del tensors[HEAD], expected["token_embedding/reverse_embeddings"]
    save_file(tensors, folder / SINGLE)
    checkpoint = HuggingFaceCheckpoint(folder)
    assert checkpoint.has_head is head
    assert checkpoint.sampler == "auto"
    assert checkpoint.backbone_config["tie_word_embeddings"] is not head
    actual = dict(checkpoint.tensors())
    assert list(actual) == list(expected)
    for path, array in actual.items():
        np.testing.assert_array_equal(array, expected[path])


# Faults of the directory and the weight files


def _only(*names: str):
    def change(folder: Path):
        (folder / SINGLE).unlink()
        for name in names:
            (folder / name).write_bytes(b"x")

    return change


def _two_shards(folder: Path):
    shard(folder, 2)
    second = folder / "model-00002-of-00002.safetensors"
    first = load_file(folder / "model-00001-of-00002.safetensors")
    save_file(load_file(second) | {HEAD: first[HEAD]}, second)


def _sharded(change: Callable[[Path], object]):
    def apply(folder: Path):
        shard(folder)
        change(folder)

    return apply


def _index(change: Callable[[dict], object]):
    return _sharded(lambda folder: change_index(folder, change))


def _replace_with_link(path: Path, target: str):
    path.unlink()
    path.symlink_to(target)


def _name_shard(name: object):
    return _index(lambda index: index["weight_map"].update({HEAD: name}))


FOLDER_FAULTS = {
    "missing": (lambda f: shutil.rmtree(f), MissingFileError, ["does not exist"]),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), CheckpointError, ["errno", "expected a directory"]),
    "no config": (lambda f: (f / "config.json").unlink(), MissingFileError, ["config.json", "does not exist"]),
    "no weights": (_only(), MissingFileError, ["no weights", SINGLE, INDEX]),
    "a damaged archive": (_only("pytorch_model.bin"), CheckpointError, ["pytorch_model.bin"]),
    "archives without an index": (_only("pytorch_model-00001-of-00002.bin"), MissingFileError, ["no weights"]),
    "only Meta's file": (_only("consolidated.00.pth"), UnsupportedError, ["consolidated", SINGLE]),
    "interrupted": (lambda f: (f / "x.incomplete").write_text(""), CheckpointError, ['"x.incomplete"', "interrupted"]),
    "pointer": (
        lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12ab\n"),
        CheckpointError,
        [SINGLE, "Git LFS pointer", "sha256:12ab"],
    ),
    "empty": (lambda f: (f / SINGLE).write_bytes(b""), CheckpointError, [SINGLE, "empty"]),
    "truncated": (
        lambda f: os.truncate(f / SINGLE, 3000),
        CheckpointError,
        [SINGLE, "not a complete safetensors file"],
    ),
    "dangling link": (lambda f: _replace_with_link(f / SINGLE, "gone"), MissingFileError, [SINGLE, "does not exist"]),
    "JSON as weights": (_sharded(lambda f: (f / INDEX).rename(f / SINGLE)), CheckpointError, [SINGLE, "safetensors"]),
    "two weight sets": (
        lambda f: (shutil.copy(f / SINGLE, f / "x"), shard(f), (f / "x").rename(f / SINGLE)),
        CheckpointError,
        ["two weight sets", SINGLE, INDEX],
    ),
    "shard missing": (
        _sharded(lambda f: (f / "model-00002-of-00003.safetensors").unlink()),
        MissingFileError,
        [INDEX, "missing shards", "model-00002-of-00003.safetensors"],
    ),
    "shard outside": (_name_shard("../../x"), CheckpointError, [INDEX, HEAD, '"../../x"', "plain file name"]),
    "shard absolute": (_name_shard("/etc/passwd"), CheckpointError, [INDEX, HEAD, "plain file name"]),
    "shard not a name": (_name_shard(["x"]), CheckpointError, [INDEX, HEAD, '["x"]', "plain file name"]),
    "shard a link": (
        _sharded(lambda f: _replace_with_link(f / "model-00002-of-00003.safetensors", "/dev/zero")),
        CheckpointError,
        ["model-00002-of-00003.safetensors", "a link to /dev/zero"],
    ),
    "tensor in two shards": (_two_shards, CheckpointError, [INDEX, HEAD, "two shards", "00001-of", "00002-of"]),
    "index names another shard": (
        _name_shard("model-00003-of-00003.safetensors"),
        CheckpointError,
        [INDEX, HEAD, "disagrees", "00003-of-00003", "found in model-00001-of-00003"],
    ),
    "index incomplete": (_index(lambda i: i["weight_map"].pop(Q_PROJ)), CheckpointError, [INDEX, Q_PROJ, "disagrees"]),
    "index names too much": (
        _index(lambda i: i["weight_map"].update(x="model-00001-of-00003.safetensors")),
        CheckpointError,
        [INDEX, '"x"', "disagrees", "found in None"],
    ),
    "index without a map": (_index(lambda i: i.pop("weight_map")), CheckpointError, [INDEX, "weight_map"]),
    "index with other keys": (_index(lambda i: i.update(url="x")), CheckpointError, [INDEX, '"url"']),
    "index with a list": (_index(lambda i: i.update(weight_map=["x"])), CheckpointError, [INDEX, "weight_map"]),
    "index not JSON": (_sharded(lambda f: (f / INDEX).write_text("{")), CheckpointError, [INDEX, "line 1"]),
}


@pytest.mark.parametrize(("change", "error", "parts"), FOLDER_FAULTS.values(), ids=FOLDER_FAULTS)
def test_faults_of_the_directory(folder, change, error, parts):
    change(folder)
    with refuses(error, *parts):
        HuggingFaceCheckpoint(folder)


# Tensors that do not fit the configuration


def _tensors(**changes):
    """Set tensors, to an array or to a function of all of them; None removes one."""

    def apply(tensors: dict):
        for name, value in changes.items():
            tensors[name] = value(tensors) if callable(value) else value
        for name in [name for name, value in tensors.items() if value is None]:
            del tensors[name]

    return lambda folder: change_tensors(folder, apply)


TENSOR_FAULTS = {
    "missing": (
        _tensors(**{Q_PROJ: None, "model.norm.weight": None}),
        CheckpointError,
        ["missing", Q_PROJ, "model.norm"],
    ),
    "unexpected": (_tensors(extra=np.ones(3, "float32")), CheckpointError, ["does not use", '"extra"']),
    "a name that only ends like one": (
        lambda f: change_tensors(f, lambda t: t.update({f"aux.{Q_PROJ}": t.pop(Q_PROJ)})),
        CheckpointError,
        ["missing", Q_PROJ],
    ),
    "a bias the config does not have": (
        _tensors(**{"model.layers.0.mlp.up_proj.bias": np.ones(12, "float32")}),
        CheckpointError,
        ["does not use", "model.layers.0.mlp.up_proj.bias"],
    ),
    "transposed": (
        _tensors(**{Q_PROJ: lambda t: np.ascontiguousarray(t[Q_PROJ].T)}),
        CheckpointError,
        [Q_PROJ, "(8, 24)", "expected (24, 8)"],
    ),
    "the same elements in one axis": (
        _tensors(**{Q_PROJ: lambda t: t[Q_PROJ].reshape(-1)}),
        CheckpointError,
        [Q_PROJ, "(192,)", "expected (24, 8)"],
    ),
    "int8": (_tensors(**{Q_PROJ: np.ones((24, 8), "int8")}), UnsupportedError, ["looks quantised: found I8", Q_PROJ]),
    "int32 in other tensors": (
        _tensors(**{Q_PROJ: None, "model.layers.1.self_attn.q_proj.qweight": np.ones((3, 8), "int32")}),
        UnsupportedError,
        ["looks quantised: found I32", "q_proj.qweight"],
    ),
    "float64": (_tensors(**{Q_PROJ: np.ones((24, 8))}), UnsupportedError, ["float64 is not read", Q_PROJ]),
    "fewer layers in the config": (
        lambda f: change_config(f, num_hidden_layers=1),
        CheckpointError,
        ["does not use", "model.layers.1.input_layernorm.weight"],
    ),
    "more layers in the config": (
        lambda f: change_config(f, num_hidden_layers=3),
        CheckpointError,
        ["missing tensors", "model.layers.2.input_layernorm.weight"],
    ),
    "far more layers in the config": (
        lambda f: change_config(f, num_hidden_layers=65_536),
        CheckpointError,
        ["config.json needs at least 115.3 MB", "the files hold 8.1 kB"],
    ),
    "a far larger hidden size": (
        lambda f: change_config(f, hidden_size=10**6),
        CheckpointError,
        ["config.json needs at least 506.0 MB", "the files hold 8.1 kB"],
    ),
    "padded vocabulary": (
        lambda f: change_config(f, vocab_size=15),
        CheckpointError,
        [EMBEDDINGS, "16 rows", "vocab_size = 15", "belongs to no token", "strict=False"],
    ),
    "larger vocabulary": (
        lambda f: change_config(f, vocab_size=17),
        CheckpointError,
        [EMBEDDINGS, "(16, 8)", "expected (17, 8)"],
    ),
    "head of another vocabulary": (
        _tensors(**{HEAD: np.ones((15, 8), "float32")}),
        CheckpointError,
        [HEAD, "(15, 8)", "expected (16, 8)"],
    ),
    "another head_dim": (
        lambda f: change_config(f, head_dim=None),
        CheckpointError,
        [Q_PROJ, "(24, 8)", "expected (8, 8)"],
    ),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize(("change", "error", "parts"), TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_tensors_that_do_not_fit(folder, change, error, parts, sharded):
    change(folder)
    if sharded:
        shard(folder)
    with refuses(error, str(folder), *parts):
        HuggingFaceCheckpoint(folder)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_tensors(extra=np.ones(3, "float32")), ["does not use", '"extra"']),
        (_tensors(extra=np.ones(3, "int64")), ["does not use", '"extra"']),
        (lambda f: change_config(f, num_hidden_layers=1), ["does not use", "model.layers.1.mlp.up_proj"]),
        (lambda f: change_config(f, vocab_size=13), [EMBEDDINGS, "16 rows", "vocab_size = 13"]),
        (lambda f: change_config(f, tie_word_embeddings=True), []),
    ],
    ids=["extra", "extra integers", "fewer layers", "padded", "tied with another head"],
)
def test_what_is_left_over_may_pass(folder, caplog, change, parts, sharded):
    sound = dict(HuggingFaceCheckpoint(folder).tensors())
    change(folder)
    if sharded:
        shard(folder)
    checkpoint = HuggingFaceCheckpoint(folder, Strictness(unused=False))
    tensors = dict(checkpoint.tensors())
    assert len(tensors) == len(list(expected_tensors(checkpoint.backbone_config)))
    for path, array in tensors.items():
        np.testing.assert_array_equal(array, sound[path][tuple(slice(size) for size in array.shape)])
    assert all(part in caplog.text for part in parts)


def test_values_that_are_not_finite_may_pass(folder):
    _tensors(**{"model.norm.weight": np.array([1, np.nan, np.inf, 1, 1, 1, 1, 1], "float32")})(folder)
    with refuses(CheckpointError, "model.norm.weight = NaN or infinity in 2 of 8"):
        dict(HuggingFaceCheckpoint(folder).tensors())
    norm = dict(HuggingFaceCheckpoint(folder, Strictness(check_finite=False)).tensors())
    assert np.isnan(norm["sequence_output_layernorm/scale"][1])


def test_a_tied_copy_that_is_not_finite_may_pass(folder):
    change_config(folder, tie_word_embeddings=True)
    change_tensors(folder, lambda t: t[EMBEDDINGS].__setitem__((0, 0), np.nan))
    change_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDINGS].copy()}))
    tensors = dict(HuggingFaceCheckpoint(folder, Strictness(check_finite=False)).tensors())
    assert np.isnan(tensors["token_embedding/embeddings"][0, 0])
    with refuses(CheckpointError, "NaN or infinity in 1"):
        dict(HuggingFaceCheckpoint(folder).tensors())


def save_archives(folder: Path, dtype: str, num_shards: int) -> None:
    """Turn the single file into what `save_pretrained(safe_serialization=False)` wrote."""
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(a).to(getattr(torch, dtype)) for name, a in load_file(folder / SINGLE).items()}
    (folder / SINGLE).unlink()
    if num_shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{i + 1:05}-of-{num_shards:05}.bin" for i in range(num_shards)]
    weight_map = {name: names[i % num_shards] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_archives_of_pytorch(folder, dtype, num_shards):
    change_config(folder, torch_dtype=dtype)
    expected = dict(HuggingFaceCheckpoint(folder).tensors())
    save_archives(folder, dtype, num_shards)
    checkpoint = HuggingFaceCheckpoint(folder)
    assert checkpoint.dtype == dtype
    tensors = dict(checkpoint.tensors())
    assert tensors.keys() == expected.keys()
    for path, array in tensors.items():
        np.testing.assert_array_equal(array, expected[path].astype(array.dtype))


def test_safetensors_count_where_both_are_there(folder):
    (folder / "pytorch_model.bin").write_bytes(b"damaged")
    assert dict(HuggingFaceCheckpoint(folder).tensors())


def test_stored_bytes(folder):
    assert HuggingFaceCheckpoint(folder).stored_bytes == {"float32": 4 * sum(map(np.prod, shapes().values()))}


def test_float8_is_refused(folder):
    _tensors(**{Q_PROJ: np.ones((24, 8), ml_dtypes.float8_e4m3fn)})(folder)
    with refuses(UnsupportedError, str(folder), "looks quantised: found F8_E4M3", Q_PROJ):
        HuggingFaceCheckpoint(folder)


def test_a_tied_copy_must_have_the_embeddings_shape(folder):
    change_config(folder, tie_word_embeddings=True)
    _tensors(**{HEAD: np.ones((8, 16), "float32")})(folder)
    with refuses(CheckpointError, HEAD, "(8, 16)", "expected (16, 8)"):
        HuggingFaceCheckpoint(folder)


def test_no_more_than_ten_tensors_are_listed(folder):
    change_tensors(folder, lambda t: [t.pop(name) for name in list(t) if re.search("norm|[kvo]_proj|up_proj", name)])
    with refuses(CheckpointError, "missing tensors") as caught:
        HuggingFaceCheckpoint(folder)
    assert str(caught.value).count("model.layers.") == 10


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(folder, value):
    change_tensors(folder, lambda t: t[Q_PROJ].__setitem__((slice(0, 3), 0), value))
    checkpoint = HuggingFaceCheckpoint(folder)
    with refuses(CheckpointError, SINGLE, Q_PROJ, "3 of 192", "finite"):
        list(checkpoint.tensors())


def test_faults_of_the_configuration_name_the_file(folder):
    for changes, error, parts in (
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedError, ["quant_method", '"awq"']),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, CheckpointError, ["rope_scaling['factor'] (0)"]),
        ({"intermediate_size": "12"}, CheckpointError, ['intermediate_size = "12"']),
    ):
        write_json(folder / "config.json", CONFIG | changes)
        with refuses(error, str(folder / "config.json"), *parts):
            HuggingFaceCheckpoint(folder)


def test_mutated_headers_load_or_are_refused(folder):
    """Whatever one byte of the header becomes: the same tensors under the same names, or a CheckpointError."""
    path = folder / SINGLE
    data = bytearray(path.read_bytes())
    expected = {p: a.shape for p, a in HuggingFaceCheckpoint(folder).tensors()}
    (length,) = struct.unpack("<Q", data[:8])
    for position in range(0, 8 + length, 37):
        for byte in (0x00, 0x22, 0x7D, 0xFF, data[position] ^ 1):
            path.write_bytes(data[:position] + bytes([byte]) + data[position + 1 :])
            try:
                assert {p: a.shape for p, a in HuggingFaceCheckpoint(folder).tensors()} == expected
            except CheckpointError as error:
                assert str(folder) in str(error)


# Tokenizer, preprocessor, generation


def test_the_tokenizers_special_tokens(folder):
    assert HuggingFaceCheckpoint(folder).tokenizer_config == {
        "tokenizer": str(folder / "tokenizer.json"),
        "start_token": "<s>",
        "end_token": "</s>",
        "pad_token": None,
    }


@pytest.mark.parametrize(
    ("settings", "config", "tokens"),
    [
        (None, {}, (1, 2, None)),
        ({"pad_token": "<unk>"}, {"eos_token_id": [15, 2]}, (1, 15, "<unk>")),
        ({"bos_token": None, "eos_token": {"content": "a"}}, {}, (None, "a", None)),
        ({}, {"bos_token_id": None, "eos_token_id": None}, (None, None, None)),
        ({}, {"bos_token_id": ...}, ("auto", 2, None)),
    ],
)
def test_special_tokens_fall_back_to_the_configurations_ids(folder, settings, config, tokens):
    (folder / "tokenizer_config.json").unlink()
    if settings is not None:
        write_json(folder / "tokenizer_config.json", settings)
    content = {**CONFIG, **config}
    write_json(folder / "config.json", {name: value for name, value in content.items() if value is not ...})
    found = HuggingFaceCheckpoint(folder).tokenizer_config
    assert (found["start_token"], found["end_token"], found["pad_token"]) == tokens


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_vocabulary_without_rules_of_its_own_takes_those_beside_it(folder, name):
    (folder / "tokenizer.json").rename(folder / name)
    added = {"16": {"content": "<y>", "special": False}, "15": {"content": "<x>", "special": True, "lstrip": True}}
    found_as_it_is = {"normalized": False} if name == "tokenizer.model" else {}
    settings = {"legacy": False, "add_prefix_space": True, "added_tokens_decoder": added}
    write_json(folder / "tokenizer_config.json", settings)
    assert HuggingFaceCheckpoint(folder).tokenizer_config == {
        "tokenizer": str(folder / name),
        "start_token": 1,
        "end_token": 2,
        "pad_token": None,
        **({"legacy": False} if name == "tokenizer.model" else {}),  # no rule of byte-level vocabularies
        "add_prefix_space": True,
        "added_tokens": (
            folder / "tokenizer_config.json",
            [
                {"id": 15, "content": "<x>", "special": True, "lstrip": True, **found_as_it_is},
                {"id": 16, "content": "<y>", "special": False, **found_as_it_is},
            ],
        ),
    }


def test_added_tokens_of_old_directories(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    write_json(folder / "added_tokens.json", {"<pad>": 16, "<x>": 15})
    found = HuggingFaceCheckpoint(folder).tokenizer_config["added_tokens"]
    flags = {"special": False, "normalized": False}
    tokens = [{"id": 15, "content": "<x>", **flags}, {"id": 16, "content": "<pad>", **flags}]
    assert found == (folder / "added_tokens.json", tokens)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "names",
    [
        {"pad_token": "<pad>"},
        {"unk_token": {"content": "<pad>", "lstrip": False}},
        {"additional_special_tokens": ["<z>", {"content": "<pad>"}]},
        {"extra_special_tokens": ["<pad>"]},
        {"extra_special_tokens": {"image_token": "<x>"}, "pad_token": "<pad>"},
    ],
)
def test_added_tokens_that_a_file_names_are_special(folder, file, names):
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    write_json(folder / "added_tokens.json", {"<pad>": 16, "<x>": 15})
    write_json(folder / file, names)
    _, found = HuggingFaceCheckpoint(folder).tokenizer_config["added_tokens"]
    assert {token["content"]: token["special"] for token in found} == {"<x>": False, "<pad>": True}


@pytest.mark.parametrize("flags, special", [({}, True), ({"special": False}, False)])
def test_the_flag_of_an_added_token_counts(folder, flags, special):
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    settings = {"additional_special_tokens": ["<x>"], "added_tokens_decoder": {"15": {"content": "<x>", **flags}}}
    write_json(folder / "tokenizer_config.json", settings)
    assert HuggingFaceCheckpoint(folder).tokenizer_config["added_tokens"].tokens[0]["special"] is special


def test_special_tokens_map_names_what_the_settings_leave_out(folder):
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": None})
    names = {"bos_token": "a", "eos_token": "a", "pad_token": {"content": "b"}}
    write_json(folder / "special_tokens_map.json", names)
    found = HuggingFaceCheckpoint(folder).tokenizer_config
    assert (found["start_token"], found["end_token"], found["pad_token"]) == ("<s>", None, "b")
    write_json(folder / "special_tokens_map.json", {"pad_token": 3})
    with refuses(CheckpointError, str(folder / "special_tokens_map.json"), "pad_token = 3"):
        HuggingFaceCheckpoint(folder)


def test_chat_templates(folder):
    def found():
        return HuggingFaceCheckpoint(folder).tokenizer_config.get("chat_template")

    assert found() is None
    write_json(folder / "tokenizer_config.json", {"chat_template": "a"})
    assert found() == "a"
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": several})
    assert found() == {"default": "a", "tool_use": "b"}
    (folder / "chat_template.jinja").write_text("c\n")
    assert found() == "c\n"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("d")
    assert found() == {"default": "c\n", "rag": "d"}


def test_without_a_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    checkpoint = HuggingFaceCheckpoint(folder)
    assert checkpoint.tokenizer_config is None


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        ("tokenizer_config.json", {"pad_token": 3}, ["pad_token = 3"]),
        ("tokenizer_config.json", {"eos_token": {"content": ["a"]}}, ["eos_token"]),
        ("tokenizer_config.json", [], ["expected an object"]),
        ("tokenizer_config.json", {"chat_template": 3}, ["chat_template = 3"]),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, ["chat_template"]),
        ("generation_config.json", {"temperature": -1}, ["temperature = -1"]),
        ("generation_config.json", {"eos_token_id": [2, 16]}, ["eos_token_id = 16", "below 16"]),
        ("generation_config.json", {"eos_token_id": "2"}, ['eos_token_id = "2"']),
        ("config.json", CONFIG | {"eos_token_id": 16}, ["eos_token_id = 16"]),
        ("config.json", CONFIG | {"bos_token_id": -1}, ["bos_token_id = -1"]),
    ],
)
def test_faults_of_the_files_beside(folder, file, content, parts):
    (folder / "tokenizer_config.json").unlink()
    write_json(folder / file, content)
    with refuses(CheckpointError, str(folder / file), *parts):
        HuggingFaceCheckpoint(folder)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"legacy": 1}, "legacy = 1"),
        ({"add_prefix_space": "no"}, 'add_prefix_space = "no"'),
        ({"added_tokens_decoder": [3]}, "added tokens = [3]"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added tokens"),
        ({"added_tokens_decoder": {"3": {}}}, "added tokens"),
        ({"added_tokens_decoder": {"-3": {"content": "a"}}}, "added tokens"),
        ({"added_tokens_decoder": {"3": {"content": ""}}}, "added tokens"),
        ({"added_tokens_decoder": {"3": {"content": "\ud800"}}}, "added tokens"),
        ({"added_tokens_decoder": {"3": {"content": "a", "special": 1}}}, "added tokens"),
        ({"additional_special_tokens": [3]}, "additional_special_tokens = 3"),
        ({"eos_token": "\ud800"}, "eos_token"),
    ],
)
def test_faults_of_the_rules_beside_a_vocabulary(folder, settings, fault):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", settings)
    with refuses(CheckpointError, str(folder / "tokenizer_config.json"), fault):
        HuggingFaceCheckpoint(folder)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"add_bos_token": False}, {"add_start_token": False}),
        ({"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}, {"add_start_token": True}),
        ({}, {"add_start_token": True}),
        ({"tokenizer_class": "LlamaTokenizerFast"}, {"add_start_token": True}),
        ({"tokenizer_class": "GPT2Tokenizer"}, {}),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    ],
)
def test_whether_texts_get_a_start_token(folder, settings, expected):
    write_json(folder / "tokenizer_config.json", settings)
    assert HuggingFaceCheckpoint(folder).preprocessor_config == expected


@pytest.mark.parametrize(
    ("content", "config", "expected"),
    [
        (None, {}, {"stop_token_ids": [2]}),
        (None, {"eos_token_id": [1, 2]}, {"stop_token_ids": [1, 2]}),
        (None, {"eos_token_id": None}, {}),
        ({"eos_token_id": [1, 2], "do_sample": True}, {}, {"stop_token_ids": [1, 2], "do_sample": True}),
        ({"eos_token_id": 3, "top_p": 0.9, "top_k": None}, {}, {"stop_token_ids": [3], "top_p": 0.9}),
        ({"temperature": 0.6, "max_length": 4096}, {}, {"stop_token_ids": [2], "temperature": 0.6}),
    ],
)
def test_generation_config(folder, content, config, expected):
    change_config(folder, **config)
    if content is not None:
        write_json(folder / "generation_config.json", content)
    assert HuggingFaceCheckpoint(folder).generation_config == expected


# Recognition, and real files


def test_is_huggingface(folder, tmp_path):
    assert is_huggingface(folder)
    assert is_huggingface(str(folder))
    assert not is_huggingface(folder / SINGLE)
    assert not is_huggingface(tmp_path / "nowhere")
    write_json(folder / "config.json", {"module": "keras_hub", "class_name": "LlamaBackbone", "config": {}})
    assert not is_huggingface(folder)
    (folder / "config.json").write_text("{")
    with refuses(CheckpointError, "config.json", "line 1"):
        is_huggingface(folder)


def _llamas(assets: Path) -> list[Path]:
    folders = [
        folder for group in ("hf_tiny", "hf_layouts") for folder in sorted((assets / "goldens" / group).iterdir())
    ]
    others = ("llama_sequence_classification", "gpt2")
    return [folder for folder in folders if folder.name not in others] + [assets / "models" / "stories260K"]


def test_goldens_open_and_give_every_tensor(assets):
    folders = _llamas(assets)
    assert len(folders) >= 17
    for folder in folders:
        assert is_huggingface(folder)
        checkpoint = HuggingFaceCheckpoint(folder)
        stored = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="numpy") as opened:
                stored.update({name: opened.get_tensor(name) for name in opened.keys()})
        tensors = dict(checkpoint.tensors())
        expected = list(expected_tensors(checkpoint.backbone_config))
        assert {tensor.name for tensor in expected} == set(stored), folder.name
        for tensor in expected:
            exported = tensor.to_stored(tensors[tensor.path])
            np.testing.assert_array_equal(exported, stored[tensor.name], err_msg=f"{folder.name} {tensor.path}")


def test_goldens_open_with_the_config_of_transformers_4(assets, tmp_path):
    for source in _llamas(assets):
        if (source / "config_v4.json").exists():
            folder = tmp_path / source.name
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.npz"), copy_function=shutil.copyfile)
            shutil.copyfile(folder / "config_v4.json", folder / "config.json")
            v4, v5 = HuggingFaceCheckpoint(folder), HuggingFaceCheckpoint(source)
            assert v4.backbone_config == v5.backbone_config, source.name
            assert v4.dtype == v5.dtype == "float32"


@pytest.mark.parametrize(
    ("name", "error", "parts"),
    [
        ("llama_sequence_classification", UnsupportedError, ["architectures", "LlamaForSequenceClassification"]),
        ("gpt2", UnsupportedError, ["not Llama", "gpt2"]),
    ],
)
def test_goldens_of_other_models_are_refused(assets, name, error, parts):
    with refuses(error, "config.json", *parts):
        HuggingFaceCheckpoint(assets / "goldens" / "hf_tiny" / name)


@pytest.mark.parametrize("name", ["stories260K", "stories15M"])
def test_the_story_models(assets, name):
    folder = assets / "models" / name
    checkpoint = HuggingFaceCheckpoint(folder)
    assert checkpoint.backbone_config["tie_word_embeddings"]
    assert checkpoint.backbone_config["layer_norm_epsilon"] == 1e-5
    assert checkpoint.generation_config == {"stop_token_ids": [1, 2]}
    assert checkpoint.preprocessor_config == {"add_start_token": True}
    assert checkpoint.tokenizer_config == {
        "tokenizer": str(folder / "tokenizer.json"),
        "start_token": "<s>",
        "end_token": "</s>",
        "pad_token": None,
    }
    path, embeddings = next(checkpoint.tensors())
    assert path == "token_embedding/embeddings"
    assert embeddings.shape == (checkpoint.backbone_config["vocabulary_size"], checkpoint.backbone_config["hidden_dim"])
