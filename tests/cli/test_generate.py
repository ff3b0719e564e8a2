"""`kllama generate`: what it writes where, its exit codes, and the choice of the backend."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kllama.cli import backend_choice, loading, main
from kllama.cli.terminal import escape_controls
from kllama.errors import CheckpointError, MissingFileError, NonFiniteError, ResourceError, UnsupportedError
from kllama.models.generate_options import GenerateOptions

ROOT = Path(__file__).resolve().parents[2]

backend_independent = pytest.mark.backend_independent


class StoryModel:
    """Stands in for a loaded model: repeats the prompt, and remembers how it was called."""

    def __init__(self, answer=None):
        self.answer = answer
        self.calls = []

    def stream(self, prompt, strip_prompt, **arguments):
        self.calls.append(arguments)
        assert not strip_prompt
        if isinstance(self.answer, BaseException):
            raise self.answer
        yield prompt
        yield from (self.answer or " there was a fox.").partition(" was")


@pytest.fixture
def model(monkeypatch):
    """Puts a `StoryModel` in the place of the model that the command would load."""
    monkeypatch.setenv("KERAS_BACKEND", os.environ["KERAS_BACKEND"])  # so that what the command sets is undone
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    model = StoryModel()
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: model)
    return model


def start(*arguments, before="", **options) -> subprocess.Popen:
    """Start the command in a new process; `before` is Python that runs ahead of it there."""
    code = f"import sys\nfrom kllama.cli import main\n{before}\nsys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen(command, cwd=ROOT, **{**pipes, **options})


def run(*arguments, **options) -> tuple[int, str, str]:
    """Run the command in a new process: its exit code, stdout and stderr."""
    with start(*arguments, **options) as process:
        stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


FAKE_MODEL = """
from kllama.cli import loading
class Model:
    def stream(self, prompt, **arguments):
        yield prompt
        for _ in range(100_000):
            yield " was a fox"
