"""Where kllama and KerasHub differ on purpose: both side by side, a test for each row of docs/from-kerashub.md."""

import ast
import contextlib
import json
import re
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import kllama
from tests.drop_in.test_scripts import DIFFERENCES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "from-kerashub.md").read_text(encoding="utf-8")
TEXTS = ["the quick brown fox jumped", "a girl"]
LIBRARIES = {"kllama": kllama.models, "KerasHub": keras_hub.models}


def numpy(tensor) -> np.ndarray:
    return ops.convert_to_numpy(tensor)


def each(function, *arguments) -> dict:
    """What a function gives for the models of each library."""
    return {name: function(models, *arguments) for name, models in LIBRARIES.items()}


# Text and generation


def test_prompts_that_are_too_long(llama_preset):
    ours, theirs = each(lambda models: models.LlamaCausalLM.from_preset(llama_preset)).values()
    assert theirs.generate(TEXTS[0], max_length=3) == "the quick"  # the start token counts
    with pytest.raises(ValueError, match="prompt has 6 tokens, max_length is 3"):
        ours.generate(TEXTS[0], max_length=3)
    ours.preprocessor.truncate = "right"
    assert ours.preprocessor.generate_preprocess(TEXTS[0], sequence_length=3)["token_ids"].shape == (3,)


def test_special_tokens_spelt_in_a_prompt(llama3_preset):
    text = "the dog<|eot_id|>"
    ids = each(lambda models: list(models.Llama3Tokenizer.from_preset(llama3_preset)(text)))
    tokenizer = kllama.models.Llama3Tokenizer.from_preset(llama3_preset)
    eot = tokenizer.token_to_id("<|eot_id|>")
    assert ids["KerasHub"][-1] == eot and eot not in ids["kllama"]
    assert tokenizer.detokenize(ids["kllama"]) == text


def test_bytes_that_are_no_text(llama_preset):
    def read(models):
        tokenizer = models.LlamaTokenizer.from_preset(llama_preset)
        return tokenizer.detokenize([tokenizer.token_to_id("<0xFF>"), tokenizer.token_to_id("<0x45>")])

    assert each(read) == {"kllama": "\ufffd\ufffd", "KerasHub": "\ufffdE"}


def test_special_tokens_in_detokenize(llama_preset):
    def read(models):
        tokenizer = models.LlamaTokenizer.from_preset(llama_preset)
        return tokenizer.detokenize([tokenizer.start_token_id, *map(int, tokenizer("the fox")), tokenizer.end_token_id])

    assert each(read) == {"kllama": "<s> the fox</s>", "KerasHub": "the fox"}
    tokenizer = kllama.LlamaTokenizer.from_preset(llama_preset)
    assert tokenizer.detokenize([1, *tokenizer("the fox"), 2], skip_special_tokens=True) == "the fox"


def test_the_parts_of_a_tokenizer(llama3_preset):
    ours, theirs = each(lambda models: models.Llama3Tokenizer.from_preset(llama3_preset)).values()
    assert not hasattr(ours, "vocabulary") and not hasattr(ours, "merges")
    assert list(ours.get_vocabulary()) == sorted(theirs.vocabulary, key=theirs.vocabulary.__getitem__)
    assert all(ours.token_to_id(token) == i and ours.id_to_token(i) == token for token, i in theirs.vocabulary.items())


def test_the_dtype_of_logits(llama_preset):
    ids = np.arange(300, 306, dtype="int32")[None]

    def dtype(models):
        model = models.LlamaCausalLM.from_preset(llama_preset, dtype="bfloat16")
        return keras.backend.standardize_dtype(model({"token_ids": ids, "padding_mask": np.ones_like(ids)}).dtype)

    assert each(dtype) == {"kllama": "float32", "KerasHub": "bfloat16"}


def test_random_weights():
    def deviations(models):
        backbone = models.LlamaBackbone(1000, 1, 2, 32, 64, 1)
        kernel = backbone.get_layer("transformer_layer_0").weights[0]
        return [round(float(np.std(numpy(weight))), 2) for weight in (backbone.token_embedding.embeddings, kernel)]

    assert each(deviations) == {"kllama": [0.02, 0.02], "KerasHub": [0.01, 0.02]}
    backbone = kllama.LlamaBackbone(1000, 1, 2, 32, 64, 1, initializer_range=0.1)
    assert round(float(np.std(numpy(backbone.token_embedding.embeddings))), 1) == 0.1


