"""The closed schema of config.json, with transformers' LlamaConfig as the oracle of what a file means."""

import inspect
import json
import re
from pathlib import Path

import pytest

from kllama.checkpoints.huggingface.config import (
    IGNORED,
    backbone_config,
    generation_settings,
    token_ids,
)
from kllama.errors import CheckpointError, UnsupportedError

pytestmark = pytest.mark.backend_independent

SOURCE = Path("model/config.json")
MINIMAL = {  # all that a file of the Llama 1 era can be relied on to hold
    "model_type": "llama",
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 56,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2, 3], "long_factor": [2.0, 3, 4.5, 6]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def parse(**changes) -> dict:
    return backbone_config(MINIMAL | changes, SOURCE)


def refuses(error: type, *parts: str):
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in (str(SOURCE), *parts))
    return pytest.raises(error, match=pattern)


def reference(config: dict) -> dict:
    """Say in kllama's words what transformers reads from a config."""
    from transformers import CONFIG_MAPPING

    model_type = config["model_type"]
    parsed = CONFIG_MAPPING[model_type].from_dict(json.loads(json.dumps(config)))
    parsed.standardize_rope_params()  # as each of its rope functions does, once all keys are set
    rope = dict(parsed.rope_parameters)
    theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type")
    rope.pop("type", None)
    is_qwen = model_type.startswith("qwen")
    has_window = parsed.sliding_window is not None if model_type != "llama" else False
    has_window &= not is_qwen or "sliding_attention" in parsed.layer_types
    attention_bias = model_type == "qwen2" or (model_type in ("llama", "qwen3") and parsed.attention_bias)
    return {
        "vocabulary_size": parsed.vocab_size,
        "num_layers": parsed.num_hidden_layers,
        "num_query_heads": parsed.num_attention_heads,
        "hidden_dim": parsed.hidden_size,
        "intermediate_dim": parsed.intermediate_size,
        "num_key_value_heads": parsed.num_key_value_heads,
        "head_dim": parsed.hidden_size // parsed.num_attention_heads if model_type == "qwen2" else parsed.head_dim,
        "layer_norm_epsilon": parsed.rms_norm_eps,
        "tie_word_embeddings": parsed.tie_word_embeddings,
        "max_sequence_length": parsed.max_position_embeddings,
        "attention_bias": attention_bias,
        "attention_output_bias": attention_bias and model_type != "qwen2",
        "qk_norm": model_type == "qwen3",
        "mlp_bias": model_type == "llama" and parsed.mlp_bias,
        "sliding_window": parsed.sliding_window if has_window else None,
        "layer_types": parsed.layer_types if has_window and is_qwen else None,
        "activation": parsed.hidden_act,
        "attention_dropout": parsed.attention_dropout,
        "initializer_range": parsed.initializer_range,
        "rope_max_wavelength": theta,
        "rope_scaling": None if rope_type == "default" else {"rope_type": rope_type, **rope},
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu_new",
            "attention_dropout": 0.25,
            "initializer_range": 0.1,
            "rope_theta": 5e5,
        },
        {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 8.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 2}, "rope_theta": 8.0},
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "dynamic", "factor": 2.5}},
        {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 9.0},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.5}},
        # rope_scaling replaces rope_parameters whole, its theta too
        {
            "rope_scaling": {"type": "linear", "factor": 3.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        },
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 256}},
        {"rope_scaling": LLAMA3, "max_position_embeddings": 512},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 256}, "original_max_position_embeddings": 128},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.707, "mscale_all_dim": 1.0}},
        {"rope_scaling": LONGROPE | {"factor": 4.0, "attention_factor": 1.5}},
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 128},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}, "partial_rotary_factor": 1.0},
        {"model_type": "mistral", "num_attention_heads": 8},
        {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 2, "head_dim": 10},
        {"model_type": "mistral", "sliding_window": 100, "num_key_value_heads": 4},
        {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 100, "max_window_layers": 0},
        {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 1},
        {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 7},
        {"model_type": "qwen2", "num_key_value_heads": None, "use_sliding_window": True, "sliding_window": None},
        {"model_type": "qwen3", "num_key_value_heads": 2},
        {"model_type": "qwen3", "num_key_value_heads": 2, "attention_bias": True, "head_dim": 6},
        {
            "model_type": "qwen3",
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ],
    ids=str,
)
def test_means_what_transformers_reads(changes):
    expected = reference(MINIMAL | changes)
    if expected["rope_scaling"]:
        expected["rope_scaling"].pop("partial_rotary_factor", None)
    parsed = parse(**changes)
    assert parsed == expected
    if parsed["rope_scaling"]:
        assert next(iter(parsed["rope_scaling"])) == "rope_type"


