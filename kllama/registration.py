"""Makes Keras and KerasHub aware of kllama's classes, in whichever order the three are imported.

`keras.saving.load_model` and `keras_hub.models.CausalLM.from_preset` look a class up by its registered name, and a
class is registered once the file that defines it has been imported. That import costs seconds, so `import kllama` does
it at once only where Keras is loaded already. Elsewhere a finder waits on `sys.meta_path` for Keras to be imported, by
the user, by KerasHub or by kllama itself, and leaves when that has happened.

Imports nest: `keras_hub` imports `keras` long before it is whole, `tensorflow` does the same, and a file of kllama that
is itself half imported cannot be imported again from there. So the rule is: register when the *outermost* of the
watched imports in this thread has ended.

Called by `kllama/__init__.py` only.
"""

import importlib
import sys
import threading
import warnings

CLASSES = "kllama.models.llama_causal_lm"  # importing it imports the file of every registered class
WATCHED = ("keras", "keras_hub", "tensorflow")


def register_with_keras() -> None:
    """Register kllama's classes now if Keras is loaded, else as soon as it is."""
    if "keras" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _KerasWatcher())


def _register() -> None:
    """Import the classes; a failure must not break the import of another package, so it becomes a warning."""
    try:
        importlib.import_module(CLASSES)
    except Exception as error:
        message = f"Keras cannot find the classes of kllama by name, because importing them failed: {error!r}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class _KerasWatcher:
    """A meta-path finder that finds what the other finders find, and learns when an outermost watched import ends."""

    def __init__(self):
        self._importing = _Importing()
        self._lock = threading.Lock()

    def find_spec(self, name, path=None, target=None):
        if self._importing.now or (name not in WATCHED and not name.startswith("kllama.")):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _WatchedLoader(spec.loader, self)
                return spec
        return None

    def execute(self, loader, module):
        self._importing.now = True
        try:
            loader.exec_module(module)
        finally:
            self._importing.now = False
        if "keras" in sys.modules and self._leave():
            _register()

    def _leave(self):
        with self._lock:
            is_first = self in sys.meta_path
            if is_first:
                sys.meta_path.remove(self)
            return is_first


class _Importing(threading.local):
    """Whether a watched import is under way in this thread."""

    now = False


class _WatchedLoader:
    """A module's own loader, but the watcher lets it execute the module."""

    def __init__(self, loader, watcher):
        self._loader = loader
        self._watcher = watcher

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader  # from here on it is an ordinary module
        self._watcher.execute(self._loader, module)
