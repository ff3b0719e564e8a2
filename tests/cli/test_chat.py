"""`kllama chat`: what is asked of the model, what is written where, and how a conversation is left."""

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kllama.cli import chat, loading, main
from kllama.errors import NonFiniteError
from kllama.text.chat.template import BUILT_IN

pytestmark = pytest.mark.backend_independent

ROOT = Path(__file__).resolve().parents[2]


class TalkingModel:
    """Stands in for a loaded model: says what it was told last, and remembers how it was called."""

    def __init__(self, chat_template="chatml", longest=None):
        self.preprocessor = SimpleNamespace(
            tokenizer=SimpleNamespace(chat_template=chat_template),
            prompt_rows=lambda messages: [[7] * 60 * len(messages)],
        )
        self.backbone = SimpleNamespace(max_sequence_length=longest)
        self.calls = []
        self.error = None

    def stream(self, messages, **options):
        self.calls.append((messages, options))
        if self.error is not None:
            raise self.error
        return speak(["You said ", messages[-1]["content"]])


def speak(pieces):
    yield from pieces


@pytest.fixture
def model(monkeypatch):
    """Puts a `TalkingModel` in the place of the model that the command would load."""
    monkeypatch.setenv("KERAS_BACKEND", os.environ["KERAS_BACKEND"])  # so that what the command sets is undone
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    model = TalkingModel()
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: model)
    return model


@pytest.fixture
def talk(monkeypatch):
    """Build a function (stdin as bytes or text, arguments) -> the exit code."""

    def run(text, *arguments):
        content = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))
        return main(["chat", "--preset", "some", *arguments])

    return run


def test_answers_on_stdout_all_else_on_stderr(model, talk, capsys):
    assert talk("hello\n\n  \nand you?") == 0
    captured = capsys.readouterr()
    assert captured.out == "You said hello\nYou said and you?\n"
    assert captured.err == (
        f"kllama: loading some on {os.environ['KERAS_BACKEND']} (KERAS_BACKEND)\nkllama: {chat.EPILOG}\n"
    )
    said = [(message["role"], message["content"]) for message in model.calls[1][0]]
    assert said == [("user", "hello"), ("assistant", "You said hello"), ("user", "and you?")]


def test_reset_and_quit(model, talk, capsys):
    assert talk("one\n/reset\ntwo\n /quit \nthree\n", "--quiet", "--system", "Be brief.") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("You said one\nYou said two\n", "")
    system = {"role": "system", "content": "Be brief."}
    assert [messages for messages, _ in model.calls] == [
        [system, {"role": "user", "content": text}] for text in ("one", "two")
    ]


def test_options_reach_the_model(model, talk):
    assert talk("a\nb\n", "--temperature=0.5", "--stop=x", "--stop=y", "--max-new-tokens=7", "--seed=3") == 0
    options = model.calls[0][1]
    assert (options["temperature"], options["stop_strings"], options["max_new_tokens"]) == (0.5, ["x", "y"], 7)
    assert [options["seed"] for _, options in model.calls] == [3, 4]  # the same question is not to get the same answer


@pytest.mark.parametrize(("longest", "lengths"), [(None, [1024, 1024]), (10**6, [1024, 1024]), (190, [130, 10])])
def test_an_answer_ends_where_the_positions_do(model, talk, longest, lengths):
    model.backbone.max_sequence_length = longest
    assert talk("a\nb\n") == 0
    assert [options["max_new_tokens"] for _, options in model.calls] == lengths
    assert all(options["seed"] is None and "max_length" not in options for _, options in model.calls)


def test_a_model_without_a_template(model, talk, capsys):
    model.preprocessor.tokenizer.chat_template = None
    assert talk("a\n", "--quiet") == 2
    captured = capsys.readouterr()
    assert "some has no chat template" in captured.err and "--template" in captured.err and captured.out == ""
    assert talk("a\n", "--template", "chatml") == 0
    assert model.preprocessor.tokenizer.chat_template == "chatml"


