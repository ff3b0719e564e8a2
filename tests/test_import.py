"""What `import kllama` costs, and how Keras finds kllama's classes in every order of imports. Each in a new process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import keras_hub
import pytest

import kllama

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, *path: Path) -> str:
    """Run Python code in a new process, with `path` ahead of everything else, and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.backend_independent
class TestImport:
    def test_loads_neither_keras_nor_numpy(self):
        heavy = "{'keras', 'keras_hub', 'numpy', 'click', 'rich', 'h5py', 'tokenizers', 'safetensors'}"
        assert run(f"import sys, kllama; print({heavy} & set(sys.modules))") == "set()"

    def test_takes_milliseconds(self):
        code = """
            import time
            start = time.perf_counter()
            import kllama
            print(time.perf_counter() - start)
        """
        assert min(float(run(code)) for _ in range(3)) < 0.05

    def test_names_are_listed_before_they_are_loaded(self):
        assert run("import kllama; print(set(kllama.__all__) <= set(dir(kllama)))") == "True"

    def test_unknown_name(self):
        with pytest.raises(AttributeError, match="'kllama' has no attribute 'Llama'"):
            kllama.Llama  # noqa: B018


@pytest.fixture
def stubs(tmp_path):
    """Stand-ins that import in no time: keras, keras_hub, tensorflow, and kllama's classes in `kllama.stub_models`.

    Each prints its name when it is whole, so the output is the order in which the imports ended.
    """
    files = {
        "keras/__init__.py": "print('keras')",
        "keras_hub/__init__.py": "import keras\nprint('keras_hub')",
        "tensorflow/__init__.py": "import keras\nprint('tensorflow')",
        "rooms/stub_layers.py": "import keras_hub\nclass Layer: pass\nprint('layers')",
        "rooms/stub_models.py": "import tensorflow, keras_hub\nfrom kllama.stub_layers import Layer\nprint('models')",
    }
    for name, code in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    return tmp_path