def test_su_is_longrope():
    expected = parse(rope_scaling=LONGROPE, original_max_position_embeddings=128)
    scaling = LONGROPE | {"type": "su"}
    del scaling["rope_type"]
    assert parse(rope_scaling=scaling, original_max_position_embeddings=128) == expected


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_what_transformers_writes_is_known(name):
    import transformers

    config = getattr(transformers, f"{name}Config")(architectures=[f"{name}ForCausalLM"])
    written = json.loads(config.to_json_string(use_diff=False))
    assert backbone_config(written, SOURCE) == reference(written)


def test_goldens_mean_the_same_in_both_versions(assets):
    """Every tiny Llama has its config as transformers 4 and 5 write it."""
    folders = [path.parent for path in sorted((assets / "goldens/hf_tiny").glob("*/config_v4.json"))]
    folders = [folder for folder in folders if folder.name not in ("gpt2", "llama_sequence_classification")]
    assert len(folders) >= 12
    for folder in folders:
        v4, v5 = (json.loads((folder / name).read_text()) for name in ("config_v4.json", "config.json"))
        assert backbone_config(v4, SOURCE) == backbone_config(v5, SOURCE) == reference(v5), folder.name


def test_the_arguments_are_those_of_the_backbone():
    from kllama.models.llama_backbone import LlamaBackbone

    parameters = inspect.signature(LlamaBackbone.__init__).parameters
    assert set(parse()) <= set(parameters)
    # what a config does not say, or says in another way
    named = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    assert named - set(parse()) == {"self", "dtype", "dropout", "rope_scaling_factor"}


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModel": "evil.Evil"}, "trust_remote_code": True},
        {"_attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True},
        {"pretraining_tp": 4, "use_cache": False, "_name_or_path": "/home/x", "transformers_version": "4.28.0"},
        {"bos_token_id": 1, "eos_token_id": [1, 2], "pad_token_id": -1, "torch_dtype": "float16"},
        {"max_length": 4096, "temperature": 0.6, "id2label": {"0": "LABEL_0"}, "chunk_size_feed_forward": 0},
        {"sliding_window": None, "partial_rotary_factor": 1.0, "quantization_config": None, "is_decoder": True},
        {"architectures": None},
        {"architectures": ["LlamaModel"]},
        {"architectures": ["LLaMAForCausalLM"]},
        {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}},
    ],
    ids=str,
)
def test_ignored_keys_change_nothing(changes):
    assert parse(**changes) == parse()


@pytest.mark.parametrize("finetuned", [True, False])
def test_how_a_scaled_rope_was_trained_is_ignored(finetuned):
    scaling = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128}
    assert parse(rope_scaling={**scaling, "finetuned": finetuned}) == parse(rope_scaling=scaling)
    assert parse(rope_scaling={"type": "default", "finetuned": finetuned})["rope_scaling"] is None


def test_names_from_the_file_stay_on_one_line():
    with refuses(UnsupportedError, '("a\\nb")'):
        parse(rope_parameters={"a\nb": {}})


def test_auto_map_is_reported(caplog):
    with caplog.at_level("INFO"):
        parse(auto_map={"AutoModel": "evil.Evil"})
    assert "auto_map is ignored" in caplog.text


