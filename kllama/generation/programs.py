"""The compiled programs of a model, kept for the next call."""

from collections.abc import Callable, Hashable

from kllama import backend


class Programs:
    """Compiled functions by what they were compiled for.

    A plain object on purpose: Keras tracks what lies in the lists and dicts of a model as its own.
    """

    def __init__(self):
        self._programs = {}

    def get(self, settings: Hashable, variables: list, function: Callable) -> Callable:
        """Give the compiled form of a function, compiled at most once for each settings and set of variables.

        Args:
            settings: what the function was made for.
            variables: the `keras.Variable`s that it reads. New ones (LoRA's, say) make another program.
            function: a pure function of arrays, for `backend.compile_function`.
        """
        key = settings, *map(id, variables)
        if key not in self._programs:
            # The variables are kept beside the program, so that no other variable can get the id of one.
            self._programs[key] = backend.compile_function(function, variables), variables
        return self._programs[key][0]