loading.load_model = lambda *_, **__: Model()
"""


@backend_independent
class TestOutput:
    def test_story_on_stdout_backend_on_stderr(self, model, capsys):
        assert main(["generate", "Once"]) == 0
        captured = capsys.readouterr()
        assert captured.out == "Once there was a fox.\n"
        assert captured.err == f"kllama: loading stories_1m_en on {os.environ['KERAS_BACKEND']} (KERAS_BACKEND)\n"

    def test_quiet(self, model, capsys):
        assert main(["generate", "--quiet", "Once"]) == 0
        assert capsys.readouterr().err == ""

    def test_arguments_reach_the_model(self, model):
        options = {
            "max-new-tokens": 7,
            "min-new-tokens": 2,
            "temperature": 0.5,
            "top-k": 3,
            "top-p": 0.9,
            "min-p": 0.1,
            "repetition-penalty": 1.2,
            "seed": 11,
        }
        assert main(["generate", *(f"--{name}={value}" for name, value in options.items()), "Once"]) == 0
        assert model.calls == [
            {
                **{name.replace("-", "_"): value for name, value in options.items()},
                "stop_strings": None,
                "prompt_lookup_num_tokens": None,
            }
        ]

    def test_stop_strings_and_drafts_reach_the_model(self, model):
        assert main(["generate", "--stop", "a fox", "--stop=\n", "--prompt-lookup", "4", "Once"]) == 0
        assert model.calls[0]["stop_strings"] == ["a fox", "\n"]
        assert model.calls[0]["prompt_lookup_num_tokens"] == 4

    def test_the_options_are_those_of_the_model(self, model):
        main(["generate", "Once"])
        assert model.calls[0].keys() <= {field.name for field in dataclasses.fields(GenerateOptions)}

    def test_arguments_not_given_are_none(self, model):
        assert main(["generate", "Once"]) == 0
        assert set(model.calls[0].values()) == {None, 0}

    def test_preset_and_dtype_reach_the_loader(self, model, monkeypatch):
        loads = []
        monkeypatch.setattr(loading, "load_model", lambda preset, dtype, **_: loads.append((preset, dtype)) or model)
        monkeypatch.setenv("HOME", "/home/me")
        assert main(["generate", "--preset=~/a model", "--dtype", "bfloat16", "Once"]) == 0
        assert main(["generate", "--preset", "-dashed", "Once"]) == 0
        assert loads == [("/home/me/a model", "bfloat16"), ("-dashed", None)]

    def test_prompt_with_a_leading_dash(self, model, capsys):
        assert main(["generate", "--quiet", "--", "-1 is"]) == 0
        assert capsys.readouterr().out == "-1 is there was a fox.\n"

    def test_controls_are_escaped_on_a_terminal_only(self, model, capsys, monkeypatch):
        model.answer = "\x1b[2J\u202e\ta\nb"
        main(["generate", "--quiet", ""])
        assert capsys.readouterr().out == "\x1b[2J\u202e\ta\nb\n"
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        main(["generate", "--quiet", ""])
        assert capsys.readouterr().out == "\\x1b[2J\\u202e\ta\nb\n"

    def test_a_text_that_breaks_off(self, model, capsys):
        def stream(prompt, **_):
            yield prompt
            raise NonFiniteError("logits are NaN at step 3")

        model.stream = stream
        assert main(["generate", "--quiet", "Once"]) == 1
        captured = capsys.readouterr()
        assert captured.out == "Once\n" and captured.err.startswith("kllama: error: logits")

    def test_stdout_that_is_not_unicode(self):
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        code, stdout, _ = run("generate", "--quiet", "caf\u00e9", before=FAKE_MODEL, env=environment)
        assert (code, stdout[:14]) == (0, "caf? was a fox")

    def test_escape_controls_leaves_other_text_alone(self):
        text = "Tab\tand\nnewline, \u00e9, \u4f60\u597d, \U0001f98a, \u05e9\u05dc\u05d5\u05dd"
        assert escape_controls(text) == text
        assert escape_controls("\r\x07\x7f\x9b\u2066") == "\\r\\x07\\x7f\\x9b\\u2066"


@backend_independent
class TestFailures:
    @pytest.mark.parametrize(
        "error, code",
        [
            (CheckpointError("config.json: n = 1"), 3),
            (MissingFileError("config.json: missing", "config.json"), 3),
            (UnsupportedError("config.json: model_type = 'gpt2'"), 3),
            (ResourceError("model.safetensors: not enough memory"), 4),
            (MemoryError("no memory"), 4),
            (OSError(28, "No space left on device"), 4),
            (NonFiniteError("logits: NaN at step 3"), 1),
            (ValueError("temperature (-1) must be positive"), 2),
            (TypeError("seed must be an integer"), 2),
            (KeyboardInterrupt(), 130),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
    )
    def test_one_line_and_the_code(self, model, capsys, error, code):
        model.answer = error
        assert main(["generate", "--quiet", "Once"]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("kllama: ") and captured.err.count("\n") == 1
        assert error.args == () or error.args[-1] in captured.err

    def test_defect(self, model, capsys):
        model.answer = KeyError("cache")
        assert main(["generate", "--quiet", "Once"]) == 1
        assert "KeyError: 'cache'" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [["--debug", "generate", "x"], ["generate", "x", "--debug"]])
    def test_traceback_only_with_debug(self, model, capsys, arguments):
        model.answer = CheckpointError("config.json: n = 1")
        assert main(arguments) == 3
        assert "Traceback" in capsys.readouterr().err
        assert main(["generate", "x"]) == 3
        assert "Traceback" not in capsys.readouterr().err

    def test_message_with_newlines_and_controls_is_one_line(self, model, capsys):
        model.answer = CheckpointError("a\n  b \x1b[2J")
        assert main(["generate", "--quiet", "Once"]) == 3
        assert capsys.readouterr().err == "kllama: error: a b \\x1b[2J\n"

    @pytest.mark.parametrize(
        "arguments",
        [
            ["nonsense"],
            ["generate"],
            ["generate", "--nonsense", "x"],
            ["generate", "x", "y"],
        ],
    )
    def test_usage(self, capsys, arguments):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("Usage: kllama") and "\nkllama: error: " in captured.err

    @pytest.mark.parametrize(
        "option",
        [
            "--top-k=0",
            "--top-p=0",
            "--top-p=1.5",
            "--temperature=-1",
            "--min-p=2",
            "--repetition-penalty=0",
            "--prompt-lookup=0",
            "--max-new-tokens=0",
            "--seed=x",
            "--dtype=int4",
        ],
    )
    def test_wrong_value(self, capsys, option):
        assert main(["generate", option, "Once"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("kllama: error: ") and option.split("=")[0] in error and error.count("\n") == 1

    def test_no_command(self, capsys):
        assert main([]) == 2
        assert capsys.readouterr().err.startswith("Usage: kllama")


@backend_independent
class TestProcess:
    def test_help_imports_nothing_heavy(self):
        before = "import atexit; atexit.register(lambda: print({'keras', 'numpy', 'rich'} & set(sys.modules)))"
        code, stdout, _ = run("generate", "--help", before=before)
        assert code == 0 and "--max-new-tokens" in stdout and stdout.endswith("set()\n")

    def test_version(self):
        from kllama import __version__

        assert run("--version") == (0, f"kllama {__version__}\n", "")

    def test_closed_pipe(self):
        with start("generate", "--quiet", "Once", before=FAKE_MODEL) as process:
            assert process.stdout.read(8) == "Once was"
            process.stdout.close()
            error = process.stderr.read()
        assert (process.returncode, error) == (141, "")

    def test_full_disk(self):
        with open("/dev/full", "w") as full:
            code, _, error = run("generate", "--quiet", "Once", before=FAKE_MODEL, stdout=full)
        assert code == 4 and error.startswith("kllama: error: ") and error.count("\n") == 1

    def test_closed_streams(self):
        command = [sys.executable, "-c", f"import sys\n{FAKE_MODEL}\nfrom kllama.cli import main\nsys.exit(main())"]
        script = '"$@" generate x <&- >&- 2>&-'
        assert subprocess.run(["bash", "-c", script, "bash", *command], cwd=ROOT, timeout=60).returncode == 0

    def test_interrupt(self):
        # A shell's background job ignores SIGINT, and its children would inherit that.
        before = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from kllama.cli import loading
loading.load_model = lambda *_, **__: print("ready", flush=True) or time.sleep(60)
"""
        with start("generate", "--quiet", "Once", before=before) as process:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == "kllama: interrupted\n"
        assert process.returncode == 130


