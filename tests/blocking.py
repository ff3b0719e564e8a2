"""Keeps TensorFlow from being imported, as where it is not installed."""

import sys

BLOCKED = {"tensorflow", "tensorflow_text", "tf_keras", "tensorflow_datasets"}


class _Without:
    """A meta-path finder that finds what another one does, but for TensorFlow."""

    def __init__(self, finder, asked: set[str]):
        self._finder = finder
        self._asked = asked

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            self._asked.add(name)
            return None
        return self._finder.find_spec(name, path, target)


def block_tensorflow() -> set[str]:
    """Block it in this process from now on, and return the set to which each attempt adds the name."""
    asked = set()
    sys.meta_path[:] = [_Without(finder, asked) for finder in sys.meta_path]
    return asked
