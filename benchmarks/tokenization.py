"""Time kllama's tokenizer beside those of transformers and KerasHub, on the same text, in one run.

    KERAS_BACKEND=jax python benchmarks/tokenization.py speeches.jsonl --llama3 tokenizer.json --llama2 folder

The sides take turns, round after round, and the median of the rounds counts, so that what else the machine does meets
all of them alike. Nobody's threads are limited: each side uses the cores as it ships. A side that is too slow for the
whole text gets a share of it, which the table shows. The file is not called after the package that it imports.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import keras_hub
import tokenizers
import transformers
from rich.console import Console
from rich.table import Table

import kllama

PACKAGES = ("tokenizers", "transformers", "keras-hub", "sentencepiece", "tensorflow-text")
TRIAL_BYTES = 50_000


class Side(NamedTuple):
    """A tokenizer under test. Both functions take a list, or one text (one row of ids) alone."""

    name: str
    encode: Callable
    decode: Callable


class Result(NamedTuple):
    """One line of the table."""

    vocabulary: str
    texts: str
    direction: str
    side: str
    share: float  # of the text
    seconds: list[float]  # one a round, for this share
    megabytes_per_second: float
    factor: float  # how many times as long as kllama this side takes
    same_output: bool


def main() -> None:
    """Read the text, time every side on it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="a .jsonl file whose rows have a field `text`, or plain text")
    parser.add_argument("--llama3", type=Path, help="a tokenizer.json with byte-level BPE")
    parser.add_argument("--llama2", type=Path, help="a folder with tokenizer.json and tokenizer.model of sentencepiece")
    parser.add_argument("--megabytes", type=float, default=5.0, help="how much of the text is used")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="a side slower than this gets a share of the text")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    arguments = parser.parse_args()
    if arguments.llama3 is None and arguments.llama2 is None:
        parser.error("expected --llama3, --llama2 or both")

    documents = read_documents(arguments.text, arguments.megabytes)
    sentences = [part for document in documents for part in re.split(r"(?<=[.!?]) |\n", document) if part]
    inputs = {"documents": documents, "sentences": sentences, "one text": "\n".join(documents)}
    makers = {"Llama 3": (arguments.llama3, llama3_sides), "Llama 2": (arguments.llama2, llama2_sides)}
    results = []
    for vocabulary, (path, make_sides) in makers.items():
        if path is not None:
            sides = make_sides(path)
            for name, texts in inputs.items():
                results += measure(vocabulary, name, texts, sides, arguments.rounds, arguments.seconds)
    show(results, documents, sentences, arguments.rounds)
    if arguments.json is not None:
        report = {"machine": machine(), "results": [result._asdict() for result in results]}
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def read_documents(path: Path, megabytes: float) -> list[str]:
    """Return documents of the file, up to so many megabytes of UTF-8."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        documents = [json.loads(line)["text"] for line in content.splitlines()]
    else:
        documents = [part for part in content.split("\n\n") if part]
    return take(documents, int(megabytes * 1e6))


def take(texts: list[str] | str, num_bytes: int) -> list[str] | str:
    """Return the first texts, or the start of the one text, up to so many bytes and not less than one text."""
    if isinstance(texts, str):
        return texts.encode()[:num_bytes].decode(errors="ignore")
    taken, size = [], 0
    for text in texts:
        size += len(text.encode())
        if taken and size > num_bytes:
            break
        taken.append(text)
    return taken


def num_bytes(texts: list[str] | str) -> int:
    """Return the size of one text or of several in UTF-8."""
    return len(texts.encode()) if isinstance(texts, str) else sum(len(text.encode()) for text in texts)


def llama3_sides(path: Path) -> list[Side]:
    """Open a tokenizer.json with every library."""
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    keras_hubs = {
        name: keras_hub.tokenizers.Llama3Tokenizer(vocabulary, merges, _allow_python_workflow=not in_graph)
        for name, in_graph in (("KerasHub", False), ("KerasHub, TF", True))
    }
    return [*rust_sides(path), *(Side(name, hub, hub.detokenize) for name, hub in keras_hubs.items())]


def llama2_sides(folder: Path) -> list[Side]:
    """Open a sentencepiece vocabulary with every library."""
    proto = (folder / "tokenizer.model").read_bytes()
    keras_hubs = {
        name: keras_hub.tokenizers.LlamaTokenizer(proto, _allow_python_workflow=not in_graph)
        for name, in_graph in (("KerasHub", False), ("KerasHub, TF", True))
    }
    sides = rust_sides(folder / "tokenizer.json")
    return [*sides, *(Side(name, hub, hub.detokenize) for name, hub in keras_hubs.items())]


def rust_sides(path: Path) -> list[Side]:
    """Open a tokenizer.json with kllama, with transformers, and with the library beneath both."""
    ours = kllama.LlamaTokenizer(path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    bare = tokenizers.Tokenizer.from_file(str(path))

    def encode_theirs(texts):
        return theirs(texts, add_special_tokens=False)["input_ids"]

    def encode_bare(texts):
        batch = [texts] if isinstance(texts, str) else texts
        rows = [encoding.ids for encoding in bare.encode_batch_fast(batch, add_special_tokens=False)]
        return rows[0] if isinstance(texts, str) else rows

    def decode_bare(rows):
        if rows and isinstance(rows[0], int):
            return bare.decode(rows, skip_special_tokens=False)
        return bare.decode_batch(rows, skip_special_tokens=False)

    return [
        Side("kllama", ours.tokenize, ours.detokenize),
        Side("tokenizers", encode_bare, decode_bare),
        Side("transformers", encode_theirs, theirs.decode),
    ]


def measure(vocabulary, name, texts, sides: list[Side], num_rounds: int, seconds: float) -> list[Result]:
    """Time encoding and decoding of one text or of a list on every side, the sides by turns."""
    results = []
    for direction in ("encode", "decode"):
        jobs = [Job(side, direction, texts, sides[0], seconds) for side in sides]
        for _ in range(num_rounds):
            for job in jobs:
                job.run()
        for job in jobs:
            speed = job.num_bytes / statistics.median(job.seconds) / 1e6
            base = jobs[0].num_bytes / statistics.median(jobs[0].seconds) / 1e6
            share = job.num_bytes / num_bytes(texts)
            results.append(
                Result(vocabulary, name, direction, job.side.name, share, job.seconds, speed, base / speed, job.is_same)
            )
    return results


class Job:
    """One side in one direction, on as much of the text as it can do in the time."""

    def __init__(self, side: Side, direction: str, texts: list[str] | str, reference: Side, seconds: float):
        self.side, self.seconds = side, []
        self._call = side.encode if direction == "encode" else side.decode
        expected = reference.encode if direction == "encode" else reference.decode
        trial = take(texts, TRIAL_BYTES)
        self._inputs = _inputs(trial, direction, reference)
        self.run()  # compiles, and fills caches
        self.run()
        allowed = int(seconds / self.seconds[-1] * num_bytes(trial))
        used = trial if allowed < num_bytes(trial) else take(texts, allowed)
        self.num_bytes = num_bytes(used)
        self._inputs = _inputs(used, direction, reference)
        self.is_same = _plain(self._call(self._inputs)) == _plain(expected(self._inputs))
        self.seconds.clear()

    def run(self) -> None:
        """Do it once and note the time."""
        start = time.perf_counter()
        self._call(self._inputs)
        self.seconds.append(time.perf_counter() - start)


def _inputs(texts, direction: str, reference: Side):
    if direction == "encode":
        return texts
    rows = reference.encode(texts)
    return rows if isinstance(rows, list) else rows.tolist()


def _plain(output):
    """Return ids or texts as lists and str, whatever a library gives."""
    if hasattr(output, "to_list"):  # a ragged tensor
        return output.to_list()
    if hasattr(output, "numpy") or hasattr(output, "tolist"):
        output = output.numpy() if hasattr(output, "numpy") else output
        output = output.tolist() if hasattr(output, "tolist") else output
    if isinstance(output, bytes):
        return output.decode()
    return [_plain(row) if not isinstance(row, int | str) else row for row in output] if _is_rows(output) else output


def _is_rows(output) -> bool:
    return isinstance(output, list | tuple)


def machine() -> dict:
    """Return what the figures depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": {"kllama": kllama.__version__} | {package: version(package) for package in PACKAGES},
    }


def show(results: list[Result], documents: list[str], sentences: list[str], num_rounds: int) -> None:
    """Print the table: one row for a vocabulary, a form of the text and a direction; one column for a side."""
    names = list(dict.fromkeys(result.side for result in results))
    title = (
        f"MB/s, and how many times as fast kllama is. {num_bytes(documents) / 1e6:.1f} MB as {len(documents)} "
        f"documents, {len(sentences)} sentences, or one text; median of {num_rounds} rounds; {os.cpu_count()} cores."
    )
    table = Table(
        "", "", "", *names, title=title, caption="* other output than kllama. %: share of the text, if not all."
    )
    for key in dict.fromkeys(result[:3] for result in results):
        row = {result.side: result for result in results if result[:3] == key}
        table.add_row(*key, *(_cell(row[name]) for name in names))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _cell(result: Result) -> str:
    share = f" ({result.share:.0%})" if result.share < 0.99 else ""
    return f"{result.megabytes_per_second:.2f}  {result.factor:.2f}x{'' if result.same_output else '*'}{share}"


if __name__ == "__main__":
    main()
