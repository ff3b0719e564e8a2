"""A model comes back from a preset and from a `.keras` file as it was: configs, weights, text, training, sampling."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest

import kllama
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError
from kllama.models.weights import assign_weights, uninitialized_weights

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
VOCABULARY = {
    "version": "1.0",
    "added_tokens": [{"id": i, "content": token, **SPECIAL} for i, token in ((4, "<s>"), (5, "</s>"), (6, "<pad>"))],
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    "model": {"type": "BPE", "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"]},
}

# Every argument of the four classes, and none at its default.
BACKBONE = {
    "vocabulary_size": 7,
    "num_layers": 2,
    "num_query_heads": 4,
    "hidden_dim": 10,
    "intermediate_dim": 12,
    "num_key_value_heads": 2,
    "rope_max_wavelength": 500.0,
    "layer_norm_epsilon": 1e-3,
    "dropout": 0.25,
    "dtype": "mixed_bfloat16",
    "tie_word_embeddings": True,
    "head_dim": 6,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
    },
    "max_sequence_length": 32,
    "attention_bias": True,
    "attention_output_bias": False,
    "qk_norm": True,
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention"],
    "mlp_bias": True,
    "activation": "gelu_new",
    "attention_dropout": 0.125,
    "initializer_range": 0.5,
}
TOKENIZER = {
    "start_token": "<s>",
    "end_token": "</s>",
    "pad_token": "<pad>",
    "parse_special": True,
    "legacy": False,
    "add_prefix_space": True,
    "chat_template": {"default": "{{ messages }}", "tool_use": "llama3.1"},
    "dtype": "int64",
}
PREPROCESSOR = {
    "sequence_length": 9,
    "add_start_token": False,
    "add_end_token": False,
    "loss_on": "all",
    "truncate": "left",
}
GENERATION = {"stop_token_ids": [5, 2], "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9}

SIZES = {
    "vocabulary_size": 7,
    "num_layers": 1,
    "num_query_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "num_key_value_heads": 1,
}
TEXTS = ["abab<s>b", "ba", "a" * 20, ""]
IDS = np.array([[4, 3, 1, 3, 5], [4, 2, 1, 5, 0]], "int32")
INPUTS = {"token_ids": IDS, "padding_mask": (IDS > 0).astype("int32")}


def build(arguments: dict, preprocessor=None, **kwargs) -> kllama.LlamaCausalLM:
    """Build a model with weights from NumPy, which costs no compilation."""
    with uninitialized_weights():
        backbone = kllama.LlamaBackbone(**arguments)
    rng = np.random.default_rng(0)
    assign_weights(backbone, [(weight.path, rng.normal(size=weight.shape)) for weight in backbone.weights])
    return kllama.LlamaCausalLM(backbone, preprocessor, **kwargs)


@pytest.fixture(scope="module")
def model() -> kllama.LlamaCausalLM:
    """A model with every argument off its default. Never changed."""
    tokenizer = kllama.LlamaTokenizer(VOCABULARY, **TOKENIZER, name="teeth")
    preprocessor = kllama.LlamaCausalLMPreprocessor(tokenizer, **PREPROCESSOR, name="paws")
    return build({**BACKBONE, "name": "fox"}, preprocessor, generation_config=GENERATION, name="reynard")


@pytest.fixture(scope="module")
def preset(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("saved") / "preset"
    model.save_to_preset(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def archive(model, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("saved") / "model.keras"
    model.save(file)
    return str(file)


def logits(model) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(INPUTS))


def state(variables) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(variable.value) for variable in variables]


def nameless(config: dict) -> dict:
    """Leave the names of the task, the preprocessor and the tokenizer out of a config."""
    return {
        key: nameless(value) if isinstance(value, dict) and key in ("config", "preprocessor", "tokenizer") else value
        for key, value in config.items()
        if key != "name"
    }


def assert_same_text(actual, expected) -> None:
    """Two preprocessors do the same to texts, in training, before generation, and back."""
    for inputs in (TEXTS, TEXTS[0]):
        for one, other in zip(*(keras.tree.flatten(item(inputs)) for item in (actual, expected)), strict=True):
            np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (one, other)))
    assert actual.tokenizer(TEXTS) == expected.tokenizer(TEXTS)
    assert actual.tokenizer(TEXTS[0]).dtype == expected.tokenizer(TEXTS[0]).dtype
    prompts = [item.generate_preprocess(TEXTS[:2]) for item in (actual, expected)]
    assert actual.generate_postprocess(prompts[0]) == expected.generate_postprocess(prompts[1])


# Everything off its default


@pytest.mark.parametrize(
    "cls, given, besides",
    [
        (kllama.LlamaBackbone, BACKBONE, {"rope_scaling_factor"}),  # shorthand for rope_scaling
        (kllama.LlamaTokenizer, TOKENIZER, {"tokenizer", "merges"}),
        (kllama.LlamaCausalLMPreprocessor, PREPROCESSOR, {"tokenizer"}),
        (
            kllama.LlamaCausalLM,
            {"generation_config": GENERATION},
            {"backbone", "preprocessor", "sampler"},
        ),  # test_samplers has that
    ],
)
@pytest.mark.backend_independent
def test_the_model_has_no_argument_at_its_default(cls, given, besides):
    parameters = inspect.signature(cls.__init__).parameters
    assert set(parameters) - {"self", "kwargs"} == given.keys() | besides
    assert not [name for name, value in given.items() if parameters[name].default == value]


def test_preset(model, preset):
    loaded = kllama.LlamaCausalLM.from_preset(preset)
    assert type(loaded) is kllama.LlamaCausalLM
    assert type(loaded.preprocessor) is kllama.LlamaCausalLMPreprocessor
    assert type(loaded.preprocessor.tokenizer) is kllama.LlamaTokenizer
    assert loaded.backbone.get_config() == model.backbone.get_config()
    assert nameless(loaded.get_config()) == nameless(model.get_config())
    assert loaded.count_params() == model.count_params()
    np.testing.assert_array_equal(logits(loaded), logits(model))
    assert_same_text(loaded.preprocessor, model.preprocessor)


def test_archive(model, archive):
    loaded = keras.saving.load_model(archive)
    assert type(loaded) is kllama.LlamaCausalLM
    assert type(loaded.preprocessor.tokenizer) is kllama.LlamaTokenizer
    assert loaded.get_config() == model.get_config()
    assert loaded.get_compile_config() == model.get_compile_config()
    np.testing.assert_array_equal(logits(loaded), logits(model))
    assert_same_text(loaded.preprocessor, model.preprocessor)


def test_generating_leaves_nothing_to_be_saved(tmp_path):
    model = build(SIZES)
    model.generate({"token_ids": IDS[:, :2]}, max_new_tokens=3, temperature=0)
    assert len(model.weights) == len(model.backbone.weights)
    assert len(model.trainable_variables) == len({id(variable) for variable in model.trainable_variables})
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one, other in zip(state(loaded.weights), state(model.weights), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_second_generation_of_presets(model, preset, tmp_path):
    kllama.LlamaCausalLM.from_preset(preset).save_to_preset(str(tmp_path))
    for name in ("config.json", "assets/tokenizer/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == Path(preset, name).read_bytes()
    np.testing.assert_array_equal(logits(kllama.LlamaCausalLM.from_preset(tmp_path)), logits(model))


def test_frozen_and_named_stay_so(tmp_path):
    model = build({**SIZES, "name": "fox", "trainable": False})
    model.save_to_preset(str(tmp_path))
    loaded = kllama.LlamaBackbone.from_preset(tmp_path)
    assert loaded.name == "fox"
    assert loaded.trainable is False
    assert loaded.trainable_weights == []


@pytest.mark.parametrize("tied, num_heads", [(True, 0), (False, 1)])
@pytest.mark.parametrize("way", ["preset", "keras"])
def test_a_head_stays_tied_or_untied(tmp_path, tied, num_heads, way):
    model = build({**SIZES, "tie_word_embeddings": tied})
    if way == "preset":
        model.save_to_preset(str(tmp_path))
        loaded = kllama.LlamaCausalLM.from_preset(tmp_path)
    else:
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.backbone.tie_word_embeddings is tied
    assert len([weight for weight in loaded.weights if "reverse" in weight.path]) == num_heads
    assert loaded.count_params() == model.count_params()
    np.testing.assert_array_equal(logits(loaded), logits(model))


# KerasHub's own entrances


def test_kerashub_opens_a_preset(model, preset):
    # KerasHub takes the global dtype policy where none is given, whatever the file says.
    loaded = keras_hub.models.CausalLM.from_preset(preset, dtype="mixed_bfloat16")
    assert type(loaded) is kllama.LlamaCausalLM
    assert loaded.get_config() == model.get_config()
    np.testing.assert_array_equal(logits(loaded), logits(model))
    assert_same_text(loaded.preprocessor, model.preprocessor)


def test_kerashub_opens_the_parts_of_a_preset(model, preset):
    backbone = keras_hub.models.Backbone.from_preset(preset, dtype="mixed_bfloat16")
    assert type(backbone) is kllama.LlamaBackbone
    assert backbone.get_config() == model.backbone.get_config()
    np.testing.assert_array_equal(logits(kllama.LlamaCausalLM(backbone)), logits(model))
    tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(preset)
    assert type(tokenizer) is kllama.LlamaTokenizer
    assert tokenizer.get_config() == model.preprocessor.tokenizer.get_config()
    preprocessor = keras_hub.models.CausalLMPreprocessor.from_preset(preset)
    assert type(preprocessor) is kllama.LlamaCausalLMPreprocessor
    assert_same_text(preprocessor, model.preprocessor)


# Parts, and arguments that replace the checkpoint's


def test_tokenizer_and_preprocessor_alone(model, preset):
    tokenizer = kllama.LlamaTokenizer.from_preset(preset)
    assert nameless(tokenizer.get_config()) == nameless(model.preprocessor.tokenizer.get_config())
    assert tokenizer(TEXTS) == model.preprocessor.tokenizer(TEXTS)
    assert_same_text(kllama.LlamaCausalLMPreprocessor.from_preset(preset), model.preprocessor)


def test_tokenizer_and_preprocessor_of_a_hugging_face_directory(assets):
    folder = assets / "models" / "stories260K"
    model = kllama.LlamaCausalLM.from_preset(folder)
    tokenizer = kllama.LlamaTokenizer.from_preset(folder)
    assert type(tokenizer) is kllama.LlamaTokenizer
    assert tokenizer(TEXTS) == model.preprocessor.tokenizer(TEXTS)
    assert (tokenizer.start_token, tokenizer.end_token) == ("<s>", "</s>")
    assert_same_text(kllama.LlamaCausalLMPreprocessor.from_preset(folder), model.preprocessor)


def test_replaced_arguments_of_tokenizer_and_preprocessor(preset):
    tokenizer = kllama.LlamaTokenizer.from_preset(preset, parse_special=False)
    assert tokenizer.parse_special is False
    assert tokenizer.end_token == "</s>"
    preprocessor = kllama.LlamaCausalLMPreprocessor.from_preset(preset, sequence_length=3, tokenizer=tokenizer)
    assert (preprocessor.sequence_length, preprocessor.add_end_token) == (3, False)
    assert preprocessor.tokenizer is tokenizer


def test_no_tokenizer(tmp_path):
    build(SIZES).save_to_preset(str(tmp_path))
    assert kllama.LlamaCausalLM.from_preset(tmp_path).preprocessor is None
    for cls in (kllama.LlamaTokenizer, kllama.LlamaCausalLMPreprocessor):
        with pytest.raises(MissingFileError, match="tokenizer.json"):
            cls.from_preset(tmp_path)


def test_replaced_arguments_of_the_backbone(model, preset):
    backbone = kllama.LlamaBackbone.from_preset(
        preset, dropout=0.3, attention_dropout=0, rope_scaling=None, name="hound", trainable=False
    )
    changes = {"dropout": 0.3, "attention_dropout": 0, "rope_scaling": None, "name": "hound", "trainable": False}
    assert backbone.get_config() == {**model.backbone.get_config(), **changes}
    for one, other in zip(state(backbone.weights), state(model.backbone.weights), strict=True):
        np.testing.assert_array_equal(one, other)


def test_replaced_arguments_of_the_task(preset):
    backbone = build(SIZES).backbone
    model = kllama.LlamaCausalLM.from_preset(
        preset, backbone=backbone, preprocessor=None, generation_config={"temperature": 1.0}, name="hound"
    )
    assert model.backbone is backbone
    assert (model.preprocessor, model.generation_config, model.name) == (None, {"temperature": 1.0}, "hound")


@pytest.mark.parametrize("cls", [kllama.LlamaBackbone, kllama.LlamaCausalLM])
def test_an_unknown_argument(cls, preset):
    with pytest.raises(TypeError, match="dropuot"):
        cls.from_preset(preset, dropuot=0.3)


def test_an_argument_that_does_not_fit_the_weights(preset):
    with pytest.raises(CheckpointError, match="expected"):
        kllama.LlamaBackbone.from_preset(preset, hidden_dim=12)


def test_without_weights(model, preset):
    for cls, expected in ((kllama.LlamaBackbone, model.backbone), (kllama.LlamaCausalLM, model)):
        loaded = cls.from_preset(preset, load_weights=False)
        assert nameless(loaded.get_config()) == nameless(expected.get_config())
        backbone = loaded if cls is kllama.LlamaBackbone else loaded.backbone
        table, other = state([backbone.token_embedding.embeddings, model.backbone.token_embedding.embeddings])
        assert np.all(table != other)
        assert 0.3 < table.std() < 0.7  # initializer_range is 0.5


# dtype: the caller's, else a global policy that is not the default, else the file's


@pytest.fixture(scope="module")
def preset_of(tmp_path_factory):
    """The path of a preset of each dtype policy."""
    folder = tmp_path_factory.mktemp("dtypes")
    for policy in ("float32", "bfloat16", "mixed_float16"):
        build({**SIZES, "dtype": policy}).save_to_preset(str(folder / policy))
    return lambda policy: str(folder / policy)


@pytest.fixture
def global_policy():
    """Set the global dtype policy, until the test is over."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(
    "stored, policy, asked, expected",
    [
        ("float32", None, None, "float32"),
        ("bfloat16", None, None, "bfloat16"),
        ("mixed_float16", None, None, "mixed_float16"),
        ("bfloat16", "float32", None, "bfloat16"),
        ("float32", "bfloat16", None, "bfloat16"),
        ("bfloat16", "mixed_bfloat16", None, "mixed_bfloat16"),
        ("mixed_float16", "float16", None, "float16"),
        ("bfloat16", None, "float32", "float32"),
        ("float32", "bfloat16", "float16", "float16"),
        ("float32", "bfloat16", "float32", "float32"),
        ("bfloat16", "mixed_float16", keras.DTypePolicy("mixed_bfloat16"), "mixed_bfloat16"),
    ],
)
def test_dtype(preset_of, global_policy, stored, policy, asked, expected):
    if policy is not None:
        global_policy(policy)
    for cls in (kllama.LlamaBackbone, kllama.LlamaCausalLM):
        loaded = cls.from_preset(preset_of(stored), dtype=asked)
        backbone = getattr(loaded, "backbone", loaded)
        layers = [layer for layer in backbone._flatten_layers() if not isinstance(layer, keras.layers.InputLayer)]
        assert {layer.dtype_policy.name for layer in [backbone, *layers]} == {expected}
        dtype = "float32" if expected.startswith("mixed") else expected
        assert {keras.backend.standardize_dtype(weight.value.dtype) for weight in loaded.weights} == {dtype}
    if policy is not None:
        assert keras.config.dtype_policy().name == policy


