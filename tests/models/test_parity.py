"""Logits against the reference: recorded ones, and live ones of transformers over the whole configuration."""

import functools
import itertools
import json

import keras
import numpy as np
import pytest
from keras import ops

import kllama
from kllama.core.rope_scaling import ROPE_TYPES
from kllama.models.weights import assign_weights, uninitialized_weights
from tests import oracle

TOLERANCE = 1e-4  # of max |difference| / max |logit|, over real positions

HF_TINY = [
    "llama_attention_bias",
    "llama_gelu",
    "llama_gqa",
    "llama_head_dim",
    "llama_mha",
    "llama_mlp_bias",
    "llama_rope_dynamic",
    "llama_rope_linear",
    "llama_rope_llama3",
    "llama_rope_llama3_v4config",
    "llama_rope_yarn",
    "llama_rope_yarn_v4config",
    "llama_tied",
    "mistral_sliding_window",
    "qwen2",
]
HF_LAYOUTS = ["llama_bfloat16", "llama_sharded"]
CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
GOLDENS = [f"hf_tiny/{name}" for name in HF_TINY] + [f"hf_layouts/{name}" for name in HF_LAYOUTS]


def run(model, token_ids, padding_mask=None) -> np.ndarray:
    """Call a model directly."""
    return ops.convert_to_numpy(model({"token_ids": token_ids, "padding_mask": padding_mask}))


def predict(model, token_ids, padding_mask) -> np.ndarray:
    """Call it through the compiled program of `predict`."""
    return model.predict({"token_ids": token_ids, "padding_mask": padding_mask}, verbose=0)


def cross_entropy(logits, token_ids) -> float:
    """The mean loss of each token but the first, in nats."""
    logits = np.asarray(logits, "float64")[:, :-1]
    chosen = np.take_along_axis(logits, np.asarray(token_ids)[:, 1:, None], axis=-1)[..., 0]
    return float(np.mean(np.log(np.exp(logits - logits.max()).sum(-1)) + logits.max() - chosen))


def hidden_states(backbone, token_ids, padding_mask=None) -> list[np.ndarray]:
    """The embeddings, the output of each layer, and as the last entry the output of the final normalization."""
    layers = [backbone.token_embedding, *backbone.transformer_layers[:-1], backbone.layer_norm]
    outputs = {layer.name: backbone.get_layer(layer.name).output for layer in layers}
    model = keras.Model(backbone.inputs, outputs)
    states = model({"token_ids": token_ids, "padding_mask": padding_mask})
    return [ops.convert_to_numpy(states[layer.name]) for layer in layers]


@pytest.fixture
def load(assets):
    """Opens a golden: (model in float32, what was recorded)."""

    @functools.cache
    def open_golden(name):
        model = kllama.LlamaCausalLM.from_preset(assets / "goldens" / name, dtype="float32")
        with np.load(assets / "goldens" / name / "expected.npz") as expected:
            return model, dict(expected)

    return open_golden


class TestGoldens:
    def test_every_one_that_kllama_reads_is_named(self, assets):
        found = {
            str(path.parent.relative_to(assets / "goldens"))
            for path in itertools.chain(
                *((assets / "goldens" / folder).glob("*/config.json") for folder in ("hf_tiny", "hf_layouts"))
            )
            if json.loads(path.read_text())["architectures"][0] in CLASSES
        }
        assert found == set(GOLDENS)

    @pytest.mark.parametrize("name", GOLDENS)
    def test_logits(self, load, name):
        """Three rows: whole, padded on the left, padded on the right."""
        model, expected = load(name)
        token_ids, mask = expected["input_ids"], expected["attention_mask"]
        for call in (run, predict):
            logits = call(model, token_ids, mask)
            assert logits.dtype == "float32"
            for row in range(len(mask)):
                error = oracle.relative_error(logits[row], expected["logits"][row], mask[row])
                assert error < TOLERANCE, (call.__name__, row)
        if "logits_row0_alone" in expected:
            alone = run(model, token_ids[:1])
            assert oracle.relative_error(alone, expected["logits_row0_alone"]) < TOLERANCE
            assert cross_entropy(alone, token_ids[:1]) == pytest.approx(float(expected["loss_row0"]), abs=1e-4)

    @pytest.mark.parametrize("name", ["hf_tiny/llama_gqa", "hf_tiny/llama_rope_yarn"])
    def test_hidden_states(self, load, name):
        model, expected = load(name)
        states = hidden_states(model.backbone, expected["input_ids"], expected["attention_mask"])
        assert len(states) == len(expected["hidden_states"])
        for layer, (state, reference) in enumerate(zip(states, expected["hidden_states"], strict=True)):
            assert oracle.relative_error(state, reference, expected["attention_mask"]) < TOLERANCE, layer

    def test_loss_of_fit_is_the_recorded_one(self, load):
        model, expected = load("hf_tiny/llama_gqa")
        results = model.evaluate(expected["input_ids"][:1], verbose=0, return_dict=True)
        assert results["loss"] == pytest.approx(float(expected["loss_row0"]), abs=1e-4)


