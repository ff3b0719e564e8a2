"""Models as GGUF files: read again by kllama, compared with files that others wrote, and run by llama.cpp."""

import json

import gguf
import keras
import numpy as np
import pytest

import kllama
from kllama.checkpoints.gguf.file import GgufFile
from kllama.errors import UnsupportedError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
    "attention_factor": 1.25,
}
MODELS = {
    "llama": {"head_dim": 8},
    "llama_tied": {"tie_word_embeddings": True, "rope_max_wavelength": 500000.0},
    "llama_biases": {"attention_bias": True, "mlp_bias": True},
    "llama_llama3": {"rope_scaling": LLAMA3, "head_dim": 8},
    "llama_yarn": {"rope_scaling": {**YARN, "attention_factor": 0.75}, "head_dim": 8},
    "llama_longrope": {"rope_scaling": LONGROPE, "head_dim": 8},
    "llama_linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "mistral": {"sliding_window": 5},
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen2_llama3": {"attention_bias": True, "attention_output_bias": False, "rope_scaling": LLAMA3, "head_dim": 8},
    "qwen3": {"qk_norm": True, "head_dim": 8},
}
ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3"}
pytestmark = pytest.mark.filterwarnings("ignore:preprocessor = None", "ignore:sliding_window", "ignore:rope_scaling")


@pytest.fixture
def build(random_model):
    """Build a function (key of `MODELS`) -> a random model, its biases and norms random too."""

    def build_one(name):
        model = random_model(max_sequence_length=64, layer_norm_epsilon=1e-5, **MODELS[name])
        source = np.random.default_rng(3)
        for weight in model.weights:
            if len(weight.shape) == 1 or weight.path.endswith("bias"):
                weight.assign(source.normal(weight.path.endswith("scale"), 0.3, weight.shape))
        return model

    return build_one