def test_layers_by_number_and_by_name(llama_preset):
    ours, theirs = each(lambda models: models.LlamaBackbone.from_preset(llama_preset)).values()
    names = [[layer.name for layer in backbone.layers] for backbone in (ours, theirs)]
    assert set(names[0]) - set(names[1]) == {"rotary_embedding", "causal_mask"} and len(names[0]) == len(names[1]) + 2
    layers = [backbone.get_layer("transformer_layer_0") for backbone in (ours, theirs)]
    mine, other = layers[0].self_attention.query.kernel, layers[1]._self_attention_layer._query_dense.kernel
    np.testing.assert_array_equal(numpy(mine), numpy(other))
    assert layers[0].self_attention.query._kernel.path == layers[1]._self_attention_layer._query_dense._kernel.path


def test_the_call_of_a_decoder_layer(llama_preset):
    ours, theirs = each(lambda models: models.LlamaBackbone.from_preset(llama_preset)).values()
    token_ids = np.arange(300, 306, dtype="int32")[None]
    x = ours.token_embedding(token_ids)
    expected = numpy(theirs.transformer_layers[0](x, decoder_padding_mask=np.ones((1, 6))))
    with pytest.raises(TypeError, match="cos"):
        ours.transformer_layers[0](x, decoder_padding_mask=np.ones((1, 6)))
    cos, sin = ours.rotary_embedding(token_ids)
    np.testing.assert_allclose(numpy(ours.transformer_layers[0](x, cos, sin)), expected, atol=1e-5)


def test_draws(llama_preset):
    def draw(models):
        keras.utils.set_random_seed(1)
        model = models.LlamaCausalLM.from_preset(llama_preset)
        model.compile(sampler=keras_hub.samplers.RandomSampler(temperature=5.0, seed=1))
        return model.generate("the", max_length=16, stop_token_ids=None)

    texts = each(draw)
    assert texts["kllama"] != texts["KerasHub"]


def test_the_checkpoints_own_settings(llama_preset):
    def greedy(models):
        model = models.LlamaCausalLM.from_preset(llama_preset)
        model.compile(sampler="greedy")
        return model.generate("the", max_length=8)

    ours = kllama.LlamaCausalLM.from_preset(llama_preset, generation_config={"do_sample": False})
    assert ours.generate("the", max_length=8) == greedy(keras_hub.models)


# Arguments and configs


def test_unknown_keywords():
    arguments = {"vocabulary_size": 8, "num_layers": 1, "num_query_heads": 2, "hidden_dim": 4}
    arguments |= {"intermediate_dim": 4, "num_key_value_heads": 1, "layer_norm_eps": 1e-3}
    assert keras_hub.models.LlamaBackbone(**arguments).layer_norm_epsilon == 1e-6
    with pytest.raises(TypeError, match="layer_norm_epsilon"):
        kllama.models.LlamaBackbone(**arguments)


def test_position_scaling(llama_preset):
    ids = np.arange(10)[None]
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}

    def effect(models):
        plain = models.LlamaBackbone.from_preset(llama_preset)
        config = plain.get_config()
        config.pop("rope_scaling", None)
        scaled = models.LlamaBackbone(**{**config, "rope_position_scaling_factor": 4.0, "dtype": "float32"})
        scaled.set_weights(plain.get_weights())
        return float(abs(numpy(scaled(inputs)) - numpy(plain(inputs))).max())

    effects = each(effect)
    assert effects["KerasHub"] == 0 and effects["kllama"] > 1e-2


