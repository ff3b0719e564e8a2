"""A user of JAX or PyTorch needs no TensorFlow: a whole session in a process that cannot import it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SESSION = """
import sys

from tests.blocking import BLOCKED, block_tensorflow

asked = block_tensorflow()

import numpy as np
import keras
import kllama

special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
tokenizer = kllama.LlamaTokenizer(
    {
        "version": "1.0",
        "added_tokens": [{"id": 4, "content": "<s>", **special}, {"id": 5, "content": "</s>", **special}],
        "model": {"type": "BPE", "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"]},
    },
    start_token="<s>",
    end_token="</s>",
)
preprocessor = kllama.LlamaCausalLMPreprocessor(tokenizer, sequence_length=8)
model = kllama.LlamaCausalLM(kllama.LlamaBackbone(6, 1, 2, 8, 12, 1), preprocessor)

texts = ["abab", "ab", "a", "bab"]
first = model.fit(texts, batch_size=2, epochs=2, verbose=0).history["loss"]
token_ids = np.array([[4, 3, 3, 5], [4, 1, 5, 0]], "int32")
ids = {"token_ids": token_ids, "padding_mask": token_ids > 0}
second = model.fit(ids, batch_size=2, verbose=0).history["loss"]
results = model.evaluate(texts, verbose=0, return_dict=True)
third = model.fit({"prompts": ["ab", "a"], "responses": ["b", "ba"]}, verbose=0).history["loss"]
fourth = model.fit((batch for batch in [texts, texts[:2]]), verbose=0).history["loss"]
assert np.all(np.isfinite([*first, *second, *third, *fourth, *results.values()])), (first, second, results)
print("trained", sorted(results))

text = model.generate("ab", max_new_tokens=4, temperature=0.0)
assert text.startswith("ab"), text
assert "".join(tokenizer.detokenize_stream([3, 1])) == tokenizer.detokenize([3, 1])
tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "a"}]
assert tokenizer.apply_chat_template(chat).tolist() == [4, 3, 5, 1, 5]
model.fit({"messages": chat}, verbose=0)
model.generate(chat[:1], max_new_tokens=2)
assert tokenizer.add_tokens("c") == 1
model.resize_vocabulary(7)
text = model.generate("ab", max_new_tokens=4, temperature=0.0)
print("generated")

model.save_to_preset(sys.argv[1])
loaded = kllama.LlamaCausalLM.from_preset(sys.argv[1])
assert len(loaded.weights) == len(model.weights)
for new, old in zip(loaded.weights, model.weights):
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (new.value, old.value)))
assert loaded.generate("ab", max_new_tokens=4, temperature=0.0) == text
print("loaded")

assert not BLOCKED & set(sys.modules)
assert "tensorflow" in asked  # so the lock does stand in the way
print("done")
"""


@pytest.mark.backend_independent  # each backend has a process of its own here
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_session_without_tensorflow(tmp_path, backend):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": backend}
    command = [sys.executable, "-c", SESSION, str(tmp_path / "preset")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[-2] == "done"