def logits(model, ids):
    return keras.ops.convert_to_numpy(model({"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)))}))[0]


def assert_same_weights(model, other):
    theirs = {weight.path: keras.ops.convert_to_numpy(weight.value) for weight in other.weights}
    assert {*theirs} == {weight.path for weight in model.weights}
    for weight in model.weights:
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight.value), theirs[weight.path], weight.path)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_as_it_was(name, build, tmp_path):
    model = build(name)
    model.export_gguf(tmp_path / "model.gguf")
    assert GgufFile(tmp_path / "model.gguf").metadata["general.architecture"] == ARCHITECTURES.get(name, "llama")
    back = kllama.LlamaCausalLM.from_preset(tmp_path / "model.gguf")
    ours, theirs = model.backbone.get_config(), back.backbone.get_config()
    scalings = [config.pop("rope_scaling") or {} for config in (ours, theirs)]
    assert scalings[0] == {key: pytest.approx(value) for key, value in scalings[1].items()}
    ours.pop("name"), theirs.pop("name")
    ours.pop("initializer_range"), theirs.pop("initializer_range")
    assert ours == theirs
    assert_same_weights(model, back)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_exact(dtype, assets, tmp_path):
    model = kllama.LlamaCausalLM.from_preset(assets / "models" / "stories260K", dtype=dtype)
    model.export_gguf(tmp_path / "model.gguf")
    kinds = {tensor.type for tensor in GgufFile(tmp_path / "model.gguf").tensors.values()}
    assert kinds == {"F32", {"bfloat16": "BF16", "float16": "F16"}[dtype]}
    assert_same_weights(model, kllama.LlamaCausalLM.from_preset(tmp_path / "model.gguf"))


def test_the_metadata_of_stories260k(stories260k, assets, tmp_path):
    stories260k.export_gguf(tmp_path / "stories260K.gguf", dtype="float32")
    ours = GgufFile(tmp_path / "stories260K.gguf").metadata
    theirs = GgufFile(assets / "gguf" / "stories260K-f32.gguf").metadata
    # What that file's writer added, and what he left to llama.cpp. The stories end with the start token, too.
    assert theirs.keys() - ours.keys() == {"general.license"}
    added = {key: ours[key] for key in ours.keys() - theirs.keys()}
    assert added == {
        "general.type": "model",
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "tokenizer.ggml.eot_token_id": 1,
    }
    # Other numbers, but the same order of what can be formed.
    scores = [file.pop("tokenizer.ggml.scores") for file in (ours, theirs)]
    formed = [i for i, token in enumerate(ours["tokenizer.ggml.tokens"]) if i >= 259 and len(token) > 1]
    assert len(formed) > 100
    assert sorted(formed, key=lambda i: -scores[0][i]) == sorted(formed, key=lambda i: -scores[1][i])
    for key in theirs.keys() & ours.keys():
        assert np.array_equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0", "q4_0"])
def test_the_tensors_of_stories260k_are_the_bytes_of_another_writer(dtype, stories260k, assets, tmp_path):
    stories260k.export_gguf(tmp_path / "model.gguf", dtype=dtype)
    suffix = {"float32": "f32", "float16": "f16"}.get(dtype, dtype)
    files = tmp_path / "model.gguf", assets / "gguf" / f"stories260K-{suffix}.gguf"
    ours, theirs = ({tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors} for file in files)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        np.testing.assert_array_equal(ours[name].data, tensor.data, name)


def test_text_comes_back(stories260k, tmp_path):
    stories260k.export_gguf(tmp_path / "model.gguf")
    back = kllama.LlamaCausalLM.from_preset(tmp_path / "model.gguf")
    ours, theirs = (model.preprocessor.tokenizer for model in (stories260k, back))
    text = "Once upon  a time, a fox — naïve!"
    assert theirs.tokenize(text).tolist() == ours.tokenize(text).tolist()
    assert back.preprocessor.add_start_token
    assert sorted(back.generation_config["stop_token_ids"]) == [1, 2]


def test_lora_is_merged_and_int8_becomes_float(random_model, tmp_path):
    model = random_model(max_sequence_length=64)
    model.quantize("int8")
    model.backbone.enable_lora(2)
    query = model.backbone.get_layer("transformer_layer_1").self_attention.query
    query.lora_kernel_b.assign(np.ones(query.lora_kernel_b.shape))
    model.export_gguf(tmp_path / "model.gguf")
    codes, scale, first, second = (
        keras.ops.convert_to_numpy(variable.value).astype("float32")
        for variable in (query._kernel, query.kernel_scale, query.lora_kernel_a, query.lora_kernel_b)
    )
    back = kllama.LlamaBackbone.from_preset(tmp_path / "model.gguf")
    kernel = back.get_layer("transformer_layer_1").self_attention.query.kernel
    np.testing.assert_allclose(keras.ops.convert_to_numpy(kernel), codes / scale[0, 0] + first @ second, rtol=1e-6)


def test_the_context_of_a_model_that_does_not_say(random_model, stories260k, tmp_path):
    random_model().export_gguf(tmp_path / "ids.gguf")
    assert GgufFile(tmp_path / "ids.gguf").metadata["llama.context_length"] == 2048
    preprocessor = kllama.LlamaCausalLMPreprocessor(stories260k.preprocessor.tokenizer, sequence_length=96)
    model = kllama.LlamaCausalLM(random_model(vocabulary_size=515).backbone, preprocessor)
    model.export_gguf(tmp_path / "text.gguf")
    metadata = GgufFile(tmp_path / "text.gguf").metadata
    assert metadata["llama.context_length"] == 96
    assert metadata["tokenizer.ggml.tokens"][-3:] == ["[PAD512]", "[PAD513]", "[PAD514]"]


def test_a_model_without_text_says_so(random_model, tmp_path):
    with pytest.warns(UserWarning, match="preprocessor = None"):
        random_model().export_gguf(tmp_path / "model.gguf")
    assert GgufFile(tmp_path / "model.gguf").metadata["tokenizer.ggml.model"] == "none"


def test_wrong_arguments(random_model, stories260k, tmp_path):
    model = random_model()
    with pytest.raises(ValueError, match=r"dtype \('q5_0'\) must be one of float32, .*q4_0, or None"):
        model.export_gguf(tmp_path / "model.gguf", dtype="q5_0")
    with pytest.raises(TypeError, match="path"):
        model.export_gguf(3)
    with pytest.raises(UnsupportedError, match="activation = 'gelu'"):
        random_model(activation="gelu").export_gguf(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="the tokenizer has 512 tokens, the model 300 rows"):
        kllama.LlamaCausalLM(model.backbone, stories260k.preprocessor).export_gguf(tmp_path / "model.gguf")
    assert not [*tmp_path.iterdir()]


# === llama.cpp itself ===


@pytest.fixture
def open_llama():
    """Open a file with llama.cpp, as exactly as it computes: a float32 cache, and no fused attention."""
    llama_cpp = pytest.importorskip("llama_cpp")
    opened = []

    def open_one(path, **kwargs):
        settings = {"n_ctx": 128, "n_batch": 128, "n_threads": 1, "verbose": False, "flash_attn": False, **kwargs}
        opened.append(llama_cpp.Llama(str(path), logits_all=True, type_k=0, type_v=0, **settings))
        return opened[-1]

    yield open_one
    for llama in opened:
        llama.close()


def llama_logits(llama, ids):
    llama.reset()
    llama.eval([int(token_id) for token_id in ids])
    return np.array(llama.scores[: len(ids)])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_logits(name, build, token_ids, open_llama, tmp_path):
    model = build(name)
    ids = token_ids.ravel()[: 5 if name == "mistral" else 30]
    model.export_gguf(tmp_path / "model.gguf")
    llama = open_llama(tmp_path / "model.gguf", yarn_beta_fast=-1.0, yarn_beta_slow=-1.0)
    np.testing.assert_allclose(llama_logits(llama, ids), logits(model, ids), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "dtype", "tolerance"),
    [("stories260K", "float32", 1e-4), ("stories260K", "q8_0", 0.5), ("stories15M", None, 1e-4)],
)
def test_llama_cpp_tells_the_same_stories(preset, dtype, tolerance, assets, open_llama, tmp_path):
    model = kllama.LlamaCausalLM.from_preset(assets / "models" / preset)
    model.export_gguf(tmp_path / "model.gguf", dtype=dtype)
    llama = open_llama(tmp_path / "model.gguf")
    prompt = "Once upon a time"
    ids = llama.tokenize(prompt.encode())
    assert ids == [1, *model.preprocessor.tokenizer.tokenize(prompt)]
    assert np.abs(llama_logits(llama, ids) - logits(model, ids)).max() < tolerance
    llama.reset()
    told = llama.create_completion(prompt, max_tokens=80, temperature=0.0)["choices"][0]["text"]
    assert told == model.generate(prompt, max_new_tokens=80, temperature=0.0, strip_prompt=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "models/stories15M",
        "models/smollm2-135m-instruct",
        "tokenizers/llama3_2",
        "tokenizers/gpt2",
        "tokenizers/mistral_v3/tokenizer.model",
        None,
    ],
)
@pytest.mark.filterwarnings("ignore:tokenizer. llama.cpp puts no space before")
def test_llama_cpp_gives_the_ids(path, random_model, assets, open_llama, tmp_path):
    texts = json.loads((assets / "goldens" / "tokenizers" / "mixed_text.json").read_text())["texts"]
    if path is None:
        lines = (assets / "text" / "tinyshakespeare.txt").read_text()[:100_000].split("\n")
        tokenizer = kllama.LlamaTokenizer.train(lines, 700, "sentencepiece_bpe", chat_template="llama2")
    else:
        named = {"start_token": "<|endoftext|>", "end_token": "<|endoftext|>"} if "gpt2" in path else {}
        tokenizer = kllama.LlamaTokenizer.from_preset(assets / path, **named)
    sizes = {"num_layers": 1, "hidden_dim": 4, "num_query_heads": 1, "num_key_value_heads": 1, "intermediate_dim": 4}
    backbone = random_model(vocabulary_size=tokenizer.vocabulary_size() + 3, **sizes).backbone
    kllama.LlamaCausalLM(backbone, kllama.LlamaCausalLMPreprocessor(tokenizer)).export_gguf(tmp_path / "model.gguf")
    llama = open_llama(tmp_path / "model.gguf", vocab_only=True)
    source = np.random.default_rng(7)
    letters = [*"  \n\t.,'!?aabcdehilnorst ABCTH0123456789éüß日本語한국🙂👍🏽<>s/|[]_\u200d\u0301\xa0ﬁ▁"]
    texts += ["".join(source.choice(letters, source.integers(40))) for _ in range(2000)]
    for text in texts:
        assert llama.tokenize(text.encode(), add_bos=False) == tokenizer.tokenize(text).tolist(), repr(text)
