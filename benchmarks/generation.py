"""Time greedy generation: kllama beside KerasHub, transformers and llama.cpp, with the same random weights, in one run.

    python benchmarks/generation.py --json generation.json --plot benchmarks/generation.png

Each side is a process of its own (`generation_sides.py`), which is started once and then waits: only one computes at
any time, and what the waiting ones use meanwhile is measured and said. The sides take turns, and the median of the
rounds counts. Before anything is timed, each side has to write the ids that kllama writes; where two logits are equal
but for rounding, it may go on differently. Needs Linux. `generation_report.py` makes the tables and the plot.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from bandwidth import read_bandwidth
from generation_cases import BFLOAT16, CASES, SIZES, Case, bytes_per_step, write_checkpoint
from generation_report import OTHER_DTYPE, markdown, merge, plot, show

BACKENDS = ("jax", "tensorflow", "torch")
PACKAGES = {"transformers": "transformers", "llama.cpp": "llama_cpp"}
VERSIONS = ("keras", "keras-hub", "jax", "tensorflow", "torch", "transformers", "llama_cpp_python", "numpy")
TIE = {"llama.cpp": 5e-3}
"""How far apart two logits may be, in standard deviations of all, for their order to be a matter of rounding.

1e-4 where nothing is said; llama.cpp computes rotations and exponentials less exactly.
"""
FRESH = "fresh"  # compile times and memory, each in a new process


def main() -> None:
    """Measure what was asked for, print it, and write it to files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in CASES] + [FRESH]
    parser.add_argument("--cases", nargs="+", default=names, choices=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS, help="torch brings the others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round: does this script work?")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    parser.add_argument("--plot", type=Path, help="draw tokens per second into this PNG")
    parser.add_argument("--table", type=Path, nargs="+", help="measure nothing: print files of --json as Markdown")
    arguments = parser.parse_args()
    if arguments.table:
        report = merge([json.loads(path.read_text(encoding="utf-8")) for path in arguments.table])
        print(markdown(report))
    else:
        report = measure(arguments)
        show(report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        plot(report, arguments.plot)
    if report["refused"]:
        sys.exit("Some sides wrote other ids than kllama, and have no figures there.")


def measure(arguments: argparse.Namespace) -> dict:
    """Run all backends, one after the other."""
    start = time.perf_counter()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # of all processes from here on
    readings = read_bandwidth(arguments.threads)
    rounds = 1 if arguments.quick else arguments.rounds
    results, fresh, refused = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for backend in arguments.backends:
            bench = Bench(backend, Path(folder), arguments.threads, "tiny" if arguments.quick else None)
            for case in CASES:
                if case.name in arguments.cases:
                    results += bench.run(case.small() if arguments.quick else case, rounds)
            bench.close()
            refused += bench.refused
            if FRESH in arguments.cases:
                fresh += bench.run_fresh()
    readings += read_bandwidth(arguments.threads)  # again: something else may have run the first time
    bandwidth = max(reading.best for reading in readings)
    results = [{**result, "bandwidth": bandwidth} for result in results]
    say(f"{time.perf_counter() - start:.0f} s in all")
    versions = {
        package: version(package) for package in VERSIONS if importlib.util.find_spec(package.replace("-", "_"))
    }
    machine = {"threads": arguments.threads, "python": sys.version.split()[0], "versions": versions}
    return {"machine": machine, "rounds": rounds, "results": results, "fresh": fresh, "refused": refused}


class Process:
    """A side that runs; requests go to it as lines of JSON."""

    def __init__(self, side: str, backend: str, cache: Path, threads: int):
        self.library, _, dtype = side.partition(" ")
        self.dtype = dtype or "float32"
        self.loaded = {}
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "OMP_NUM_THREADS": str(threads),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("generation_sides.py"), self.library, self.dtype],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def receive(self) -> dict:
        """Wait for the answer to the last request."""
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{self.library} failed:\n{self._errors.read()[-3000:]}")
        return json.loads(line)

    def ask(self, do: str, **request) -> dict:
        """Send a request and wait for the answer."""
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        return self.receive()

    def processor_seconds(self) -> float:
        """Tell for how long it has computed so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()


class Bench:
    """One Keras backend with the sides that belong to it; those that are no Keras libraries belong to torch.

    Args:
        backend: of Keras.
        folder: where the checkpoints and JAX's compiled programs lie.
        threads: of each side.
        only_model: the model of all cases, for a quick run.

    Attributes:
        refused: what was left out because a side wrote other ids than kllama.
    """

    def __init__(self, backend: str, folder: Path, threads: int, only_model: str | None):
        self.backend, self.folder, self.threads = backend, folder, threads
        self.only_model = only_model
        self.processes = {}
        self.refused = []

    def run(self, case: Case, rounds: int) -> list[dict]:
        """Let the sides take turns, and give a result for each."""
        sides = [side for side in case.sides if self._has(side)]
        if len(sides) == 1:
            return []  # nothing to compare it with
        processes = {side: self._process(side, case.model) for side in sides}
        requests, first = self._requests(processes["kllama"], case)
        news = {}
        for side, process in processes.items():
            say(f"{self.backend}, {case.name}: {side} warms up")
            process.ask("write", **first)  # compiles
            news[side] = process.ask("write", **requests)["new"]
        agreements = {side: self._agreement(case, side, requests, news) for side in processes}
        processes = {side: process for side, process in processes.items() if agreements[side]}
        times = {side: ([], [], [], []) for side in processes}
        for number in range(rounds):
            say(f"{self.backend}, {case.name}: round {number + 1}")
            for side in processes:
                turn = [requests] if number % 2 else [requests, first]
                self._take_turn(processes, side, turn, times[side])
        return [
            {
                "backend": self.backend,
                "library": process.library,
                "dtype": process.dtype,
                "case": case.name,
                "title": case.title,
                "model": case.model,
                "num_rows": len(case.lengths),
                "num_new": case.num_new,
                "seconds": times[side][0],
                "first": times[side][1],
                "idle": sum(times[side][2]) / sum(times[side][3]),
                "bytes_per_step": bytes_per_step(case, process.dtype),
                "agreement": agreements[side],
            }
            for side, process in processes.items()
        ]

    def _has(self, side: str) -> bool:
        if side not in PACKAGES:
            return True
        if self.backend != "torch":
            return False
        if importlib.util.find_spec(PACKAGES[side]) is None:
            say(f"{side} is left out: the package {PACKAGES[side]} is not installed")
            return False
        return True

    def _process(self, side: str, model: str) -> Process:
        """Give the process of a side, with a model loaded."""
        if side not in self.processes:
            self.processes[side] = Process(side, self.backend, self.folder / "programs", self.threads)
            self.processes[side].receive()  # it has imported its library
        process = self.processes[side]
        if model not in process.loaded:
            process.loaded[model] = process.ask("load", model=model, path=str(self._checkpoint(model, side)))
        return process

    def _checkpoint(self, model: str, side: str) -> Path:
        """Give the path of a model's weights, which are written on first use."""
        path = self.folder / model
        if not path.exists():
            write_checkpoint(path, SIZES[model])
        if side == "llama.cpp" and not Path(f"{path}.gguf").exists():
            export = "import sys, kllama\nmodel = kllama.LlamaCausalLM.from_preset(sys.argv[1], preprocessor=None)\n"
            command = [sys.executable, "-W", "ignore", "-c", export + "model.export_gguf(sys.argv[2])"]
            environment = {**os.environ, "KERAS_BACKEND": self.backend}
            subprocess.run([*command, path, f"{path}.gguf"], env=environment, check=True, capture_output=True)
        return path

    def _requests(self, kllama: Process, case: Case) -> tuple[dict, dict]:
        """Give the request of a case, and the one for the first new token alone."""
        generator = np.random.default_rng(case.num_new)
        while True:
            prompts = [generator.integers(0, SIZES[case.model].V, length).tolist() for length in case.lengths]
            request = {"model": case.model, "prompts": prompts, "num_new": case.num_new, "width": case.width}
            request["stop"] = None
            first = {**request, "num_new": 1, "width": max(case.lengths) + 1}
            if not case.has_stop():
                return request, first
            new = kllama.ask("write", **request)["new"][0]
            if new[-1] not in new[:-1]:  # a stop id has to be the last new one, and that one only
                return {**request, "stop": new[-1]}, {**first, "width": case.width, "stop": new[0]}

    def _agreement(self, case: Case, side: str, request: dict, news: dict) -> str | None:
        """Say how the ids of a side agree with kllama's; None for a side that is refused because they do not."""
        ties = []
        for prompt, ours, theirs in zip(request["prompts"], news["kllama"], news[side], strict=True):
            if ours == theirs:
                continue
            if side == BFLOAT16:
                return OTHER_DTYPE
            at = next((i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), None)
            gap = 0 if at is None else self._gap(request["model"], prompt + ours[:at], [ours[at], theirs[at]])
            if at is None or gap > TIE.get(side, 1e-4):
                what = f"{len(theirs)} ids" if at is None else f"another id {at}, whose logit is {gap:.1e} away"
                self.refused.append(f"{case.name}, {self.backend}: {side} wrote {what}")
                say(self.refused[-1])
                return None
            ties.append(f"{at} of a prompt of {len(prompt)}")
        return f"equal up to a tie at new token {', '.join(ties)}" if ties else "equal"

    def _gap(self, model: str, row: list[int], ids: list[int]) -> float:
        """Give how far apart the logits of two ids are that could follow a row."""
        return self.processes["kllama"].ask("gap", model=model, row=row, ids=ids)["gap"]

    def _take_turn(self, processes: dict, side: str, requests: list[dict], times: tuple) -> None:
        """Note the time of each call, and in the last two lists what the others computed meanwhile."""
        waiting = [process for name, process in self.processes.items() if name != side]
        before, start = sum(process.processor_seconds() for process in waiting), time.perf_counter()
        for request, seconds in zip(requests, times, strict=False):
            seconds.append(processes[side].ask("write", **request)["seconds"])
        used = sum(process.processor_seconds() for process in waiting) - before
        times[2].append(used)
        times[3].append(time.perf_counter() - start)
        time.sleep(0.05)  # threads that look out for more work go to sleep

    def close(self) -> None:
        """End the processes."""
        for process in self.processes.values():
            process.close()
        self.processes.clear()

    def run_fresh(self) -> list[dict]:
        """Measure first calls and memory, each in a new process; on JAX a second one finds compiled programs."""
        model = self.only_model or "110M"
        case = next(case for case in CASES if case.name == "short-110M")
        case = case.small() if self.only_model else case
        request = {"model": model, "prompts": [list(range(case.lengths[0]))], "num_new": case.num_new}
        results = []
        for side in filter(self._has, case.sides):
            cache = self.folder / f"programs of {side}"
            for is_filled in (False, True) if self.backend == "jax" and side != BFLOAT16 else (False,):
                say(f"{self.backend}, new process: {side}")
                process = Process(side, self.backend, cache, self.threads)
                imported = process.receive()
                loaded = process.ask("load", model=model, path=str(self._checkpoint(model, side)))
                calls = [process.ask("write", **request, width=case.width, stop=None) for _ in range(2)]
                process.close()
                results.append(
                    {
                        "backend": self.backend,
                        "library": process.library,
                        "dtype": process.dtype,
                        "model": model,
                        "has_programs": is_filled,
                        "load": loaded["seconds"],
                        "first_call": calls[0]["seconds"],
                        "later_call": calls[1]["seconds"],
                        "loaded": loaded["resident"] - imported["resident"],
                        "held": calls[-1]["resident"] - imported["resident"],
                        "peak": calls[-1]["peak"] - imported["resident"],
                        "weights": 4 * SIZES[model].num_weights(),
                    }
                )
        return results


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
