"""`export_to_transformers`: what goes out comes back unchanged, and transformers computes the same with it."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import kllama
from kllama.checkpoints.files.reader import SafetensorsFile
from kllama.errors import CheckpointError, UnsupportedError
from kllama.models.weights import assign_weights, uninitialized_weights
from tests import oracle

GOLDENS = ["hf_tiny/llama_attention_bias", "hf_tiny/mistral_sliding_window", "hf_layouts/llama_bfloat16"]
TOLERANCE = 1e-5  # of max |difference| / max |logit|
BACKBONE = {
    "vocabulary_size": 60,
    "num_layers": 2,
    "num_query_heads": 4,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "num_key_value_heads": 2,
    "layer_norm_epsilon": 1e-4,
    "rope_max_wavelength": 300,
    "max_sequence_length": 24,
}
QKV = {"attention_bias": True, "attention_output_bias": False}
MIXED = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
ORIGINAL = {"original_max_position_embeddings": 6}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 9.0], **ORIGINAL}
KINDS = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 6, "activation": "gelu_new"},
    "tied": {"tie_word_embeddings": True, "rope_scaling_factor": 2},
    "mistral": {"sliding_window": 3},
    "odd heads": {"hidden_dim": 18, "head_dim": 4},
    "qwen2": {**QKV, **MIXED, "head_dim": 6},
    "qwen3": {"qk_norm": True, "attention_bias": True, **MIXED},
    "longrope": {"rope_scaling": LONGROPE | {"factor": 9}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", **ORIGINAL}},
}
IDS = np.random.default_rng(0).integers(0, 60, (2, 9))


def make_model(**arguments) -> kllama.LlamaCausalLM:
    """Build a model of weights drawn in NumPy: on JAX, each shape that is drawn is a program to compile."""
    rng = np.random.default_rng(0)
    with uninitialized_weights():
        backbone = kllama.LlamaBackbone(**BACKBONE | arguments)
    assign_weights(
        backbone, [(weight.path, oracle.random_weight(weight.path, weight.shape, rng)) for weight in backbone.weights]
    )
    return kllama.LlamaCausalLM(backbone)


def run(model) -> np.ndarray:
    return ops.convert_to_numpy(ops.cast(model({"token_ids": IDS, "padding_mask": None}), "float32"))


def values(model) -> dict:
    return {weight.path: ops.convert_to_numpy(weight) for weight in model.weights}


def check_same(model, other) -> None:
    """Compare configurations and weights, bit by bit."""
    mine, theirs = (item.get_config() for item in (model.backbone, other.backbone))
    assert mine | {"name": ""} == theirs | {"name": ""}
    check_same_weights(model, other)


def check_same_weights(model, other) -> None:
    mine, theirs = values(model), values(other)
    assert list(mine) == list(theirs)
    for path, array in mine.items():
        assert array.dtype == theirs[path].dtype and array.tobytes() == theirs[path].tobytes(), path


@pytest.fixture(scope="module")
def transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    return transformers


def run_theirs(transformers, folder, auto="AutoModelForCausalLM") -> np.ndarray:
    """Open a directory with transformers, which must find exactly its tensors there, and give its output."""
    import torch

    options = {"output_loading_info": True, "dtype": "auto", "attn_implementation": "eager"}
    model, found = getattr(transformers, auto).from_pretrained(folder, **options)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS))[0].float().numpy()


class TestRoundTrip:
    @pytest.mark.parametrize("name", GOLDENS)  # the others' files are compared in tests/checkpoints
    def test_goldens(self, assets, tmp_path, name):
        model = kllama.LlamaCausalLM.from_preset(assets / "goldens" / name)
        model.export_to_transformers(tmp_path / "out")
        check_same(model, kllama.LlamaCausalLM.from_preset(tmp_path / "out"))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_stories260k(self, assets, tmp_path, dtype):
        model = kllama.LlamaCausalLM.from_preset(assets / "models" / "stories260K", dtype=dtype)
        model.export_to_transformers(tmp_path / "out")
        other = kllama.LlamaCausalLM.from_preset(tmp_path / "out")
        check_same(model, other)
        assert other.generation_config == model.generation_config == {"stop_token_ids": [1, 2]}
        mine, theirs = model.preprocessor, other.preprocessor
        assert mine.add_start_token == theirs.add_start_token
        assert mine.prompt_rows(["Once", ""]) == theirs.prompt_rows(["Once", ""])

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_another_dtype(self, tmp_path, dtype):
        model = make_model()
        model.export_to_transformers(tmp_path / "out", dtype=dtype)
        other = kllama.LlamaCausalLM.from_preset(tmp_path / "out")
        theirs = values(other)
        for path, array in values(model).items():
            np.testing.assert_array_equal(theirs[path], array.astype(theirs[path].dtype))
        assert {str(array.dtype) for array in theirs.values()} == {dtype}

    def test_mixed_precision_keeps_its_float32_variables(self, tmp_path):
        model = make_model(dtype="mixed_bfloat16")
        model.export_to_transformers(tmp_path / "out")
        other = kllama.LlamaCausalLM.from_preset(tmp_path / "out", dtype="mixed_bfloat16")
        check_same(model, other)

    def test_generation_settings(self, tmp_path):
        settings = {"stop_token_ids": [5, 9], "do_sample": True, "temperature": 0.5, "top_p": 0.9}
        model = kllama.LlamaCausalLM(make_model().backbone, generation_config=settings)
        model.export_to_transformers(tmp_path / "out")
        assert kllama.LlamaCausalLM.from_preset(tmp_path / "out").generation_config == settings


class TestTransformers:
    @pytest.mark.parametrize("kind", KINDS)
    def test_logits(self, transformers, tmp_path, kind):
        model = make_model(**KINDS[kind])
        model.export_to_transformers(tmp_path / "out")
        expected = oracle.logits(values(model), model.backbone.get_config(), IDS)
        assert oracle.relative_error(run_theirs(transformers, tmp_path / "out"), expected) < TOLERANCE
        check_same_weights(model, kllama.LlamaCausalLM.from_preset(tmp_path / "out"))

    @pytest.mark.parametrize("kind", ["llama", "tied", "qwen3"])
    def test_a_backbone_is_a_base_model(self, transformers, tmp_path, kind):
        """An untied head stays behind, and nobody takes the directory for a language model."""
        backbone = make_model(**KINDS[kind]).backbone
        backbone.export_to_transformers(tmp_path / "out")
        theirs = run_theirs(transformers, tmp_path / "out", "AutoModel")
        expected = oracle.hidden_states(values(backbone), backbone.get_config(), IDS)
        assert oracle.relative_error(theirs, expected) < TOLERANCE
        back = values(kllama.LlamaBackbone.from_preset(tmp_path / "out"))
        mine = values(backbone)
        mine.pop("token_embedding/reverse_embeddings", None)
        assert list(back) == list(mine) and all(np.array_equal(back[path], mine[path]) for path in mine)
        if not backbone.tie_word_embeddings:
            with pytest.raises(CheckpointError, match="lm_head.weight is missing"):
                kllama.LlamaCausalLM.from_preset(tmp_path / "out")

    def test_shards(self, transformers, tmp_path):
        model = make_model()
        model.export_to_transformers(tmp_path / "out", max_shard_size=5e-6)
        files = sorted((tmp_path / "out").glob("*.safetensors"))
        total = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        assert len(files) > 2 and total == 4 * model.count_params()
        run_theirs(transformers, tmp_path / "out")
        check_same(model, kllama.LlamaCausalLM.from_preset(tmp_path / "out"))

    def test_greedy_text(self, transformers, assets, tmp_path):
        """Of stories260K: tokenizer, start token and stop ids, by the files alone."""
        model = kllama.LlamaCausalLM.from_preset(assets / "models" / "stories260K", dtype="float32")
        model.export_to_transformers(tmp_path / "out")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert theirs.generation_config.eos_token_id == [1, 2]
        inputs = tokenizer("Lily and Tim", return_tensors="pt")
        ids = theirs.generate(**inputs, max_new_tokens=6, pad_token_id=0)[0]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text == model.generate("Lily and Tim", max_new_tokens=6, temperature=0)

    @pytest.mark.slow
    def test_version_4(self, tmp_path):
        """In a process of its own, with the folder that TRANSFORMERS_4 names before all others."""
        if "TRANSFORMERS_4" not in os.environ:
            pytest.skip("TRANSFORMERS_4 does not name a folder with version 4 of transformers")
        models = {kind: make_model(**arguments) for kind, arguments in KINDS.items()}
        for kind, model in models.items():
            model.export_to_transformers(tmp_path / kind)
        np.save(tmp_path / "ids.npy", IDS)
        script = (
            "import sys, numpy, torch, transformers\n"
            "assert transformers.__version__.startswith('4.')\n"
            "for kind in sys.argv[2:]:\n"
            "    model = transformers.AutoModelForCausalLM.from_pretrained(f'{sys.argv[1]}/{kind}')\n"
            "    ids = torch.tensor(numpy.load(f'{sys.argv[1]}/ids.npy'))\n"
            "    numpy.save(f'{sys.argv[1]}/{kind}.npy', model(ids).logits.detach().numpy())\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.environ["TRANSFORMERS_4"]}
        subprocess.run([sys.executable, "-c", script, str(tmp_path), *KINDS], check=True, env=environment)
        for kind, model in models.items():
            assert oracle.relative_error(np.load(tmp_path / f"{kind}.npy"), run(model)) < TOLERANCE, kind


class TestAdaptedAndQuantised:
    TARGETS = ["query", "attention_output", "feedforward_gate_dense", "token_embedding"]
    # The inputs of the layers stay as they are, so that float layers with the same kernels give the same.
    WEIGHTS_ONLY = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)

    @pytest.mark.parametrize("quantised, tied", [(False, False), (True, True)])
    def test_lora_is_merged(self, tmp_path, quantised, tied):
        model = make_model(tie_word_embeddings=tied)
        if quantised:
            model.quantize(config=self.WEIGHTS_ONLY)
        model.backbone.enable_lora(3, self.TARGETS)
        for layer in model._flatten_layers():
            if getattr(layer, "lora_enabled", False):
                layer.lora_alpha = 5
        for weight in model.weights:
            if "/lora_" in weight.path:
                weight.assign(oracle.random_weight(weight.path, weight.shape, np.random.default_rng(1)))
        before = values(model)
        model.export_to_transformers(tmp_path / "out")
        other = kllama.LlamaCausalLM.from_preset(tmp_path / "out")
        assert oracle.relative_error(run(other), run(model)) < TOLERANCE
        after = values(model)
        assert all(np.array_equal(before[path], after[path]) for path in before)

    @pytest.mark.parametrize("tied", [False, True])
    def test_int8_codes_become_floats(self, tmp_path, tied):
        model = make_model(tie_word_embeddings=tied, attention_bias=True)
        floats = values(model)
        model.quantize("int8")
        model.export_to_transformers(tmp_path / "out")
        for path, array in values(
            kllama.LlamaCausalLM.from_preset(tmp_path / "out")
        ).items():  # each value is within half a step of what was quantised
            assert array.dtype == "float32"
            assert np.max(np.abs(array - floats[path])) <= 0.51 * np.max(np.abs(floats[path])) / 127, path

    def test_int8_of_bfloat16_stays_bfloat16(self, tmp_path):
        model = make_model(dtype="bfloat16")
        model.quantize("int8", filters="query")
        model.export_to_transformers(tmp_path / "out")
        files = SafetensorsFile(tmp_path / "out" / "model.safetensors")
        assert {tensor.dtype for tensor in files.tensors.values()} == {"BF16"}

    def test_float8_has_float_kernels(self, tmp_path):
        model = make_model()
        floats = values(model)
        model.quantize("float8")
        model.export_to_transformers(tmp_path / "out")
        for path, array in values(kllama.LlamaCausalLM.from_preset(tmp_path / "out")).items():
            np.testing.assert_array_equal(array, floats[path])

    def test_int4_is_refused(self, tmp_path):
        model = make_model()
        model.quantize("int4", filters="query")
        with pytest.raises(UnsupportedError, match="quantization_mode = 'int4'; expected int8 or none"):
            model.export_to_transformers(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


class TestArguments:
    def test_a_directory_is_replaced_whole_or_not_at_all(self, tmp_path):
        model = make_model()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(ValueError, match="overwrite=True"):
            model.export_to_transformers(tmp_path / "out")
        model.export_to_transformers(tmp_path / "out", overwrite=True)
        check_same(model, kllama.LlamaCausalLM.from_preset(tmp_path / "out"))

    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"dtype": "float64"}, ValueError, "dtype .'float64'. must be one of float32, float16, bfloat16"),
            ({"dtype": "int8"}, ValueError, "dtype"),
            ({"max_shard_size": 0}, ValueError, "max_shard_size .0. must be a positive number of GB"),
            ({"max_shard_size": "5GB"}, TypeError, "max_shard_size .'5GB'. must be a number"),
        ],
    )
    def test_wrong_arguments_write_nothing(self, tmp_path, arguments, error, message):
        with pytest.raises(error, match=message):
            make_model().export_to_transformers(tmp_path / "out", **arguments)
        assert list(tmp_path.iterdir()) == []

    def test_values_too_large_for_the_dtype_write_nothing(self, tmp_path):
        model = make_model()
        model.backbone.layer_norm.scale.assign(np.full(16, 1e5))
        with pytest.raises(CheckpointError, match="model.norm.weight in float16 = NaN or infinity in 16 of 16"):
            model.export_to_transformers(tmp_path / "out", dtype="float16")
        assert list(tmp_path.iterdir()) == []

    def test_flags_without_a_class_write_nothing(self, tmp_path):
        with pytest.raises(UnsupportedError, match="expected a combination"):
            make_model(attention_bias=True, sliding_window=3).export_to_transformers(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_dropout_on_the_attention_output_is_left_out_with_a_warning(self, tmp_path):
        model = make_model(dropout=0.1, attention_dropout=0.2)
        with pytest.warns(UserWarning, match="dropout = 0.1 is left out") as caught:
            model.export_to_transformers(tmp_path / "out")
        assert caught[0].filename == __file__
        other = kllama.LlamaCausalLM.from_preset(tmp_path / "out").backbone
        assert (other.dropout, other.attention_dropout) == (0, 0.2)

    def test_more_tokens_than_rows_are_refused(self, assets, tmp_path):
        model = kllama.LlamaCausalLM.from_preset(assets / "models" / "stories260K")
        model.preprocessor.tokenizer.add_tokens(["<new>"])
        with pytest.raises(ValueError, match="resize_vocabulary"):
            model.export_to_transformers(tmp_path / "out")

    def test_in_the_middle_of_fit(self, tmp_path):
        """A callback exports what the model is then; on JAX Keras keeps the variables elsewhere meanwhile."""
        model = make_model()

        class Export(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                model.export_to_transformers(tmp_path / str(batch))

        model.compile(optimizer=keras.optimizers.SGD(0.1))
        model.fit({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}, batch_size=2, verbose=0, callbacks=[Export()])
        check_same(model, kllama.LlamaCausalLM.from_preset(tmp_path / "0"))
