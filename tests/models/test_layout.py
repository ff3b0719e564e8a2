"""A model spread over two devices: what lies where, what the devices exchange, and that the results are the same.

JAX gets its devices when it starts, so a process of its own looks at everything with two CPU devices, once for all
tests: this file, run as a script. The tests compare what it wrote down.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import kllama
from kllama import backend
from kllama.errors import UnsupportedError
from kllama.models.weights import assign_weights, uninitialized_weights
from tests.letters import letters

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocabulary_size": 8, "num_layers": 2, "num_query_heads": 4, "hidden_dim": 16, "intermediate_dim": 24}
CASES = {
    "grouped": {**SIZES, "num_key_value_heads": 2},
    "one key/value head, tied": {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True},
}
TEXTS = ["abcabc", "ccb"]
INPUTS = {
    "token_ids": np.array([[3, 0, 1, 2, 0, 4], [3, 2, 2, 1, 0, 0]], "int32"),
    "padding_mask": np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], "int32"),
}
PROJECTIONS = ("query", "key", "value", "attention_output")
PROJECTIONS += ("feedforward_gate_dense", "feedforward_intermediate_dense", "feedforward_output_dense")

EMBEDDING = {
    "token_embedding/embeddings": ["model", "batch"],
    "token_embedding/reverse_embeddings": ["batch", "model"],
    "sequence_output_layernorm/scale": [None],
}
LAYER = {
    "self_attention/query/kernel": ["batch", "model", None],
    "self_attention/query/bias": ["model", None],
    "self_attention/key/kernel": ["batch", "model", None],
    "self_attention/key/bias": ["model", None],
    "self_attention/value/kernel": ["batch", "model", None],
    "self_attention/value/bias": ["model", None],
    "self_attention/attention_output/kernel": ["model", None, "batch"],
    "self_attention/attention_output/bias": [None],
    "self_attention_layernorm/scale": [None],
    "feedforward_layernorm/scale": [None],
    "feedforward_gate_dense/kernel": ["batch", "model"],
    "feedforward_gate_dense/bias": ["model"],
    "feedforward_intermediate_dense/kernel": ["batch", "model"],
    "feedforward_intermediate_dense/bias": ["model"],
    "feedforward_output_dense/kernel": ["model", "batch"],
    "feedforward_output_dense/bias": [None],
}
ONE_KEY_VALUE_HEAD = {
    "self_attention/key/kernel": ["batch", None, None],
    "self_attention/key/bias": [None, None],
    "self_attention/value/kernel": ["batch", None, None],
    "self_attention/value/bias": [None, None],
}
LORA = {
    "self_attention/query/lora_kernel_a": ["batch", "model", None],
    "self_attention/query/lora_kernel_b": [None, None],
    "self_attention/key/lora_kernel_a": ["batch", "model", None],
    "self_attention/key/lora_kernel_b": [None, None],
    "self_attention/value/lora_kernel_a": ["batch", "model", None],
    "self_attention/value/lora_kernel_b": [None, None],
    "self_attention/attention_output/lora_kernel_a": ["model", None, None],
    "self_attention/attention_output/lora_kernel_b": [None, "batch"],
    "feedforward_gate_dense/lora_kernel_a": ["batch", None],
    "feedforward_gate_dense/lora_kernel_b": [None, "model"],
    "feedforward_intermediate_dense/lora_kernel_a": ["batch", None],
    "feedforward_intermediate_dense/lora_kernel_b": [None, "model"],
    "feedforward_output_dense/lora_kernel_a": ["model", None],
    "feedforward_output_dense/lora_kernel_b": [None, "batch"],
}
LORA_OF_THE_EMBEDDING = {
    "token_embedding/lora_embeddings_a": ["model", None],
    "token_embedding/lora_embeddings_b": [None, "batch"],
}
# What Keras adds to a quantised layer has another shape in each mode.
QUERY_IN_INT8 = {"kernel_scale": [None, None, None, None]}
KEY_IN_FLOAT8 = {
    "inputs_scale": [],
    "inputs_amax_history": [None],
    "kernel_scale": [],
    "kernel_amax_history": [None],
    "outputs_grad_scale": [],
    "outputs_grad_amax_history": [None],
}


# The process with two devices


def observe(folder: Path) -> None:
    """Write down what two devices do: `seen.json`, and the arrays in `arrays.npz`."""
    seen, arrays = {}, {}
    for name, arguments in CASES.items():
        alone = random_model(**arguments)
        alone.save_to_preset(str(folder / name[0]))
        with over_two_devices(num_key_value_heads=arguments["num_key_value_heads"]).scope():
            spread = kllama.LlamaCausalLM.from_preset(folder / name[0])
            seen[name] = {"layouts": layouts(spread.weights), "exchanges": exchanges_of_a_layer(spread.backbone)}
            seen[name]["spread"] = generate(spread)
            arrays[f"{name} spread"] = logits(spread)
        seen[name]["alone"] = generate(alone)
        arrays[f"{name} alone"] = logits(alone)
    alone = random_model(**CASES["grouped"])
    seen["loss alone"] = train(alone)
    arrays |= {f"{weight.path} alone": np.array(weight.value) for weight in alone.weights}
    with over_two_devices().scope():
        spread = random_model(**CASES["grouped"])
        seen["loss spread"] = train(spread)
        seen["trained"] = layouts(spread.weights)
        seen["momenta"] = [list(variable.value.sharding.spec) for variable in spread.optimizer.variables[2:]]
        arrays |= {f"{weight.path} spread": np.array(weight.value) for weight in spread.weights}
        seen["lora"] = layouts(with_lora().weights)
        seen["quantized"] = layouts(quantized_attention().weights)
    (folder / "seen.json").write_text(json.dumps(seen))
    np.savez(folder / "arrays.npz", **arrays)


def over_two_devices(**options) -> keras.distribution.ModelParallel:
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"))
    layout_map = kllama.LlamaBackbone.get_layout_map(mesh, **options)
    return keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")


def random_model(**arguments) -> kllama.LlamaCausalLM:
    """A model with biases, none of them zero."""
    with uninitialized_weights():
        backbone = kllama.LlamaBackbone(**arguments, attention_bias=True, mlp_bias=True)
    rng = np.random.default_rng(0)
    assign_weights(backbone, [(weight.path, rng.normal(0, 0.3, weight.shape)) for weight in backbone.weights])
    preprocessor = kllama.LlamaCausalLMPreprocessor(letters(), sequence_length=8)
    return kllama.LlamaCausalLM(backbone, preprocessor)


def layouts(variables) -> dict:
    return {variable.path: list(variable.value.sharding.spec) for variable in variables}


def logits(model) -> np.ndarray:
    return np.array(backend.compile_function(model, model.variables)(INPUTS))


def generate(model) -> list[str]:
    model.compile(sampler="greedy")
    return model.generate(["a", "cb"], max_length=12)


def train(model) -> list[float]:
    model.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    return model.fit(TEXTS, batch_size=2, epochs=2, verbose=0).history["loss"]


def exchanges_of_a_layer(backbone) -> list[tuple[str, str]]:
    """What the devices exchange in one decoder layer: (operation, where in the layer it comes from), in order."""
    import jax

    layer = backbone.transformer_layers[1]
    cos, sin = backbone.rotary_embedding(INPUTS["token_ids"])

    def forward(values, x):
        with keras.StatelessScope(state_mapping=zip(layer.variables, values, strict=True)):
            return layer(x, cos, sin)

    values = [variable.value for variable in layer.variables]
    program = jax.jit(forward).lower(values, np.ones((2, 6, 16), "float32")).compile().as_text()
    exchange = r"^.* = .* (all-\w+|reduce-scatter|collective-\w+|send|recv)(?:-start)?\(.*$"
    found = [(match[1], match[0]) for match in re.finditer(exchange, program, re.MULTILINE)]
    return [(name, line.partition("/transformer_layer_1/")[2].partition('"')[0]) for name, line in found]


def with_lora():
    model = random_model(**CASES["grouped"])
    model.backbone.enable_lora(2, target_layer_names=[*PROJECTIONS, "token_embedding"])
    return model.backbone


def quantized_attention():
    attention = random_model(**CASES["grouped"]).backbone.transformer_layers[0].self_attention
    attention.query.quantize("int8")
    attention.key.quantize("float8")
    return attention


if __name__ == "__main__":
    observe(Path(sys.argv[1]))


# The tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_devices")
    # A quick compilation; which device has what is settled before the parts that this leaves out.
    flags = (
        "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    environment = {**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def seen(folder) -> dict:
    return json.loads((folder / "seen.json").read_text())


@pytest.fixture(scope="module")
def arrays(folder) -> dict:
    with np.load(folder / "arrays.npz") as arrays:
        return dict(arrays)


def in_each_layer(layouts: dict) -> dict:
    return {f"transformer_layer_{i}/{name}": axes for i in range(2) for name, axes in layouts.items()}


@pytest.mark.backend_independent
def test_layouts_of_a_loaded_model(seen):
    assert seen["grouped"]["layouts"] == EMBEDDING | in_each_layer(LAYER)


@pytest.mark.backend_independent
def test_key_value_heads_that_the_devices_do_not_divide_are_whole_on_each(seen):
    expected = EMBEDDING | in_each_layer(LAYER | ONE_KEY_VALUE_HEAD)
    del expected["token_embedding/reverse_embeddings"]
    assert seen["one key/value head, tied"]["layouts"] == expected


@pytest.mark.backend_independent
def test_layouts_of_lora_matrices(seen):
    assert seen["lora"] == EMBEDDING | LORA_OF_THE_EMBEDDING | in_each_layer(LAYER | LORA)


@pytest.mark.backend_independent
def test_what_quantisation_adds_is_whole_on_each_device(seen):
    expected = {name: axes for name, axes in LAYER.items() if name.startswith("self_attention/")}
    expected |= {f"self_attention/query/{name}": axes for name, axes in QUERY_IN_INT8.items()}
    expected |= {f"self_attention/key/{name}": axes for name, axes in KEY_IN_FLOAT8.items()}
    assert seen["quantized"] == {f"transformer_layer_0/{name}": axes for name, axes in expected.items()}


@pytest.mark.backend_independent
def test_each_pattern_matches_a_weight_and_no_weight_matches_two(seen):
    patterns = list(kllama.LlamaBackbone.get_layout_map(mesh_of_one()))
    matches = {path: [pattern for pattern in patterns if re.fullmatch(pattern, path)] for path in seen["lora"]}
    assert {pattern for found in matches.values() for pattern in found} == set(patterns)
    assert max(map(len, matches.values())) == 1


@pytest.mark.backend_independent
@pytest.mark.parametrize("name", CASES)
def test_a_layer_exchanges_two_sums_and_nothing_else(seen, name):
    found = [(operation, "/".join(path.split("/")[:-2])) for operation, path in seen[name]["exchanges"]]
    assert found == [("all-reduce", "self_attention/attention_output"), ("all-reduce", "feedforward_output_dense")]


@pytest.mark.backend_independent
@pytest.mark.parametrize("name", CASES)
def test_two_devices_compute_what_one_does(seen, arrays, name):
    np.testing.assert_allclose(arrays[f"{name} spread"], arrays[f"{name} alone"], atol=1e-5)
    assert seen[name]["spread"] == seen[name]["alone"]


@pytest.mark.backend_independent
def test_two_devices_train_as_one_does(seen, arrays):
    assert seen["loss spread"] == pytest.approx(seen["loss alone"], rel=1e-5)
    for path in seen["trained"]:
        np.testing.assert_allclose(arrays[f"{path} spread"], arrays[f"{path} alone"], atol=1e-5)


@pytest.mark.backend_independent
def test_training_keeps_the_layouts_and_gives_them_to_the_optimizer(seen):
    assert seen["trained"] == seen["grouped"]["layouts"]
    assert seen["momenta"] == list(seen["trained"].values())


# Arguments


def mesh_of_one(*axis_names: str) -> keras.distribution.DeviceMesh:
    return keras.distribution.DeviceMesh((1, 1), axis_names or ("batch", "model"), devices=["cpu:0"])


def test_only_jax_distributes_weights():
    is_jax = keras.config.backend() == "jax"
    with contextlib.nullcontext() if is_jax else pytest.raises(UnsupportedError, match="expected 'jax'"):
        kllama.LlamaBackbone.get_layout_map(mesh_of_one())


@pytest.mark.backend_independent
def test_the_axes_may_have_any_name():
    layout_map = kllama.LlamaBackbone.get_layout_map(mesh_of_one("rows", "columns"), "rows", "columns")
    assert layout_map["transformer_layer_11/self_attention/query/kernel"].axes == ("columns", "rows", None)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    "mesh, arguments, error, message",
    [
        (None, {}, ValueError, "device_mesh = None"),
        (("a", "batch"), {}, ValueError, "model_parallel_dim_name = 'model'; expected one of the mesh's axes"),
        (("a", "model"), {}, ValueError, "data_parallel_dim_name = 'batch'; expected one of the mesh's axes"),
        (("batch", "model"), {"num_key_value_heads": 0}, ValueError, "num_key_value_heads"),
        (("batch", "model"), {"num_key_value_heads": 2.0}, TypeError, "num_key_value_heads"),
    ],
)
def test_wrong_arguments(mesh, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        kllama.LlamaBackbone.get_layout_map(mesh and mesh_of_one(*mesh), **arguments)
