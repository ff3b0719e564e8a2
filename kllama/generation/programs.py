"""The compiled programs of a model, kept for the next call."""

from collections.abc import Callable, Hashable

from kllama import backend


class Programs:
    """Compiled functions by what they were compiled for.

    A plain object on purpose: Keras tracks what lies in the lists and dicts of a model as its own.
    """

    def __init__(self):
        self._programs = {}
        self._variables = []

    def get(self, settings: Hashable, variables: list, function: Callable, **options) -> Callable:
        """Give the compiled form of a function, compiled at most once for the same settings and variables.

        Args:
            settings: what the function was made for.
            variables: the `keras.Variable`s that it reads. When they are others than last time (LoRA's came, or
                quantised ones), the programs of the old ones are dropped, and with them their memory.
            function: a pure function of arrays, for `backend.compile_function`.
            **options: those of `backend.compile_function`.
        """
        if list(map(id, variables)) != list(map(id, self._variables)):
            self._programs, self._variables = {}, variables
        key = settings, *options.values()
        if key not in self._programs:
            self._programs[key] = backend.compile_function(function, variables, **options)
        return self._programs[key]