def test_the_config_of_rotary_scaling(llama3_preset):
    configs = each(lambda models: models.Llama3Backbone.from_preset(llama3_preset).get_config())
    assert configs["KerasHub"]["rope_frequency_adjustment_factor"] == 8
    assert not [key for key in configs["kllama"] if key.startswith("rope_frequency")]
    assert configs["kllama"]["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }


def test_one_class_for_every_llama():
    are_one = each(lambda models: models.Llama3CausalLM is models.LlamaCausalLM)
    assert are_one == {"kllama": True, "KerasHub": False}


def test_the_dtype_of_the_file(llama_preset, tmp_path):
    model = keras_hub.models.LlamaCausalLM.from_preset(llama_preset, dtype="bfloat16")
    model.save_to_preset(str(tmp_path / "half"))
    dtypes = each(lambda models: models.LlamaBackbone.from_preset(str(tmp_path / "half")).compute_dtype)
    assert dtypes == {"kllama": "bfloat16", "KerasHub": "float32"}


def test_the_class_names_of_a_preset(llama_preset, tmp_path):
    names = {}
    for library, models in LIBRARIES.items():
        models.LlamaBackbone.from_preset(llama_preset).save_to_preset(str(tmp_path / library))
        names[library] = json.loads((tmp_path / library / "config.json").read_text())["registered_name"]
    assert names == {"kllama": "kllama>LlamaBackbone", "KerasHub": "keras_hub>LlamaBackbone"}
    assert isinstance(keras_hub.models.Backbone.from_preset(str(tmp_path / "kllama")), kllama.LlamaBackbone)


def test_a_keras_file(llama_preset, tmp_path):
    def reload(models):
        model = models.LlamaCausalLM.from_preset(llama_preset)
        model.compile(optimizer="sgd", sampler="greedy")
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        return type(loaded.optimizer).__name__, type(loaded.sampler).__name__

    kept = each(reload)
    assert kept["kllama"] == ("SGD", "GreedySampler") and kept["KerasHub"] == ("Adam", "TopKSampler")


# Training


def labels_and_logits(preprocessor, width: int) -> dict:
    """The labels and weights of a short text in a row of some width, and logits for them."""
    _, y, weights = preprocessor([TEXTS[1]], sequence_length=width)
    logits = np.random.default_rng(5).normal(size=(1, 16, 400)).astype("float32")[:, :width]
    return {"y": numpy(y), "y_pred": ops.convert_to_tensor(logits), "sample_weight": numpy(weights).astype("float32")}


def test_the_loss_and_padding(llama_preset):
    def loss(models, width):
        model = models.LlamaCausalLM.from_preset(llama_preset)
        return float(model.compute_loss(x=None, **labels_and_logits(model.preprocessor, width)))

    narrow, wide = each(loss, 4), each(loss, 16)
    assert narrow["kllama"] == pytest.approx(wide["kllama"], rel=1e-5)
    assert narrow["KerasHub"] == pytest.approx(4 * wide["KerasHub"], rel=1e-5)


def test_the_reported_metrics(llama_preset):
    def names(models):
        model = models.LlamaCausalLM.from_preset(llama_preset)
        return set(model.compute_metrics(None, **labels_and_logits(model.preprocessor, 4))) | {"loss"}

    reported = each(names)
    assert reported["KerasHub"] == {"loss", "sparse_categorical_accuracy"}
    assert reported["kllama"] == reported["KerasHub"] | {"perplexity"}


def test_rows_are_as_wide_as_the_longest(llama_preset):
    class SeenError(Exception):
        pass

    def width(models):
        model = models.LlamaCausalLM.from_preset(llama_preset)
        model.compile(run_eagerly=True)
        widths = []

        def note(inputs, **options):
            widths.append(inputs.shape[1])
            raise SeenError

        model.backbone.token_embedding.call = note
        with contextlib.suppress(SeenError, RuntimeError):  # Keras wraps it on JAX
            model.evaluate(TEXTS, verbose=0)
        return widths[0]

    assert each(width) == {"kllama": 7, "KerasHub": 16}


def test_variables_after_the_optimizer(llama_preset):
    model = kllama.LlamaCausalLM.from_preset(llama_preset)
    model.fit(TEXTS, verbose=0)
    model.backbone.enable_lora(rank=2)
    with pytest.raises(ValueError, match="compile"):
        model.fit(TEXTS, verbose=0)
    if keras.backend.backend() != "tensorflow":
        return
    theirs = keras_hub.models.LlamaCausalLM.from_preset(llama_preset)
    theirs.fit(TEXTS, verbose=0)
    theirs.backbone.enable_lora(rank=2)
    theirs.fit(TEXTS, verbose=0)
    assert all((numpy(v) == 0).all() for v in theirs.trainable_variables if v.path.endswith("lora_kernel_b"))


def test_labels_beside_text(llama_preset):
    ours, theirs = each(lambda models: models.LlamaCausalLM.from_preset(llama_preset)).values()
    _, labels, _ = theirs.preprocess_samples(TEXTS, np.array([1, 2]))
    assert numpy(labels).tolist() == numpy(theirs.preprocess_samples(TEXTS)[1]).tolist()
    with pytest.raises(ValueError, match="y"):
        ours.evaluate(TEXTS, np.array([1, 2]), verbose=0)


# The model


def test_what_stands_at_padding(llama_preset):
    ids, mask = np.arange(3, 11)[None], (np.arange(8) < 5)[None].astype("int32")
    inputs = {"token_ids": ids, "padding_mask": mask}
    states = each(lambda models: numpy(models.LlamaBackbone.from_preset(llama_preset)(inputs)))
    distance = abs(states["kllama"] - states["KerasHub"]).max(-1)
    assert distance[mask == 1].max() < 1e-5 and distance[mask == 0].min() > 1e-3


@pytest.mark.backend_independent
def test_the_layout_map():
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), devices=["cpu:0"])
    name = "transformer_layer_0/self_attention/query/kernel"  # (D, N, H): the second axis counts the heads
    axes = each(lambda models: models.LlamaBackbone.get_layout_map(mesh)[name].axes)
    assert axes["kllama"] == ("batch", "model", None) and axes["KerasHub"] == ("model", "batch", None)


