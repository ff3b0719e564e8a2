"""Every format that a model comes in gives the same model: its logits and its text."""

import json

import numpy as np
import pytest
from keras import ops

import kllama
from kllama.checkpoints.formats import open_checkpoint
from kllama.errors import CheckpointError, MissingFileError, UnsupportedError
from tests import oracle

GREEDY = {"temperature": 0, "stop_token_ids": None}
IDENTICAL = [
    "models/stories260K/llama2c/stories260K.bin",
    "models/stories260K/llama2c/stories260K_v1.bin",
    "meta/stories260K",
    "meta/stories260K-mp2",
    "gguf/stories260K-f32.gguf",
]


def logits(model, token_ids) -> np.ndarray:
    return ops.convert_to_numpy(model({"token_ids": token_ids, "padding_mask": None}))


def load(path, **arguments):
    return kllama.LlamaCausalLM.from_preset(path, dtype="float32", **arguments)


@pytest.fixture(scope="module")
def stories(assets) -> dict:
    """What the Hugging Face directory of stories260K gives."""
    token_ids = np.load(assets / "models/stories260K/expected/forward.npz")["input_ids"]
    model = load(assets / "models/stories260K")
    return {
        "token_ids": token_ids,
        "logits": logits(model, token_ids),
        "text": model.generate("Once", max_new_tokens=40, **GREEDY),
    }


@pytest.mark.parametrize("path", IDENTICAL)
def test_float32_files_are_the_same_model(assets, stories, path):
    model = load(assets / path)
    np.testing.assert_array_equal(logits(model, stories["token_ids"]), stories["logits"])
    assert model.generate("Once", max_new_tokens=40, **GREEDY) == stories["text"]


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_gguf_gives_the_recorded_logits_and_text(assets, kind):
    model = load(assets / f"gguf/stories260K-{kind}.gguf")
    with np.load(assets / "gguf/expected.npz") as expected:
        given = logits(model, expected["input_ids"])[0]
        assert oracle.relative_error(given[-1], expected[f"logits_last_{kind}"]) < 1e-5
        np.testing.assert_allclose(given.sum(-1), expected[f"logits_sum_{kind}"], atol=0.02)
    recorded = json.loads((assets / "gguf/expected.json").read_text())["files"][f"stories260K-{kind}.gguf"]
    start = {"token_ids": np.array([[recorded["greedy_ids"][0]]])}
    output = model.generate(start, max_new_tokens=len(recorded["greedy_ids"]) - 1, **GREEDY)
    assert output["token_ids"][0].tolist() == recorded["greedy_ids"]


def test_int8_file_of_llama2c_gives_the_recorded_logits_and_ids(assets):
    model = load(assets / "models/stories260K/llama2c/stories260K_v2_q80.bin")
    with np.load(assets / "models/stories260K/expected/forward_q80.npz") as expected:
        assert oracle.relative_error(logits(model, expected["input_ids"]), expected["logits"]) < 1e-5
        ids = expected["greedy_ids"].tolist()
        output = model.generate({"token_ids": np.array([ids[:1]])}, max_new_tokens=len(ids) - 1, **GREEDY)
        assert output["token_ids"][0].tolist() == ids


def test_a_bare_gguf_file(assets):
    model = load(assets / "gguf/llama-2-tiny-random.gguf")
    with np.load(assets / "gguf/expected.npz") as expected:
        given = logits(model, expected["tiny_random_input_ids"])[0, -1]
        assert oracle.relative_error(given, expected["tiny_random_logits_last"]) < 1e-5


def test_smollm2_of_four_bits_gives_the_recorded_logits(assets):
    folder = assets / "models/smollm2-135m-instruct"
    model = load(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    with np.load(folder / "expected/logits.npz") as expected:
        assert oracle.relative_error(logits(model, expected["input_ids"])[0, -1], expected["logits_last"]) < 1e-4
    case = json.loads((folder / "expected/greedy.json").read_text())["cases"][0]
    expected = case["dequantised_float32"]["ids"][:4]
    output = model.generate({"token_ids": np.array([case["prompt_ids"]])}, max_new_tokens=len(expected), **GREEDY)
    assert output["token_ids"][0, -len(expected) :].tolist() == expected


@pytest.mark.slow
def test_smollm2_writes_the_recorded_texts(assets):
    folder = assets / "models/smollm2-135m-instruct"
    model = load(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    for case in json.loads((folder / "expected/greedy.json").read_text())["cases"]:
        prompt = case["prompt"]
        if case["messages"] is not None:
            tokenizer = model.preprocessor.tokenizer
            prompt = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True, tokenize=False)
            assert prompt == case["prompt"]
        expected = case["dequantised_float32"]
        output = model.generate({"token_ids": np.array([case["prompt_ids"]])}, max_new_tokens=48, **GREEDY)
        assert output["token_ids"][0, -48:].tolist() == expected["ids"], case["name"]
        text = model.preprocessor.tokenizer.detokenize(output["token_ids"][0, -48:])
        assert text == expected["text"], case["name"]


@pytest.mark.backend_independent
@pytest.mark.parametrize("path", ["models/stories260K", *IDENTICAL])
def test_the_format_is_told_by_content(assets, tmp_path, path):
    """Whatever a directory, or a file, is called."""
    link = tmp_path / "anything"
    link.symlink_to(assets / path)
    assert open_checkpoint(link).format == open_checkpoint(assets / path).format


@pytest.mark.backend_independent
def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("Once upon a time")
    with pytest.raises(MissingFileError, match="empty: no file config.json; expected .*GGUF"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(UnsupportedError, match="notes.txt: holds no checkpoint"):
        open_checkpoint(tmp_path / "notes.txt")


@pytest.mark.backend_independent
def test_what_the_files_cannot_tell_is_asked_for(assets, tmp_path):
    """Meta's parameters do not say by how much the positions of Llama 3.1 and later are scaled."""
    source = assets / "meta/stories260K"
    for file in ("consolidated.00.pth", "tokenizer.model"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    parameters = json.loads((source / "params.json").read_text()) | {"use_scaled_rope": True}
    (tmp_path / "params.json").write_text(json.dumps(parameters))
    with pytest.raises(CheckpointError, match="rope_scaling"):
        kllama.LlamaBackbone.from_preset(tmp_path)
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert kllama.LlamaBackbone.from_preset(tmp_path, rope_scaling=scaling).rope_scaling == scaling
