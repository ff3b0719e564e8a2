"""`quantize`: which kernels it reaches, what the quantised model computes, and how it trains, is saved and built."""

import gc
import sys
import types
import warnings
import weakref

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from keras.dtype_policies import DTypePolicyMap

import kllama
from kllama.layers.token_embedding import TokenEmbedding

MODES = ["int8", "int4", "float8"]
SMALL = {
    "vocabulary_size": 40,
    "num_layers": 1,
    "num_query_heads": 4,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "num_key_value_heads": 2,
}
IDS = np.random.default_rng(0).integers(0, 40, (3, 7)).astype("int32")
BATCH = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
PROMPT = {"token_ids": IDS[:, :3]}


def make_backbone(**arguments):
    keras.utils.set_random_seed(5)
    return kllama.LlamaBackbone(**SMALL | {"initializer_range": 0.3} | arguments)


def make_model(**arguments):
    return kllama.LlamaCausalLM(make_backbone(**arguments))


def run(model) -> np.ndarray:
    return ops.convert_to_numpy(ops.cast(model(BATCH), "float32"))


def relative_error(actual, expected) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def dtypes(model) -> dict:
    return {weight.path: str(weight.dtype) for weight in model.weights}


def kernels(model) -> dict:
    """Give the dtypes of the variables that a whole quantisation replaces."""
    names = ("/kernel", "/embeddings", "/reverse_embeddings")
    return {path: dtype for path, dtype in dtypes(model).items() if path.endswith(names)}


def quantize_theirs(model, mode):
    """Quantise a model of KerasHub, which warns of its norms and runs a whole garbage collection for each kernel."""
    gc.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.quantize(mode)
    gc.unfreeze()


def policy_map(backbone, mode) -> DTypePolicyMap:
    """Write a map by hand, as KerasHub's own tests do."""
    kinds = (keras.layers.EinsumDense, TokenEmbedding) if mode != "float8" else keras.layers.EinsumDense
    policies = DTypePolicyMap("float32")
    for layer in backbone._flatten_layers():
        if isinstance(layer, kinds):
            policies[layer.path] = f"{mode}_from_float32"
    return policies