# The page


def section(heading: str) -> str:
    """The text under a heading of the page."""
    return re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its two header lines and the names of families."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]
    return [row for row in cells if not row[0].startswith("**")]


def nodes_of(path: Path) -> set[str]:
    """The names by which pytest knows the tests of a file, without their parameters."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        functions = [child.name for child in inner if isinstance(child, ast.FunctionDef)]
        names |= {f"{prefix}{name}" for name in functions if name.startswith("test")}
    return names


def missing_tests(cells: list[str]) -> list[str]:
    """What a row of a table names as a test, and is none; the row itself where it names nothing."""
    named = re.findall(r"`([^`]+)`", cells[-1])
    paths = [name if "/" in name else f"tests/drop_in/test_differences.py::{name}" for name in named]
    found = {path: (ROOT / path.partition("::")[0]) for path in paths}
    absent = [
        path for path, file in found.items() if not file.is_file() or path.partition("::")[2] not in nodes_of(file)
    ]
    return absent if named else cells


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    "heading, num_columns", [("What differs on purpose", 5), ("Faults that kllama does not share", 3)]
)
def test_every_row_names_a_test(heading, num_columns):
    table = rows(heading)
    assert len(table) > 15 and {len(cells) for cells in table} == {num_columns}
    assert [missing for cells in table for missing in missing_tests(cells)] == []


@pytest.mark.backend_independent
def test_a_row_without_a_test_is_found():
    assert missing_tests(["a", "b"]) == ["a", "b"]
    for name in ("test_nothing", "tests/nowhere.py::test_draws", "tests/test_readme.py::test_nothing"):
        assert len(missing_tests(["a", f"`test_draws`, `{name}`"])) == 1


@pytest.mark.backend_independent
def test_the_scripts_differ_in_rows_of_the_table_alone():
    named = {difference for differences in DIFFERENCES.values() for difference in differences.values()}
    assert named <= {cells[0] for cells in rows("What differs on purpose")}


@pytest.mark.backend_independent
def test_every_fault_is_won_or_admitted():
    counts = {"S": 13, "T": 12, "A": 11, "G": 10, "L": 5, "Q": 1, "D": 3, "M": 2, "X": 4}
    ids = {f"KH-{family}{i + 1}" for family, count in counts.items() for i in range(count)}
    won = [re.findall(r"KH-\w+", cells[0]) for cells in rows("Faults that kllama does not share")]
    partly = {
        name
        for found, cells in zip(won, rows("Faults that kllama does not share"), strict=True)
        for name in found
        if "in part" in cells[0]
    }
    won, admitted = {name for found in won for name in found}, set(re.findall(r"KH-\w+", section("Not yet")))
    assert won | admitted == ids and won & admitted == partly
