"""Write what the present version saves, for later versions to prove that they still load it.

    KERAS_BACKEND=jax python -m tests.compatibility.make_sample

makes the folder of the version next to this file, once, when a version is released. It is never changed after that.
"""

import json
from pathlib import Path

import keras
import numpy as np

import kllama

FOLDER = Path(__file__).parent
TEXTS = ["Once upon a time there was a fox.", "The fox said: hello!", "Anna is 7 years old.", "ŝ 狐"]
PROMPTS = ["Once upon", "The fox"]
CHAT = [{"role": "user", "content": "hello!"}, {"role": "assistant", "content": "The fox said"}]
GENERATE = {"max_new_tokens": 12, "stop_token_ids": None, "temperature": 0}
INPUTS = {
    "token_ids": np.array([[3, 40, 50, 60, 70, 80], [90, 30, 20, 0, 0, 0]], "int32"),
    "padding_mask": np.array([[1] * 6, [1] * 3 + [0] * 3], "int32"),
}
# Between them, every argument is off its default.
BACKBONES = {
    "untied": {
        "vocabulary_size": 300,
        "num_layers": 2,
        "num_query_heads": 4,
        "hidden_dim": 16,
        "intermediate_dim": 24,
        "num_key_value_heads": 2,
        "rope_max_wavelength": 500.0,
        "layer_norm_epsilon": 1e-4,
        "dropout": 0.1,
        "head_dim": 6,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 16,
        },
        "max_sequence_length": 64,
        "attention_bias": True,
        "mlp_bias": True,
        "activation": "gelu_new",
        "attention_dropout": 0.05,
        "initializer_range": 0.3,
    },
    "tied": {
        "vocabulary_size": 300,
        "num_layers": 1,
        "num_query_heads": 2,
        "hidden_dim": 8,
        "intermediate_dim": 12,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    },
}


def build(arguments: dict, **kwargs) -> kllama.LlamaCausalLM:
    """Build a model with text around it."""
    tokenizer = kllama.LlamaTokenizer.train(TEXTS * 4, 290, chat_template="chatml")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special=True)
    preprocessor = kllama.LlamaCausalLMPreprocessor(tokenizer, sequence_length=32, add_end_token=False, truncate="left")
    generation_config = {"stop_token_ids": [5], "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    backbone = kllama.LlamaBackbone(**arguments)
    return kllama.LlamaCausalLM(backbone, preprocessor, generation_config=generation_config, **kwargs)


def outputs(model: kllama.LlamaCausalLM) -> dict:
    """Give what must stay the same: the logits of the last real positions, ids and text."""
    tokenizer = model.preprocessor.tokenizer
    return {
        "logits": np.round(keras.ops.convert_to_numpy(model(INPUTS))[[0, 1], [5, 2]], 5).tolist(),
        "ids": tokenizer(TEXTS),
        "chat": tokenizer.apply_chat_template(CHAT).tolist(),
        "text": model.generate(PROMPTS, **GENERATE),
        "generation_config": model.generation_config,
    }


def save(model: kllama.LlamaCausalLM, folder: Path, name: str, **kwargs) -> None:
    """Save a preset, and beside it what the model gives."""
    model.save_to_preset(str(folder / name), **kwargs)
    (folder / f"{name}.json").write_text(json.dumps(outputs(model)) + "\n")


def main() -> None:
    """Write the folder of this version."""
    folder = FOLDER / f"v{kllama.__version__}"
    folder.mkdir()
    keras.utils.set_random_seed(1)
    models = {name: build(arguments, name=name) for name, arguments in BACKBONES.items()}
    for name, model in models.items():
        save(model, folder, f"preset_{name}")
        config = json.dumps(keras.saving.serialize_keras_object(model), indent=1)
        (folder / f"config_{name}.json").write_text(config + "\n")
    models["untied"].save(folder / "untied.keras")
    models["untied"].save_weights(folder / "untied.weights.h5")
    save(build({**BACKBONES["untied"], "dtype": "bfloat16"}), folder, "preset_bfloat16_shards", max_shard_size=1e-5)
    models["untied"].quantize("int8")
    save(models["untied"], folder, "preset_int8")
    models["tied"].backbone.enable_lora(2)
    for variable in models["tied"].trainable_variables:
        variable.assign(keras.random.normal(variable.shape, seed=2))
    models["tied"].backbone.save_lora_weights(folder / "tied.lora.h5")
    (folder / "tied.lora.json").write_text(json.dumps(outputs(models["tied"])) + "\n")


if __name__ == "__main__":
    main()
