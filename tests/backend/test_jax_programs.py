"""How loops run on JAX, and what is kept on disk for the next process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kllama import backend

pytestmark = pytest.mark.only_on("jax")
ROOT = Path(__file__).resolve().parents[2]


def fill(cache, rest):
    """Write the next number to the next place of a cache, as a step of the engine writes keys and values."""
    index, last = rest
    return backend.write_slots(cache, (last + 1)[:, None, None], index), (index + 1, last + 1)


@pytest.mark.parametrize(("num_steps", "taken"), [(0, 0), (3, 3), (7, 5)])
def test_run_steps(num_steps, taken):
    def run(cache, last, num_steps):
        rest = backend.arange(1, last)[0], last
        return backend.run_steps(fill, lambda rest: rest[0] >= 5, cache, rest, num_steps, 8)

    program = backend.compile_function(run, [], donates=True)
    arrays = np.zeros((1, 9, 1), "float32"), np.ones(1, "float32"), np.int32(num_steps)
    cache, (index, last) = program(*(backend.constant(array, None) for array in arrays))
    assert (int(index), float(last[0])) == (taken, 1 + taken)
    assert cache[0, :taken, 0].tolist() == list(range(2, 2 + taken))
    assert not cache[0, taken:, 0].any()


ONE_PROGRAM = """
import sys, time, jax, keras, numpy as np
from kllama import backend
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
if sys.argv[1:]:
    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
variable = keras.Variable(np.ones((4, 4), "float32"))
def function(x):
    for _ in range(60):  # long enough to compile to be worth keeping
        x = jax.numpy.linalg.inv(jax.numpy.sort(x @ variable.value) + x)
    return x
backend.compile_function(function, [variable])(jax.numpy.eye(4))
print(jax.config.jax_compilation_cache_dir, hits.count("/jax/compilation_cache/cache_hits"))
"""


def run_one_program(folder, *arguments, **variables) -> tuple[str, int]:
    """Compile a program in a process of its own: `(where JAX keeps programs, how many it took from there)`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"KERAS_BACKEND": "jax", "XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", ONE_PROGRAM, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    where, num_hits = run.stdout.split()[-2:]
    return where, int(num_hits)


def test_the_next_process_takes_programs_from_the_disk(tmp_path):
    kept = str(tmp_path / "kllama" / "jax")
    assert run_one_program(tmp_path) == (kept, 0)
    assert os.stat(kept).st_mode & 0o077 == 0  # who can write there could make this user run anything
    where, num_hits = run_one_program(tmp_path)
    assert where == kept and num_hits >= 1


@pytest.mark.parametrize("case", ["switched off", "another folder", "no folder"])
def test_what_is_left_alone(tmp_path, case):
    home, own = tmp_path / "home", tmp_path / "own"
    if case == "no folder":
        home.write_text("a file")
    arguments = [str(own)] if case == "another folder" else []
    variables = {"KLLAMA_COMPILE_CACHE": "0"} if case == "switched off" else {}
    where, _ = run_one_program(home, *arguments, **variables)
    assert where == (str(own) if case == "another folder" else "None")
    assert not (home / "kllama").exists()
