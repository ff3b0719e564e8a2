"""The compiled programs of a model, kept for the next call of `generate`."""

from collections.abc import Callable, Hashable

from kllama import backend


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
        self._variables = variables
        self._call_with_cache = call_with_cache
        self._generate_step = generate_step
        self._programs = {}

    def __call__(self, inputs: dict, stop_token_ids=None) -> dict:
        """Run `generate_step` of the model; arguments and result are those of that method."""
        return self._generate_step(inputs, stop_token_ids=stop_token_ids)

    def are_for(self, variables: list, call_with_cache: Callable) -> bool:
        """Tell whether the programs were made for these very variables, and for this forward pass."""
        is_same = list(map(id, variables)) == list(map(id, self._variables))
        return is_same and call_with_cache == self._call_with_cache

    def get(self, settings: Hashable, function: Callable, **options) -> Callable:
        """Give the compiled form of a function, compiled at most once for the same settings.

        Args:
            settings: what the function was made for.
            function: a pure function of arrays, for `backend.compile_function`.
            **options: those of `backend.compile_function`.
        """
        key = settings, *options.values()
        if key not in self._programs:
            self._programs[key] = backend.compile_function(function, self._variables, **options)
        return self._programs[key]