class TestWhatIsQuantised:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("build", [make_model, make_backbone])
    def test_every_kernel_and_nothing_else_without_a_warning(self, build, tied):
        model = build(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
        paths = set(dtypes(model))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.quantize("int8")
        found = kernels(model)
        assert len(found) == 7 + (1 if tied else 2) and set(found.values()) == {"int8"}
        scales = {path.rsplit("/", 1)[0] + "/" + path.rsplit("/", 1)[1] + "_scale" for path in found}
        assert set(dtypes(model)) == paths | scales
        assert {dtype for path, dtype in dtypes(model).items() if path not in found} == {"float32"}

    def test_the_variables_are_those_of_keras_hub(self):
        theirs = keras_hub.models.LlamaBackbone(**SMALL)
        quantize_theirs(theirs, "int8")
        ours = make_backbone()
        ours.quantize("int8")
        facts = [
            # Their feed-forward layers are Dense, whose scales are (F,) where EinsumDense has (1, 1, F).
            {w.path: (tuple(n for n in w.shape if n > 1), str(w.dtype), w.trainable) for w in model.weights}
            for model in (ours, theirs)
        ]
        assert facts[0] == facts[1]

    @pytest.mark.parametrize(
        "filters, count",
        [
            ("query|key", 2),
            (["^value$", "gate"], 2),
            ("token_embedding", 2),
            (lambda layer: layer.path.startswith("transformer_layer_0/"), 7),
        ],
    )
    def test_filters(self, filters, count):
        model = make_model()
        model.quantize("int8", filters=filters)
        assert list(kernels(model).values()).count("int8") == count

    def test_the_rest_can_follow(self):
        model = make_model()
        model.quantize("int8", filters="feedforward")
        model = kllama.LlamaCausalLM(kllama.LlamaBackbone.from_config(model.backbone.get_config()))
        model.quantize("int8", filters=lambda layer: layer.quantization_mode is None)
        assert set(kernels(model).values()) == {"int8"}
        assert kllama.LlamaBackbone.from_config(model.backbone.get_config()).get_config() == model.backbone.get_config()

    def test_float8_leaves_the_embedding(self):
        model = make_model()
        model.quantize("float8")
        assert model.backbone.token_embedding.quantization_mode is None
        assert set(kernels(model).values()) == {"float32"}
        assert sum(path.endswith("inputs_amax_history") for path in dtypes(model)) == 7

    @pytest.mark.parametrize("build", [make_model, make_backbone])
    @pytest.mark.parametrize(
        "arguments, error, words",
        [
            ({"mode": "int3"}, ValueError, ["int3", "int8", "int4", "float8"]),
            ({}, ValueError, ["mode"]),
            ({"mode": "int8", "config": keras.quantizers.Int4QuantizationConfig()}, ValueError, ["int8", "int4"]),
            (
                {"config": keras.quantizers.GPTQConfig(dataset=["a"], tokenizer=len)},
                ValueError,
                ["gptq", "int8", "int4", "float8"],
            ),
            (
                {"config": keras.quantizers.Int8QuantizationConfig(keras.quantizers.AbsMaxQuantizer(axis=0))},
                ValueError,
                ["weight_quantizer", "expected None"],
            ),
            ({"mode": "int8", "filters": 3}, TypeError, ["filters", "3"]),
            ({"mode": "int8", "filters": "querry"}, ValueError, ["filters", "querry"]),
            ({"mode": "float8", "filters": "token_embedding"}, ValueError, ["filters", "float8"]),
            ({"mode": "int8", "wrong": 1}, TypeError, ["wrong"]),
        ],
    )
    def test_bad_arguments_change_nothing(self, build, arguments, error, words):
        model = build()
        with pytest.raises(error) as raised:
            model.quantize(**arguments)
        assert all(word in str(raised.value) for word in words), raised.value
        assert set(dtypes(model).values()) == {"float32"}

    @pytest.mark.parametrize("mode", ["int4", "float8"])
    def test_a_preset_holds_int8_alone(self, mode, tmp_path):
        model = make_model()
        model.quantize(mode)
        with pytest.raises(ValueError, match=f"quantised to {mode}; expected int8"):
            model.save_to_preset(str(tmp_path / "preset"))
        assert not (tmp_path / "preset").exists()

    def test_twice_is_refused_before_anything_changes(self):
        model = make_model()
        model.quantize("int8", filters="query")
        before = dtypes(model)
        with pytest.raises(ValueError, match="query"):
            model.quantize("int8")
        assert dtypes(model) == before

    @pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
    def test_float16_is_refused_for_int8(self, dtype):
        with pytest.raises(ValueError, match="float16"):
            make_backbone(dtype=dtype).quantize("int8")

    def test_a_quantised_vocabulary_does_not_grow(self):
        model = make_model()
        model.quantize("int8")
        with pytest.raises(ValueError, match="token_embedding is quantised"):
            model.resize_vocabulary(50)


class TestWhatItComputes:
    @pytest.mark.parametrize("mode, tolerance", [("int8", 0.06), ("int4", 0.4), ("float8", 0.15)])
    @pytest.mark.parametrize("tied", [False, True])
    def test_logits_are_near_the_float_ones(self, mode, tolerance, tied):
        model = make_model(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
        before = run(model)
        model.quantize(mode)
        assert 1e-4 < relative_error(run(model), before) < tolerance

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("tied", [False, True])
    def test_the_same_as_keras_hub(self, mode, tied):
        ours = make_model(tie_word_embeddings=tied)
        theirs = keras_hub.models.LlamaCausalLM(
            backbone=keras_hub.models.LlamaBackbone(**SMALL, tie_word_embeddings=tied), preprocessor=None
        )
        weights = {weight.path: weight for weight in ours.weights}
        for weight in theirs.weights:
            weight.assign(weights[weight.path])
        quantize_theirs(theirs, mode)
        ours.quantize(mode)
        # Both round activations, and a last bit decides where one falls: most are equal, and the rest are near.
        difference = np.abs(run(ours) - run(theirs))
        assert np.median(difference) < 1e-4 and relative_error(run(ours), run(theirs)) < 0.01

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
    def test_half_precision_keeps_its_dtypes(self, mode, dtype):
        model = make_model(dtype=dtype)
        before = run(model)
        model.quantize(mode)
        assert keras.backend.standardize_dtype(model(BATCH).dtype) == "float32"
        for part in (model.backbone, model.backbone.token_embedding):
            inputs = BATCH if part is model.backbone else IDS
            assert keras.backend.standardize_dtype(part(inputs).dtype) == "bfloat16"
        assert relative_error(run(model), before) < {"int8": 0.06, "int4": 0.4, "float8": 0.15}[mode]

    @pytest.mark.parametrize("lora_first", [False, True])
    @pytest.mark.parametrize("tied", [False, True])
    def test_an_adapted_embedding(self, tied, lora_first):
        """The table and, where it is tied, the head carry the adapter, as in a float model."""
        model = make_model(tie_word_embeddings=tied)
        embedding = model.backbone.token_embedding
        for step in (embedding.enable_lora, None) if lora_first else (None, embedding.enable_lora):
            model.quantize("int8") if step is None else step(2)
        embedding.lora_embeddings_b.assign(np.full((2, 16), 0.2, "float32"))
        expected = make_model(tie_word_embeddings=tied)
        expected.backbone.token_embedding.enable_lora(2)
        expected.backbone.token_embedding.lora_embeddings_a.assign(embedding.lora_embeddings_a)
        expected.backbone.token_embedding.lora_embeddings_b.assign(embedding.lora_embeddings_b)
        assert relative_error(run(model), run(expected)) < 0.06
        assert relative_error(run(make_model(tie_word_embeddings=tied)), run(expected)) > 0.1


class TestRunning:
    @pytest.mark.parametrize("mode", MODES)
    def test_generation_uses_the_quantised_kernels(self, mode):
        model = make_model()
        settings = {"max_new_tokens": 4, "temperature": 0, "stop_token_ids": None}
        model.generate(PROMPT, **settings)
        model.quantize(mode)
        for weight in model.backbone.token_embedding.weights:
            if weight.name.startswith("reverse_embeddings"):
                weight.assign(ops.full(weight.shape, weight.name.endswith("scale"), dtype=weight.dtype))
        assert (model.generate(PROMPT, **settings)["token_ids"][:, 3:] == 0).all()

    def test_generation_agrees_with_the_logits(self):
        model = make_model()
        model.quantize("int8")
        token_ids = model.generate(PROMPT, max_new_tokens=4, temperature=0, stop_token_ids=None)["token_ids"]
        logits = ops.convert_to_numpy(model({"token_ids": token_ids, "padding_mask": None}))[:, 2:-1]
        chosen = np.take_along_axis(logits, token_ids[:, 3:, None], -1)[..., 0]
        assert (chosen > logits.max(-1) - 0.05).all()

    @pytest.mark.parametrize("mode", ["int8", "int4"])
    @pytest.mark.parametrize("lora_first", [False, True])
    def test_lora_trains_a_quantised_model(self, mode, lora_first):
        model = make_model()
        model.compile(optimizer=keras.optimizers.Adam(0.05))
        model.fit(BATCH, epochs=1, verbose=0)  # the optimizer and the compiled steps are the float model's now
        for step in ("lora", "quantize") if lora_first else ("quantize", "lora"):
            model.quantize(mode) if step == "quantize" else model.backbone.enable_lora(2)
        if not lora_first:
            model.compile(optimizer=keras.optimizers.Adam(0.05))  # as Keras asks for after enable_lora
        frozen = {path: weight for path, weight in kernels_of(model).items()}
        before = {path: ops.convert_to_numpy(weight) for path, weight in frozen.items()}
        losses = model.fit(BATCH, epochs=25, verbose=0).history["loss"]
        assert losses[-1] < 0.9 * losses[0]
        for path, weight in frozen.items():
            np.testing.assert_array_equal(ops.convert_to_numpy(weight), before[path])
        assert float(model.optimizer.learning_rate) == pytest.approx(0.05)
        assert model.evaluate(BATCH, verbose=0, return_dict=True)["loss"] < losses[0]
        np.testing.assert_allclose(model.predict(BATCH, verbose=0), run(model), atol=0.05)

    def test_float8_trains_without_lora(self):
        model = make_model()
        model.compile(optimizer=keras.optimizers.Adam(0.02))
        model.quantize("float8")
        losses = model.fit(BATCH, epochs=8, verbose=0).history["loss"]
        assert losses[-1] < 0.9 * losses[0]
        history = model.backbone.transformer_layers[0].self_attention.query.kernel_amax_history
        assert float(ops.max(history)) > 0
        other = make_model()
        other.backbone.enable_lora(2)
        with pytest.raises(ValueError, match="LoRA"):
            other.quantize("float8")

    def test_the_head_passes_the_gradient_of_the_float_head(self):
        """With Keras' own layer almost none comes through, and nothing below the head learns."""
        embedding = TokenEmbedding(30, 8, tie_weights=False)
        embedding.build()
        targets = np.random.default_rng(3).normal(size=(4, 30)).astype("float32")
        x = keras.Variable(np.random.default_rng(4).normal(size=(4, 8)).astype("float32"))

        def slopes():
            """Differentiate sum(targets * logits), by a step of plain gradient descent."""
            probe = Probe(embedding, x)
            probe.compile(optimizer=keras.optimizers.SGD(1.0), loss=lambda y, logits: ops.sum(y * logits, axis=-1))
            before = ops.convert_to_numpy(x)
            probe.fit(np.zeros((4, 1), "float32"), targets, batch_size=4, verbose=0, shuffle=False)
            change = before - ops.convert_to_numpy(x)
            x.assign(before)
            return change

        expected = slopes()
        embedding.quantize("int8")
        assert relative_error(slopes(), expected) < 0.02

    @pytest.mark.parametrize("mode", ["int8", "int4"])
    def test_no_float_kernel_stays_alive(self, mode):
        model = make_model(hidden_dim=32, intermediate_dim=64)
        model.compile(optimizer="sgd")
        model.fit(BATCH, epochs=1, verbose=0)
        model.predict(BATCH, verbose=0)
        model.generate(PROMPT, max_new_tokens=2)
        old = [weakref.ref(weight) for weight in kernels_of(model).values()]
        values = [weakref.ref(weight.value) for weight in kernels_of(model).values()]
        num_bytes = sum(ops.size(weight) * 4 for weight in kernels_of(model).values())
        model.quantize(mode)
        gc.collect()
        assert not [reference for reference in old + values if reference() is not None]
        now = sum(int(ops.size(weight)) for weight in kernels_of(model).values())
        assert now == num_bytes / (4 if mode == "int8" else 8)


class TestBuildingAndSaving:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_config_round_trip(self, mode, tied, dtype):
        model = make_backbone(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True, dtype=dtype)
        model.quantize(mode)
        config = model.get_config()
        revived = kllama.LlamaBackbone.from_config(config)
        assert revived.get_config() == config == model.get_config()
        assert [(w.path, w.shape, w.dtype) for w in revived.weights] == [
            (w.path, w.shape, w.dtype) for w in model.weights
        ]
        revived.set_weights(model.get_weights())
        np.testing.assert_array_equal(run(revived), run(model))

    @pytest.mark.parametrize("mode", ["int8", "float8"])
    def test_a_map_written_by_hand(self, mode):
        policies = policy_map(make_backbone(), mode)
        length = len(policies)
        model = make_backbone(dtype=policies)
        modes = {layer.path: layer.quantization_mode for layer in model._flatten_layers() if layer.path in policies}
        assert len(modes) == length == (8 if mode == "int8" else 7) and set(modes.values()) == {mode}
        quantised = make_backbone()
        quantised.quantize(mode)
        model.set_weights(quantised.get_weights())
        np.testing.assert_array_equal(run(model), run(quantised))
        assert model.get_config() | {"name": ""} == quantised.get_config() | {"name": ""}
        if mode == "float8":
            model.quantize("int8", filters="token_embedding")
        assert len(policies) == length  # the caller's map is left alone

    def test_a_causal_model_comes_back_from_its_config(self):
        model = make_model()
        model.quantize("int8")
        config = model.get_config()
        revived = kllama.LlamaCausalLM.from_config(config)
        assert revived.backbone.get_config() == model.backbone.get_config()
        revived.set_weights(model.get_weights())
        np.testing.assert_array_equal(run(revived), run(model))

    def test_the_config_does_not_hang_on_the_global_policy(self):
        model = make_backbone(dtype="bfloat16")
        model.quantize("int8", filters="query")
        names = [layer.dtype_policy.name for layer in model._flatten_layers()]
        config = model.get_config()
        assert [layer.dtype_policy.name for layer in model._flatten_layers()] == names
        revived = kllama.LlamaBackbone.from_config(config)
        assert dtypes(revived) == dtypes(model)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("tied", [False, True])
    def test_a_keras_file(self, tmp_path, mode, tied):
        model = make_model(tie_word_embeddings=tied, attention_bias=True)
        model.quantize(mode)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(run(loaded), run(model))
        assert dtypes(loaded) == dtypes(model)

    def test_weights_alone(self, tmp_path):
        model, other = make_model(), make_model()
        model.quantize("int8")
        model.save_weights(tmp_path / "model.weights.h5")
        other.backbone.token_embedding._embeddings.assign(ops.zeros((40, 16)))
        other.quantize("int8")
        other.load_weights(tmp_path / "model.weights.h5")
        np.testing.assert_array_equal(run(other), run(model))

    def test_activations_that_no_config_states_are_not_saved(self):
        """Weight-only int8 runs; a file of it would come back as the usual int8, so there is none."""
        model = make_model()
        before = run(model)
        model.quantize(config=keras.quantizers.Int8QuantizationConfig(activation_quantizer=None))
        assert relative_error(run(model), before) < 0.05
        with pytest.raises(ValueError, match="activation_quantizer"):
            model.get_config()

    def test_int4_blocks_come_back(self):
        model = make_backbone()
        model.quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=4))
        revived = kllama.LlamaBackbone.from_config(model.get_config())
        revived.set_weights(model.get_weights())
        np.testing.assert_array_equal(run(revived), run(model))


class TestKerasHubsOwnChecks:
    """What KerasHub's tests ask of each of its backbones."""

    @pytest.fixture
    def test_case(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "grain", types.ModuleType("grain"))  # which these two checks do not use
        from keras_hub.src.tests.test_case import TestCase

        return TestCase()

    def test_quantization(self, test_case):
        test_case.run_quantization_test(make_backbone(), kllama.LlamaBackbone, dict(SMALL), BATCH)

    def test_precision(self, test_case):
        test_case.run_precision_test(kllama.LlamaBackbone, dict(SMALL), BATCH)


class Probe(keras.Model):
    """The head applied to a variable, which is all that is trained."""

    def __init__(self, embedding, x):
        super().__init__()
        self.embedding, self.x = embedding, x
        embedding.trainable = False
        self.built = True

    def call(self, inputs):
        return self.embedding(self.x + 0 * inputs, reverse=True)


def kernels_of(model) -> dict:
    paths = kernels(model)
    return {weight.path: weight for weight in model.weights if weight.path in paths}