def test_a_model_without_a_tokenizer(model, talk, capsys):
    model.preprocessor = None
    assert talk("a\n", "--quiet") == 2
    assert "tokenizer" in capsys.readouterr().err


def test_templates_are_those_that_are_built_in():
    assert chat.TEMPLATES == BUILT_IN


@pytest.mark.parametrize(("error", "code"), [(ValueError("the prompt is long"), 2), (NonFiniteError("NaN"), 1)])
def test_an_error_ends_a_script(model, talk, capsys, error, code):
    model.error = error
    assert talk("a\nb\n", "--quiet") == code
    assert len(model.calls) == 1 and str(error) in capsys.readouterr().err


def test_an_error_at_a_terminal_leaves_the_conversation(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    conversation = chat.Conversation(model, None, {"seed": None, "max_new_tokens": 5})
    conversation.run(["a"])
    model.error = ValueError("the prompt is long")
    conversation.run(["b"])
    model.error = None
    conversation.run(["c"])
    assert [message["content"] for message in model.calls[-1][0]] == ["a", "You said a", "c"]
    assert "the prompt is long" in capsys.readouterr().err


def test_bytes_that_are_no_text(model, talk):
    assert talk(b"\xff\xfe hello\n", "--quiet") == 0
    assert model.calls[0][0][-1]["content"] == "\ufffd\ufffd hello"


def test_a_line_without_end(model, talk, capsys, monkeypatch):
    monkeypatch.setattr(chat, "MAX_LINE", 100)
    assert talk("x" * 101, "--quiet") == 2
    assert "more than 100 characters" in capsys.readouterr().err and not model.calls


def test_a_preset_is_needed(capsys):
    assert main(["chat"]) == 2
    assert "--preset" in capsys.readouterr().err


SLOW_MODEL = """
import sys, time
from types import SimpleNamespace
from kllama.cli import loading, main
class Model:
    preprocessor = SimpleNamespace(tokenizer=SimpleNamespace(chat_template="chatml"))
    backbone = SimpleNamespace(max_sequence_length=None)
    def stream(self, messages, **options):
        if messages[-1]["content"] == "count":
            for number in range(600):
                yield f"{number} "
                time.sleep(0.1)
        yield f"{len(messages)} messages"
loading.load_model = lambda *_, **__: Model()
sys.exit(main(["chat", "--preset", "some", "--quiet"]))
"""


class Terminal:
    """A program in a pseudo terminal."""

    def __init__(self, code):
        self._here, there = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdin=there,
            stdout=there,
            stderr=there,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(there)
        self.seen = ""

    def type(self, text):
        os.write(self._here, text.encode())

    def expect(self, text, seconds=60, or_type=None):
        """Read until a text comes; where `or_type` is given, type that again and again until it does."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = max(0, end - time.monotonic())
            if select.select([self._here], [], [], left if or_type is None else min(left, 1))[0]:
                self.seen += os.read(self._here, 1000).decode()
            else:
                assert or_type is not None and left, self.seen
                self.type(or_type)
        self.seen = self.seen.partition(text)[2]

    def close(self):
        code = self._process.wait(timeout=30)
        os.close(self._here)
        return code


def take_terminal():
    """Make the pseudo terminal the one that Ctrl-C comes from."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_in_a_terminal():
    terminal = Terminal(SLOW_MODEL)
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("1 messages")
    terminal.expect("> ")
    terminal.type("count\n")
    terminal.expect("3 ")
    terminal.type("\x03")
    terminal.expect("\n> ")
    # While nothing is written. Python notices a signal late that comes after readline prints the prompt and before it
    # waits for a key, which no one is quick enough for but a test; so it is typed again.
    terminal.expect("\n> ", or_type="\x03")
    terminal.type("hello\n")
    terminal.expect("5 messages")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.close() == 0
