"""Runs the test suite once per backend: `python -m tests [pytest arguments]`.

Keras fixes its backend when it is imported, so each backend gets a process of its own. The last line sums the three:
`N passed, N failed, N skipped`. The exit code is 0 only if no test failed and every backend ran at least one.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("jax", "tensorflow", "torch")
PYTEST = ("-m", "pytest", "-n", "2", "-q", "--durations=5")

# Two workers share the machine: without this each would start a thread for every core, in each of its libraries.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    # Thousands of tiny programs are compiled here, and none of them is worth optimising.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
ONE_THREAD_OF_JAX = " --xla_cpu_multi_thread_eigen=false"  # TensorFlow heeds the numbers above
# What one worker has compiled the other one, and a process that a test starts, takes from the disk.
COMPILE_ONCE = {
    "JAX_COMPILATION_CACHE_DIR": "{}/jax",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "TF_XLA_FLAGS": "--tf_xla_persistent_cache_directory={}/tensorflow",
}


class Outcome(NamedTuple):
    """What one run of pytest came to."""

    passed: int
    failed: int
    skipped: int
    exit_code: int

    @property
    def ok(self) -> bool:
        """Whether tests ran and none of them failed."""
        return self.exit_code == 0 and self.passed > 0

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def read_report(path: Path, exit_code: int) -> Outcome:
    """Count the tests in pytest's JUnit report; a run that broke off before writing one counts as one failure."""
    if not path.exists():
        return Outcome(0, 0 if exit_code == 0 else 1, 0, exit_code)
    counts = ElementTree.parse(path).getroot().find("testsuite").attrib
    failed = int(counts["failures"]) + int(counts["errors"])
    skipped = int(counts["skipped"])
    return Outcome(int(counts["tests"]) - failed - skipped, failed, skipped, exit_code)


def run_backend(backend: str, arguments: list[str]) -> Outcome:
    """Run pytest in a new process whose Keras runs on `backend`."""
    print(f"\n== {backend} ==", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, **ONE_THREAD, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment |= {name: value.format(directory) for name, value in COMPILE_ONCE.items()}
        environment["XLA_FLAGS"] += ONE_THREAD_OF_JAX if backend == "jax" else ""
        report = Path(directory, "report.xml")
        command = [sys.executable, *PYTEST, f"--junitxml={report}", *arguments]
        exit_code = subprocess.run(command, env=environment, cwd=ROOT).returncode
        return read_report(report, exit_code)


def main(arguments: list[str]) -> int:
    """Run every backend, print a line for each and their sum, and return the exit code."""
    outcomes = {backend: run_backend(backend, arguments) for backend in BACKENDS}
    print()
    for backend, outcome in outcomes.items():
        note = "" if outcome.ok else f"  (pytest exit code {outcome.exit_code})"
        print(f"{backend:<12}{outcome}{note}")
    passed, failed, skipped, _ = map(sum, zip(*outcomes.values(), strict=True))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if all(outcome.ok for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
