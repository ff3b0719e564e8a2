"""Programs on JAX: how a function becomes one, how it loops, and where it is kept for the next process."""

import functools
import os
import pathlib
import sys
import weakref

import jax
import keras

CACHE_VARIABLE = "KLLAMA_COMPILE_CACHE"
"""The environment variable that keeps compiled programs off the disk if it is `0`."""
_WORTH_KEEPING = 0.2  # seconds of compilation; JAX's own default of 1 leaves out the programs of small models


def run_while(is_running, step, state, is_capturable: bool = False):
    """Give the state after `state = step(state)` was done for as long as `is_running(state)`.

    Args:
        is_running: function (state) -> bool scalar.
        step: function (state) -> state.
        state: nested arrays, used up.
        is_capturable: as for `run_steps`.
    """
    del is_capturable
    return jax.lax.while_loop(is_running, step, state)


def run_steps(step, is_over, caches, rest, num_steps, most_steps: int, is_capturable: bool = True):
    """Take steps until there were `num_steps` of them, or it is over.

    Args:
        step: function (caches, rest) -> (caches, rest), both nested arrays. It writes to the caches in place, and if
            it is taken once too often, it writes there only what the next step would write, too.
        is_over: function (rest) -> bool scalar.
        caches: used up.
        rest: the rest of the state.
        num_steps: int32 scalar.
        most_steps: what `num_steps` is at most.
        is_capturable: whether a step does nothing but compute; JAX knows no other steps.

    Returns:
        `(caches, rest)`.
    """
    del most_steps, is_capturable  # a loop on an accelerator asks the host after each turn, which a step dwarfs

    def is_running(carry):
        num_taken, _, rest = carry
        return (num_taken < num_steps) & ~is_over(rest)

    def take(carry):
        num_taken, caches, rest = carry
        return num_taken + 1, *step(caches, rest)

    return jax.lax.while_loop(is_running, take, (0, caches, rest))[1:]


def compile_function(
    function, variables, *, donates: bool = False, is_eager: bool = False, jit_compile: bool | str = "auto"
):
    """Compile `function(*arrays)`, which reads Keras variables.

    Args:
        function: a pure function of nested arrays, traced once for each set of shapes.
        variables: the `keras.Variable`s that it reads. Their values at each call are used, never those at compilation.
        donates: whether the memory of the first argument may be used for the result: the caller gives it away.
        is_eager: whether to leave it as it is, so that it can be debugged.
        jit_compile: whether to compile it with XLA; JAX knows no other way and always does.

    Returns:
        Function `(*arrays)`; its `lower(*arrays)` is that of `jax.jit`.
    """
    del jit_compile
    if is_eager:
        return function
    keep_programs()
    references = [weakref.ref(variable) for variable in variables]  # which are not to live for a program's sake

    @functools.partial(jax.jit, donate_argnums=1 if donates else ())
    def traced(values, *arrays):
        variables = [reference() for reference in references]
        with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
            return function(*arrays)

    def run(*arrays):
        return traced([reference().value for reference in references], *arrays)

    run.lower = lambda *arrays: traced.lower([reference().value for reference in references], *arrays)
    return run


def keep_programs() -> None:
    """Let JAX keep compiled programs on disk, so that another process need not compile them; once is enough.

    A folder that JAX was given already stays. JAX cannot tell our programs from others of the process, so it keeps
    those, too. `KLLAMA_COMPILE_CACHE=0` leaves everything as it is, and so does a folder that cannot be written to.
    """
    is_configured = jax.config.jax_compilation_cache_dir is not None
    if is_configured or os.environ.get(CACHE_VARIABLE) == "0" or not jax.config.jax_enable_compilation_cache:
        return
    folder = _cache_home() / "kllama" / "jax"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if jax.config.jax_persistent_cache_min_compile_time_secs > _WORTH_KEEPING:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)


def _cache_home() -> pathlib.Path:
    """Give the folder where programs of this user keep what they can make again."""
    if home := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(home)
    if sys.platform == "darwin":
        return pathlib.Path.home() / "Library" / "Caches"
    if sys.platform == "win32" and (home := os.environ.get("LOCALAPPDATA")):
        return pathlib.Path(home)
    return pathlib.Path.home() / ".cache"