def test_every_ignored_key_has_a_reason():
    assert all(reason.strip() for reason in IGNORED.values())
    assert not set(IGNORED) & set(MINIMAL) - {"model_type"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gemma"}, ["not Llama", '"gemma"', "llama, mistral, qwen2, qwen3"]),
        ({"model_type": ["qwen2"]}, ["not Llama", '["qwen2"]']),
        ({"model_type": "mistral", "attention_bias": True}, ["attention_bias = true", '"mistral"']),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, ["layer_types", '"mistral"']),
        ({"model_type": "qwen2", "architectures": ["LlamaForCausalLM"]}, ["architectures", "Qwen2ForCausalLM"]),
        ({"model_type": "qwen2", "use_mrope": True}, ["use_mrope = true"]),
        ({"max_window_layers": 2}, ["max_window_layers = 2", '"llama"']),
        ({"model_type": "mllama"}, ["not Llama", '"mllama"']),
        ({"model_type": None}, ["not Llama", "null"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quant_method", '"gptq"', "not quantised"]),
        ({"quantization_config": {"bits": 4}}, ["quant_method", "null"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["architectures", "LlamaForSequenceClassification"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures"]),
        ({"architectures": [["LlamaModel"]]}, ["architectures"]),
        ({"sliding_window": 4096}, ["sliding_window = 4096", "expected null"]),
        ({"sliding_window": 0}, ["sliding_window = 0"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        (
            {"attention_multiplier": 0.5, "rope_interleaved": True},
            ["attention_multiplier = 0.5", "rope_interleaved = true"],
        ),
        ({"hidden_act": "xielu"}, ["hidden_act", '"xielu"', "silu"]),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, ["rope_scaling.rope_type", '"mrope"', "longrope"]),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, ["rope_scaling.rope_type", '["linear"]']),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["nested", "full_attention"]),
    ],
    ids=str,
)
def test_refuses_what_is_not_implemented(changes, parts):
    with refuses(UnsupportedError, *parts):
        parse(**changes)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"vocab_siez": 3, "alibi": True}, ["unknown keys", '"alibi"', '"vocab_siez"']),
        ({f"key{i:02}": i for i in range(13)}, ["unknown keys", '"key00"', '"key09"', "and 3 more"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers = 0", "from 1 to 65536"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers = -1", "from 1 to 65536"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers = 1000000000", "from 1 to 65536"]),
        ({"num_hidden_layers": "2"}, ['num_hidden_layers = "2"', "an integer"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers = true", "an integer"]),
        ({"num_hidden_layers": 2.0}, ["num_hidden_layers = 2.0", "an integer"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers = null", "an integer"]),
        ({"vocab_size": -1, "hidden_size": [32]}, ["vocab_size = -1", "hidden_size = [32]"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings = 1", "true or false"]),
        ({"attention_bias": None}, ["attention_bias = null", "true or false"]),
        ({"hidden_act": None}, ["hidden_act = null", "a string"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps = 0", "above 0"]),
        ({"rms_norm_eps": "1e-5"}, ['rms_norm_eps = "1e-5"', "a number"]),
        ({"attention_dropout": 1.5}, ["attention_dropout = 1.5", "from 0, below 1"]),
        ({"initializer_range": -0.1}, ["initializer_range = -0.1"]),
        ({"num_attention_heads": 3}, ["hidden_size = 32", "num_attention_heads (3)"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads = 4", "num_key_value_heads (3)"]),
        ({"head_dim": 7}, ["head_dim = 7", "even"]),
        ({"rope_theta": 0}, ["rope_theta = 0", "above 0"]),
        ({"rope_theta": True}, ["rope_theta = true", "a number"]),
        ({"rope_scaling": []}, ["rope_scaling = []", "an object"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["'linear'", "lacks ['factor']"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, ["rope_scaling['factor'] (0.5)", "at least 1"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, ["rope_scaling['factor'] ('2')", "a number"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**40}}, ["rope_scaling['factor'] (1", "a number"]),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}},
            ["unknown keys ['beta_fast']", "factor"],
        ),
        ({"rope_scaling": {"factor": 2.0}}, ['"factor"', "none besides rope_theta"]),
        (
            {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2}},
            ['"linear"', '"dynamic"', "the same"],
        ),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, ["lacks ['low_freq_factor']"]),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0, "2"]}}, ["short_factor", "positive numbers"]),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 8192.0}, ["8192.0", "a positive integer"]),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": 1}},
            ["rope_scaling['truncate'] (1)", "True or False"],
        ),
    ],
    ids=str,
)
def test_refuses_what_is_wrong(changes, parts):
    with refuses(CheckpointError, *parts) as caught:
        parse(**changes)
    assert type(caught.value) is CheckpointError


def test_missing_keys_are_listed_together():
    with refuses(
        CheckpointError, "missing keys", "vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size"
    ):
        backbone_config({"model_type": "llama"}, SOURCE)


def test_generation_settings():
    given = {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    assert generation_settings(given | {"max_length": 4096, "no_such": "key"}, SOURCE) == given
    assert generation_settings(dict.fromkeys(given), SOURCE) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_sample", 1),
        ("temperature", -0.5),
        ("temperature", "1"),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", -1),
        ("repetition_penalty", 0),
    ],
)
def test_generation_settings_out_of_range(key, value):
    with refuses(CheckpointError, f"{key} = {json.dumps(value)}", "expected"):
        generation_settings({key: value}, SOURCE)


@pytest.mark.parametrize(("value", "ids"), [(None, []), (2, [2]), ([1, 2], [1, 2]), ([], [])])
def test_token_ids(value, ids):
    assert token_ids({"eos_token_id": value}, "eos_token_id", SOURCE) == ids


@pytest.mark.parametrize("value", [-1, "2", 2.0, True, [1, None], {"id": 1}])
def test_token_ids_that_are_none(value):
    with refuses(CheckpointError, f"eos_token_id = {json.dumps(value)}", "a token id"):
        token_ids({"eos_token_id": value}, "eos_token_id", SOURCE)