class TestStories:
    def test_260k(self, assets):
        folder = assets / "models" / "stories260K"
        model = kllama.LlamaCausalLM.from_preset(folder)
        with np.load(folder / "expected" / "forward.npz") as expected:
            assert oracle.relative_error(run(model, expected["input_ids"]), expected["logits"]) < TOLERANCE
            states = hidden_states(model.backbone, expected["input_ids"])
            for layer, (state, reference) in enumerate(zip(states, expected["hidden_states"], strict=True)):
                assert oracle.relative_error(state, reference) < TOLERANCE, layer
            loss = cross_entropy(run(model, expected["loss_ids"]), expected["loss_ids"])
            assert loss == pytest.approx(float(expected["loss"]), abs=1e-4)

    def test_15m(self, assets):
        folder = assets / "models" / "stories15M"
        model = kllama.LlamaCausalLM.from_preset(folder)
        with np.load(folder / "expected" / "forward.npz") as expected:
            logits = run(model, expected["input_ids"])[0, -1]
            assert oracle.relative_error(logits, expected["logits_last"]) < TOLERANCE


def draw_rope(rng, rope_type: str, head_dim: int) -> dict:
    """Draw `rope_parameters` of a type, every key given, with lengths that 13 positions go beyond."""

    def number(low, high):
        return float(rng.uniform(low, high))

    original = int(rng.integers(5, 10))
    parameters = {
        "default": {},
        "linear": {"factor": number(1.5, 8)},
        "dynamic": {"factor": number(1.5, 8)},
        "llama3": {
            "factor": number(4, 32),
            "low_freq_factor": number(0.1, 0.5),
            "high_freq_factor": number(1, 2),
            "original_max_position_embeddings": original,
        },
        "yarn": {
            "factor": number(2, 8),
            "original_max_position_embeddings": original * 8,
            "beta_fast": number(5, 20),
            "beta_slow": number(0.2, 1),
            "mscale": number(0.5, 1),
            "mscale_all_dim": number(1.1, 2),
            "truncate": bool(rng.integers(2)),
        },
        "longrope": {
            "factor": number(2, 8),
            "original_max_position_embeddings": original,
            "short_factor": np.sort(rng.uniform(1, 2, head_dim // 2)).tolist(),
            "long_factor": np.sort(rng.uniform(3, 9, head_dim // 2)).tolist(),
        },
    }[rope_type]
    return {"rope_type": rope_type, "rope_theta": number(50, 9000), **parameters}


def draw_config(seed: int) -> dict:
    """Draw a tiny `LlamaConfig`: every seventh of the rope types and activations, all else at random."""
    rng = np.random.default_rng(seed)
    activations = ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"]
    rope_types = ["default", *ROPE_TYPES]
    num_heads, num_groups = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (6, 2), (6, 3)][seed % 8]
    head_dim = int(rng.choice([4, 6, 10, 12]))
    return {
        "vocab_size": 31,
        "hidden_size": num_heads * int(rng.choice([5, 7, 8])),  # 5 and 7: head_dim is never D / N
        "intermediate_size": int(rng.integers(9, 30)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_groups,
        "head_dim": head_dim,
        "hidden_act": activations[(seed + seed // 6) % 6],
        "rms_norm_eps": float(10 ** rng.uniform(-6, -1)),
        "tie_word_embeddings": bool(seed // 2 % 2),
        "attention_bias": bool(seed // 3 % 2),
        "mlp_bias": bool(seed // 4 % 2),
        "max_position_embeddings": int(rng.integers(10, 13)),
        "rope_parameters": draw_rope(rng, rope_types[seed % 6], head_dim),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }


class TestAgainstTransformers:
    """N3: every field of the configuration, off its default, on models drawn at random."""

    SEEDS = range(24)
    MASK = np.array([[1] * 13, [0] * 4 + [1] * 9, [1] * 8 + [0] * 5])

    @pytest.fixture
    def transformers(self):
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        torch.set_num_threads(1)
        return transformers

    def test_the_draws_cover_every_choice(self):
        drawn = [draw_config(seed) for seed in self.SEEDS]
        chosen = {key: {json.dumps(config[key]) for config in drawn} for key in drawn[0]}
        assert {config["rope_parameters"]["rope_type"] for config in drawn} == {"default", *ROPE_TYPES}
        assert len(chosen["hidden_act"]) == 6
        assert all(len(chosen[key]) == 2 for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"))
        groups = {(config["num_attention_heads"], config["num_key_value_heads"]) for config in drawn}
        assert any(k == 1 < n for n, k in groups) and any(k == n > 1 for n, k in groups)
        assert any(1 < k < n for n, k in groups)
        assert any(c["head_dim"] * c["num_attention_heads"] != c["hidden_size"] for c in drawn)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_llama(self, transformers, tmp_path, seed):
        self.check(transformers, tmp_path, "Llama", draw_config(seed), seed)

    @pytest.mark.parametrize(
        "name, seed, changes",
        [
            ("Mistral", 4, {"sliding_window": 6}),
            ("Mistral", 6, {"sliding_window": None}),
            ("Qwen2", 4, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
            ("Qwen3", 4, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
            ("Qwen3", 7, {"attention_bias": False}),
        ],
    )
    def test_others_of_its_shape(self, transformers, tmp_path, name, seed, changes):
        config = draw_config(seed) | {"num_hidden_layers": 2, "mlp_bias": False}
        config["attention_bias"] &= name == "Qwen3"  # no other has the key
        config |= {"hidden_size": config["num_attention_heads"] * config["head_dim"]} if name == "Qwen2" else {}
        self.check(transformers, tmp_path, name, config | changes, seed)

    def check(self, transformers, tmp_path, name, config, seed):
        import torch

        config = getattr(transformers, f"{name}Config")(**config, attn_implementation="eager")
        reference = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        torch.manual_seed(seed)
        for name, parameter in reference.named_parameters():
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.3)
        reference.save_pretrained(tmp_path)
        model = kllama.LlamaCausalLM.from_preset(tmp_path, dtype="float32")
        token_ids = np.random.default_rng(seed).integers(0, 31, self.MASK.shape)
        with torch.no_grad():
            expected = reference(
                torch.tensor(token_ids), attention_mask=torch.tensor(self.MASK), use_cache=False
            ).logits.numpy()
        assert oracle.relative_error(run(model, token_ids, self.MASK), expected, self.MASK) < TOLERANCE


BASE = {
    "vocabulary_size": 31,
    "num_layers": 2,
    "num_query_heads": 4,
    "hidden_dim": 20,
    "intermediate_dim": 12,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_max_wavelength": 300.0,
    "layer_norm_epsilon": 0.01,
    "attention_bias": True,
    "mlp_bias": True,
    "max_sequence_length": 9,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
    "mscale": 0.5,
    "mscale_all_dim": 1.5,
    "truncate": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.2,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 9,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
LINEAR = {"rope_type": "linear", "factor": 3.0}

# (arguments beside BASE, changes): the weights stay what they are, so only the changed argument can change the output.
CHANGES = [
    ({}, {"num_query_heads": 2, "head_dim": 16, "num_key_value_heads": 1}),
    ({}, {"num_query_heads": 8, "head_dim": 4, "num_key_value_heads": 4}),
    ({}, {"rope_max_wavelength": 301.0}),
    ({}, {"layer_norm_epsilon": 0.011}),
    ({}, {"activation": "gelu"}),
    ({"activation": "gelu"}, {"activation": "gelu_new"}),
    ({"activation": "relu"}, {"activation": "relu2"}),
    ({}, {"attention_bias": False, "attention_output_bias": True}),
    ({}, {"attention_output_bias": False}),
    ({}, {"qk_norm": True}),
    ({}, {"sliding_window": 11}),
    ({"sliding_window": 11}, {"sliding_window": 10}),
    ({"sliding_window": 3}, {"layer_types": ["full_attention", "sliding_attention"]}),
    ({}, {"mlp_bias": False}),
    ({}, {"tie_word_embeddings": True}),
    ({}, {"num_layers": 1}),
    ({}, {"rope_scaling_factor": 1.1}),
    *[({}, {"rope_scaling": scaling}) for scaling in (LINEAR, DYNAMIC, YARN, LLAMA3, LONGROPE)],
    ({"rope_scaling": LINEAR}, {"rope_scaling": LINEAR | {"factor": 3.1}}),
    ({"rope_scaling": DYNAMIC}, {"rope_scaling": DYNAMIC | {"factor": 3.1}}),
    ({"rope_scaling": DYNAMIC}, {"max_sequence_length": 8}),
    *[
        ({"rope_scaling": scaling}, {"rope_scaling": scaling | {key: value}})
        for scaling, changes in (
            (
                YARN,
                {
                    "factor": 4.2,
                    "original_max_position_embeddings": 80,
                    "beta_fast": 3.0,
                    "beta_slow": 2.0,
                    "mscale": 0.6,
                    "mscale_all_dim": 1.6,
                    "truncate": True,
                    "attention_factor": 0.9,
                },
            ),
            (
                LLAMA3,
                {
                    "factor": 8.5,
                    "low_freq_factor": 0.25,
                    "high_freq_factor": 2.2,
                    "original_max_position_embeddings": 17,
                },
            ),
            (
                LONGROPE,
                {
                    "factor": 4.2,
                    "original_max_position_embeddings": 13,
                    "long_factor": [2.0, 3.0, 4.0, 5.5],
                    "attention_factor": 0.9,
                },
            ),
            (LONGROPE | {"original_max_position_embeddings": 12}, {"short_factor": [1.0, 1.2, 1.5, 2.5]}),
        )
        for key, value in changes.items()
    ],
]


def describe(value) -> str:
    scaling = value.get("rope_scaling")
    return "-".join(value) if scaling is None else scaling["rope_type"]


TOKEN_IDS = np.random.default_rng(0).integers(0, 31, (2, 12))


@functools.cache
def compute_logits(arguments: str) -> np.ndarray:
    """Run the model of these arguments (JSON)."""
    with uninitialized_weights():
        backbone = kllama.LlamaBackbone(**json.loads(arguments))
    assign_weights(backbone, [(weight.path, draw_weight(weight.path, weight.shape)) for weight in backbone.weights])
    states = backbone({"token_ids": TOKEN_IDS, "padding_mask": None})
    return ops.convert_to_numpy(backbone.token_embedding(states, reverse=True))


def draw_weight(path: str, shape) -> np.ndarray:
    rng = np.random.default_rng(list(path.encode()))
    return rng.normal(float(path.endswith("scale")), 0.3, int(np.prod(shape))).reshape(shape)


class TestEveryArgumentHasAnEffect:
    """N3: a field without an effect on the output is one that is not read."""

    def logits(self, arguments):
        """Run a model whose weights depend on their names alone, in the flat order of the checkpoint's matrices."""
        return compute_logits(json.dumps(BASE | arguments))

    @pytest.mark.parametrize("arguments, changes", CHANGES, ids=describe)
    def test_changed(self, arguments, changes):
        error = oracle.relative_error(self.logits(arguments | changes), self.logits(arguments))
        assert error > 1e-4

    def test_unchanged(self):
        """The other half of the proof: the same arguments give the same logits, and so does a default spelled out."""
        logits = self.logits({})
        for same in ({}, {"activation": "swish"}, {"rope_scaling_factor": 1}, {"max_sequence_length": 10}):
            assert oracle.relative_error(self.logits(same), logits) < 1e-6

    def test_dropout_has_an_effect_in_training(self):
        for rate in ("dropout", "attention_dropout"):
            model = kllama.LlamaBackbone(**BASE | {rate: 0.5})
            inputs = {"token_ids": TOKEN_IDS, "padding_mask": None}
            plain, dropped = (ops.convert_to_numpy(model(inputs, training=training)) for training in (False, True))
            assert oracle.relative_error(dropped, plain) > 1e-2, rate

    def test_initializer_range_is_the_spread_of_the_weights(self):
        backbone = kllama.LlamaBackbone(200, 1, 8, 64, 100, 8, initializer_range=0.7)
        for weight in backbone.weights:
            spread = float(np.std(ops.convert_to_numpy(weight)))
            assert spread == pytest.approx(0.0 if weight.path.endswith("scale") else 0.7, rel=0.06), weight.path

    def test_every_argument_is_covered(self):
        changed = {name for _, changes in CHANGES for name in changes}
        elsewhere = {"dropout", "attention_dropout", "initializer_range"}
        sizes = {"vocabulary_size", "hidden_dim", "intermediate_dim"}  # shapes of weights
        config = set(kllama.LlamaBackbone(**BASE).get_config()) - {"name", "trainable", "dtype"}
        assert config <= changed | elsewhere | sizes
        scalings = [changes["rope_scaling"] for _, changes in CHANGES if "rope_scaling" in changes]
        for rope_type, (required, optional) in ROPE_TYPES.items():
            keys = {key for scaling in scalings if scaling["rope_type"] == rope_type for key in scaling}
            assert {*required, *optional} <= keys, rope_type
