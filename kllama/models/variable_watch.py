"""Noticing that a model's variables are not those that a function was compiled for."""

import weakref


class VariableWatch:
    """Remember, for each of several purposes, which variables there were, and keep none of them alive.

    LoRA, quantisation and a larger vocabulary replace variables, also those of another model that has the same
    backbone; what TensorFlow has compiled goes on with the old ones. A plain object on purpose: Keras tracks what lies
    in the lists and dicts of a model as its own.
    """

    def __init__(self):
        self._seen = {}

    def has_changed(self, purpose: str, variables: list) -> bool:
        """Tell whether the variables are others than at the last call for this purpose, and remember them."""
        before, self._seen[purpose] = self._seen.get(purpose), [weakref.ref(variable) for variable in variables]
        if before is None or len(before) != len(variables):
            return before is not None
        return any(seen() is not variable for seen, variable in zip(before, variables, strict=True))
