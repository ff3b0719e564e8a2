"""Time loading a checkpoint and computing its first logits, kllama beside KerasHub and transformers, in one run.

    python benchmarks/loading.py path/to/checkpoint [--preset path/to/preset]

The checkpoint is a Hugging Face directory, the preset the same model as kllama saved it (KerasHub 0.32 cannot load what
it saved of a tied model). Each measurement is a process of its own: it imports its library first, then
notes time and memory, loads the model in float32 without a tokenizer, and computes the logits of eight ids. The sides
take turns, and the median of the rounds counts. Memory is the highest that the process ever had, above what it had
after the imports, as a multiple of the weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

BACKENDS = ("jax", "tensorflow", "torch")
# What a process runs: `load` is timed with the first logits, everything before it is not.
_SIDES = {
    "kllama": """
import keras, kllama
kllama.LlamaCausalLM  # which imports the rest
def load(path):
    model = kllama.LlamaCausalLM.from_preset(path, dtype="float32", preprocessor=None)
    return lambda ids: keras.ops.convert_to_numpy(model({"token_ids": ids, "padding_mask": None}))
""",
    "KerasHub": """
import keras, keras_hub, numpy
def load(path):
    backbone = keras_hub.models.LlamaBackbone.from_preset(path, dtype="float32")
    model = keras_hub.models.LlamaCausalLM(backbone)
    return lambda ids: keras.ops.convert_to_numpy(model({"token_ids": ids, "padding_mask": numpy.ones_like(ids)}))
""",
    "transformers": """
import torch, transformers
transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM  # which imports the rest
def load(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    def call(ids):
        with torch.no_grad():
            return model(torch.from_numpy(ids)).logits
    return call
""",
}
_MEASURE = """
import json, resource, sys, time
import numpy as np
ids = np.array([[1, 5, 6, 7, 8, 9, 10, 11]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
logits = np.asarray(load(sys.argv[1])(ids))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "bytes": 1024 * (peak - before), "logits": float(np.abs(logits).max())}))
"""


def main() -> None:
    """Measure every side, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face directory")
    parser.add_argument("--preset", type=Path, help="the same model as a preset of kllama")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    arguments = parser.parse_args()
    runs = {(name, "Hugging Face", backend): arguments.checkpoint for backend in arguments.backends for name in _SIDES}
    runs = {key: path for key, path in runs.items() if key[0] != "transformers" or key[2] == arguments.backends[0]}
    if arguments.preset is not None:
        runs |= {("kllama", "its own preset", backend): arguments.preset for backend in arguments.backends}

    results = {key: [] for key in runs}
    for _ in range(arguments.rounds):
        for (name, form, backend), path in runs.items():
            results[name, form, backend].append(measure(name, path, backend))
    weights = sum(file.stat().st_size for file in arguments.checkpoint.glob("*.safetensors"))
    show(results, weights, arguments.rounds)
    if arguments.json is not None:
        content = [{"side": list(key), "weights": weights, "runs": runs} for key, runs in results.items()]
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def measure(name: str, path: Path, backend: str) -> dict:
    """Run one side in a process of its own."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", _SIDES[name] + _MEASURE, str(path)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{name} on {backend} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def show(results: dict, weights: int, num_rounds: int) -> None:
    """Print the table: seconds, how many times as long as kllama from Hugging Face, and memory over weights."""
    table = Table(
        "backend", "side", "from", "seconds", "times kllama", "memory / weights",
        title=f"Load and first logits, {weights / 1e6:.0f} MB, float32; median of {num_rounds}; {os.cpu_count()} cores",
    )  # fmt: skip
    for (name, form, backend), runs in sorted(results.items(), key=lambda item: (item[0][2], item[0])):
        seconds = statistics.median(run["seconds"] for run in runs)
        memory = statistics.median(run["bytes"] for run in runs)
        ours = statistics.median(run["seconds"] for run in results["kllama", "Hugging Face", backend])
        backend = "torch, eager" if name == "transformers" else backend
        table.add_row(backend, name, form, f"{seconds:.2f}", f"{seconds / ours:.2f}", f"{memory / weights:.2f}")
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
