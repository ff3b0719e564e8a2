"""The compiled programs of a model, kept for the next call of `generate`."""

import functools
import threading
import weakref
from collections.abc import Callable, Hashable

from kllama import backend

MAX_PROGRAMS = 128
"""How many are kept; those used longest ago go. A caller may pass a new function of his own with each call."""


class Programs:
    """Compiled functions by what they were compiled for; a model's `generate_function`.

    A plain object on purpose: Keras tracks what lies in the lists and dicts of a model as its own.

    Args:
        variables: the `keras.Variable`s of the model. Programs are good for these alone: others (LoRA's came, or
            quantised ones) need new programs.
        call_with_cache: the forward pass that they run, which the user may have replaced.
        generate_step: what a call of this object runs: KerasHub's protocol, compiled by KerasHub.
    """

    def __init__(self, variables: list, call_with_cache: Callable, generate_step: Callable):
        # The variables are not kept alive, and where one has gone, nor are programs that may hold its value.
        self._variables = [weakref.ref(variable, lambda _: self._programs.clear()) for variable in variables]
        self._call_with_cache = call_with_cache
        self._generate_step = generate_step
        self._programs, self._lock = {}, threading.Lock()

    def __call__(self, inputs: dict, stop_token_ids=None) -> dict:
        """Run `generate_step` of the model; arguments and result are those of that method."""
        return self._generate_step(inputs, stop_token_ids=stop_token_ids)

    def are_for(self, variables: list, call_with_cache: Callable) -> bool:
        """Tell whether the programs were made for these very variables, and for this forward pass."""
        if call_with_cache != self._call_with_cache or len(variables) != len(self._variables):
            return False
        return all(own() is variable for own, variable in zip(self._variables, variables, strict=True))

    def get(self, settings: Hashable, function: Callable, **options) -> Callable:
        """Give the compiled form of a function, compiled at most once for the same settings.

        Args:
            settings: what the function was made for.
            function: a pure function of arrays, for `backend.compile_function`.
            **options: those of `backend.compile_function`.

        Returns:
            Function `(*arrays)`, which keeps the variables alive: a stream may go on after a model has got others.
        """
        key = settings, *options.values()
        variables = [variable for reference in self._variables if (variable := reference()) is not None]
        with self._lock:
            program = self._programs.pop(key, None)
            if program is None:
                program = backend.compile_function(function, variables, **options)
            self._programs[key] = program  # the one used last is last
            if len(self._programs) > MAX_PROGRAMS:
                del self._programs[next(iter(self._programs))]
        return functools.partial(_run, program, variables)


def _run(program: Callable, variables: list, *arrays):
    del variables
    return program(*arrays)