@pytest.mark.backend_independent
class TestRegistration:
    """The mechanism alone, on stand-ins."""

    PROLOGUE = """
import sys, warnings
warnings.simplefilter("error")
def aim(kllama):
    kllama.registration.CLASSES = "kllama.stub_models"
    kllama.__path__.append(ROOMS)
"""

    def order(self, stubs, code):
        prologue = self.PROLOGUE.replace("ROOMS", repr(str(stubs / "rooms")))
        return run(prologue + textwrap.dedent(code), stubs).split()

    @pytest.mark.parametrize(
        "then, order",
        [
            ("import keras", "keras tensorflow keras_hub layers models"),
            ("import keras_hub", "keras keras_hub tensorflow layers models"),
            ("import tensorflow", "keras tensorflow keras_hub layers models"),
            ("import kllama.stub_layers", "keras keras_hub layers tensorflow models"),
            ("import kllama.stub_models", "keras tensorflow keras_hub layers models"),
            ("from kllama.stub_models import Layer", "keras tensorflow keras_hub layers models"),
            ("import kllama.errors", ""),
        ],
    )
    def test_waits_for_the_outermost_import(self, stubs, then, order):
        assert self.order(stubs, f"import kllama; aim(kllama)\n{then}") == order.split()

    def test_leaves_nothing_behind(self, stubs):
        code = """
            import kllama; aim(kllama)
            before = len(sys.meta_path)
            import keras_hub, keras
            print(before - len(sys.meta_path))
            print(type(keras_hub.__loader__).__name__, type(keras_hub.__spec__.loader).__name__)
        """
        assert self.order(stubs, code)[-3:] == ["1", "SourceFileLoader", "SourceFileLoader"]

    def test_keras_first(self, stubs):
        code = """
            import keras
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                import kllama
            print([warning.category.__name__ for warning in caught])
        """
        # The stand-in for Keras has no layers, so the attempt to register at once shows as a warning.
        assert self.order(stubs, code)[-1] == "['RuntimeWarning']"

    def test_looking_without_importing_changes_nothing(self, stubs):
        code = """
            import importlib.util
            import kllama; aim(kllama)
            print(importlib.util.find_spec("keras").origin.endswith("keras/__init__.py"), "keras" in sys.modules)
            import keras_hub
        """
        assert self.order(stubs, code) == "True False keras keras_hub tensorflow layers models".split()

    def test_an_import_error_stays_the_same(self, stubs):
        (stubs / "keras" / "__init__.py").write_text("import no_such_framework")
        code = """
            import kllama; aim(kllama)
            for _ in range(2):
                try:
                    import keras_hub
                except ModuleNotFoundError as error:
                    print(error.name, "keras" in sys.modules)
        """
        assert self.order(stubs, code) == ["no_such_framework", "False"] * 2

    def test_without_keras(self, stubs):
        code = """
            import kllama; aim(kllama)
            class Nothing:
                def find_spec(self, name, path, target=None):
                    if name == "keras":
                        raise ModuleNotFoundError("No module named 'keras'", name="keras")
            sys.meta_path.insert(1, Nothing())
            try:
                import keras
            except ModuleNotFoundError as error:
                print(error.name)
        """
        assert self.order(stubs, code) == ["keras"]

    def test_a_broken_kllama_does_not_break_keras(self, stubs):
        (stubs / "rooms" / "stub_models.py").write_text("raise ValueError('backend = numpy')")
        code = """
            import kllama; aim(kllama)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                import keras
            print(len(caught), "backend = numpy" in str(caught[0].message))
        """
        assert self.order(stubs, code) == ["keras", "1", "True"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small model in it, as a preset and as a `.keras` file."""
    folder = tmp_path_factory.mktemp("saved")
    model = kllama.LlamaCausalLM(kllama.LlamaBackbone(16, 1, 2, 8, 12, 1))
    model.save_to_preset(str(folder / "preset"))
    model.save(folder / "model.keras")
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import kllama, keras_hub, keras",
        "import keras_hub, keras, kllama",
        "from kllama.layers.rms_norm import RMSNorm; import keras_hub, keras",
        pytest.param("import kllama, keras, keras_hub", marks=pytest.mark.slow),
        pytest.param("import keras, kllama, keras_hub", marks=pytest.mark.slow),
        pytest.param("import kllama, tensorflow, keras_hub, keras", marks=pytest.mark.slow),
        pytest.param("import kllama, tensorflow_text, keras_hub, keras", marks=pytest.mark.slow),
        pytest.param("import kllama, keras_hub, keras; kllama.LlamaTokenizer", marks=pytest.mark.slow),
    ],
)
def test_keras_finds_the_classes(imports, saved):
    code = f"""
        {imports}
        preset = keras_hub.models.CausalLM.from_preset({str(saved / "preset")!r}, preprocessor=None)
        model = keras.saving.load_model({str(saved / "model.keras")!r})
        from kllama import LlamaCausalLM
        print(type(preset) is type(model) is LlamaCausalLM)
    """
    assert run(code) == "True"


def test_keras_hubs_names():
    for name in kllama.models.__all__:
        assert hasattr(keras_hub.models, name), name
        assert getattr(kllama.models, name).__name__.endswith(name.replace("3", ""))
    assert kllama.Llama3CausalLM is kllama.models.Llama3CausalLM is kllama.models.CausalLM is kllama.LlamaCausalLM
    assert kllama.tokenizers.Llama3Tokenizer is kllama.models.Tokenizer is kllama.LlamaTokenizer
    assert kllama.samplers.GreedySampler is keras_hub.samplers.GreedySampler
    assert {"BeamSampler", "GreedySampler", "Sampler", "get", "serialize"} < set(kllama.samplers.__all__)
    with pytest.raises(AttributeError, match="What else KerasHub has is keras_hub.metrics"):
        kllama.metrics  # noqa: B018
    assert kllama.upload_preset is keras_hub.upload_preset


@pytest.mark.parametrize("name", ["models", "samplers", "tokenizers"])
@pytest.mark.backend_independent
def test_a_module_of_keras_hubs_name_can_be_imported(name):
    assert run(f"from kllama.{name} import *; import kllama as keras_hub; print(keras_hub.{name}.__name__)") == (
        f"kllama.{name}"
    )