def test_a_failed_load_leaves_the_policy_alone(preset_of, global_policy):
    global_policy("bfloat16")
    with pytest.raises(CheckpointError):
        kllama.LlamaBackbone.from_preset(preset_of("float32"), hidden_dim=12)
    assert keras.config.dtype_policy().name == "bfloat16"


# The compiled state, which a .keras file keeps


class Thoughtful(keras_hub.samplers.GreedySampler):
    """A user's own sampler."""


def train(model, num_epochs: int = 1) -> list[float]:
    """Fit on two rows of ids."""
    return model.fit(INPUTS, batch_size=2, epochs=num_epochs, shuffle=False, verbose=0).history["loss"]


@pytest.mark.parametrize("own", [False, True], ids=["auto", "own"])
def test_training_goes_on(tmp_path, own):
    model = build({**SIZES, "max_sequence_length": 32})
    choices = {"sampler": keras_hub.samplers.TopPSampler(p=0.7, seed=5, temperature=0.5)}
    if own:
        choices |= {
            "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True, name="surprise"),
            "weighted_metrics": [keras.metrics.SparseCategoricalAccuracy(name="hits")],
        }
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, 9), beta_1=0.8), **choices
    )
    train(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")

    assert loaded.get_compile_config() == model.get_compile_config()
    assert isinstance(loaded.optimizer, keras.optimizers.Adam)
    assert int(keras.ops.convert_to_numpy(loaded.optimizer.iterations)) == 1
    assert any(np.any(array) for array in state(model.optimizer.variables)[2:])
    for one, other in zip(state(loaded.optimizer.variables), state(model.optimizer.variables), strict=True):
        np.testing.assert_array_equal(one, other)
    assert type(loaded.loss) is type(model.loss)
    assert type(loaded.sampler) is keras_hub.samplers.TopPSampler
    assert loaded.sampler.get_config() == model.sampler.get_config()
    assert (loaded.sampler.p, loaded.sampler.temperature, loaded.sampler.seed) == (0.7, 0.5, 5)

    assert train(loaded) == train(model)
    for one, other in zip(state(loaded.weights), state(model.weights), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("asked", ["auto", True, False])
def test_what_was_asked_of_the_compiler(tmp_path, asked):
    model = build(SIZES)
    model.compile(jit_compile=asked)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded._asked_jit_compile == asked
    config = model.get_compile_config()
    del config["asked_jit_compile"]  # as kllama 0.1 wrote it
    loaded.compile_from_config(config)
    assert loaded._asked_jit_compile == "auto"


@pytest.mark.parametrize(
    "choice, expected",
    [
        ("greedy", keras_hub.samplers.GreedySampler()),
        ("top_k", keras_hub.samplers.TopKSampler(k=5)),
        (keras_hub.samplers.TopKSampler(k=2, temperature=0.3, seed=7), None),
        (keras_hub.samplers.RandomSampler(temperature=2.0), None),
        (keras_hub.samplers.BeamSampler(num_beams=3), None),
        (keras_hub.samplers.ContrastiveSampler(k=2, alpha=0.1), None),
        ("auto", None),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_samplers(tmp_path, choice, expected):
    model = build(SIZES, generation_config={"do_sample": False})
    model.compile(sampler=choice)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected = expected or model.sampler
    assert type(loaded.sampler) is type(expected)
    config = loaded.sampler.get_config()
    assert config == model.sampler.get_config()
    assert {**config, "seed": None} == {**expected.get_config(), "seed": None}
    assert loaded.get_config()["sampler"] == model.get_config()["sampler"]
    if choice == "auto":
        assert loaded.get_config()["sampler"] == "auto"
    model.save_to_preset(str(tmp_path / "preset"))
    preset = kllama.LlamaCausalLM.from_preset(tmp_path / "preset")
    assert type(preset.sampler) is type(expected) and preset.sampler.get_config() == config
    replaced = kllama.LlamaCausalLM.from_preset(tmp_path / "preset", sampler="top_p")
    assert type(replaced.sampler) is keras_hub.samplers.TopPSampler


def test_a_sampler_of_the_users(tmp_path):
    model = build(SIZES)
    model.compile(sampler=Thoughtful())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects={"Thoughtful": Thoughtful})
    assert type(loaded.sampler) is Thoughtful
    model.save_to_preset(str(tmp_path / "preset"))
    with pytest.raises(UnsupportedError, match="Thoughtful"):
        kllama.LlamaCausalLM.from_preset(tmp_path / "preset")
    assert type(kllama.LlamaCausalLM.from_preset(tmp_path / "preset", sampler=Thoughtful()).sampler) is Thoughtful


def test_uncompiled(tmp_path):
    model = build(SIZES)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_array_equal(logits(loaded), logits(model))


# A new process


@pytest.mark.slow
@pytest.mark.backend_independent
def test_keras_loads_an_archive_in_a_process_that_only_imports_kllama(model, archive, tmp_path):
    code = """
        import sys, kllama
        from keras.saving import load_model
        import numpy as np
        model = load_model(sys.argv[1])
        np.savez(sys.argv[2], *map(np.array, model.weights))
        print(type(model).__module__, model.preprocessor.tokenizer("ab").tolist())
    """
    result = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(code), archive, str(tmp_path / "weights.npz")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[-2] == "kllama.models.llama_causal_lm [3]"
    with np.load(tmp_path / "weights.npz") as weights:
        for one, other in zip(weights.values(), state(model.weights), strict=True):
            np.testing.assert_array_equal(one, other)