@backend_independent
class TestBackendChoice:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch, tmp_path):
        """A machine with no settings, on which torch and tensorflow are installed."""
        monkeypatch.delenv("KERAS_BACKEND")
        monkeypatch.setenv("KERAS_HOME", str(tmp_path))
        self.keras_json = tmp_path / "keras.json"
        self.install(monkeypatch, "torch", "tensorflow")

    def install(self, monkeypatch, *names):
        monkeypatch.setattr(backend_choice, "_is_installed", lambda name: name in names)

    def test_order(self, monkeypatch):
        choose = backend_choice.choose_backend
        assert choose() == ("torch", "the first installed")
        self.keras_json.write_text(json.dumps({"backend": "tensorflow"}))
        assert choose() == ("tensorflow", str(self.keras_json))
        monkeypatch.setenv("KERAS_BACKEND", "torch")
        assert choose() == ("torch", "KERAS_BACKEND")
        assert choose("tensorflow") == ("tensorflow", "--backend")

    @pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps(backend_choice._WRITTEN_BY_KERAS)])
    def test_keras_json_that_says_nothing(self, text):
        self.keras_json.write_text(text)
        assert backend_choice.choose_backend() == ("torch", "the first installed")

    def test_the_file_that_keras_writes_is_known(self, tmp_path):
        environment = {**os.environ, "KERAS_BACKEND": "jax"}
        subprocess.run([sys.executable, "-c", "import keras.src.backend.config"], env=environment, capture_output=True)
        assert json.loads(self.keras_json.read_text()) == backend_choice._WRITTEN_BY_KERAS

    def test_not_installed(self, capsys):
        assert main(["generate", "--backend", "jax", "Once"]) == 2
        error = capsys.readouterr().err
        assert "--backend" in error and 'pip install "kllama[jax]"' in error and error.count("\n") == 1

    def test_none_installed(self, monkeypatch):
        self.install(monkeypatch)
        with pytest.raises(ValueError, match="none is installed.*pip install"):
            backend_choice.choose_backend()

    def test_unknown(self, monkeypatch, capsys):
        monkeypatch.setenv("KERAS_BACKEND", "numpy")
        assert main(["generate", "Once"]) == 2
        assert capsys.readouterr().err == (
            "kllama: error: KERAS_BACKEND: backend = 'numpy'; expected one of jax, torch, tensorflow.\n"
        )


class TestEmbeddedPreset:
    def test_story(self):
        arguments = ("generate", "--max-new-tokens", "8", "--seed", "1", "Once upon a time")
        code, story, error = run(*arguments)
        assert (code, error) == (0, f"kllama: loading stories_1m_en on {os.environ['KERAS_BACKEND']} (KERAS_BACKEND)\n")
        assert story.startswith("Once upon a time") and len(story) > len("Once upon a time\n")
        assert run(*arguments, "--quiet") == (0, story, "")

    @backend_independent
    def test_wrong_path(self, tmp_path):
        code, story, error = run("generate", "--quiet", "--preset", str(tmp_path / "nowhere"), "Once")
        assert (code, story) == (3, "")
        assert error.startswith("kllama: error: ") and "nowhere" in error and error.count("\n") == 1
