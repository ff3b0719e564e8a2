"""`kllama chat`: a conversation with a model in the terminal, or with what comes through a pipe.

Answers go to stdout, everything else to stderr. Each line that is read is a message.
"""

import contextlib
import itertools
import signal
import sys
from collections.abc import Iterator

import click

from kllama.cli.failures import Settings, debug_option
from kllama.cli.loading import open_model
from kllama.cli.sampling_options import writing_options
from kllama.cli.terminal import print_notice, print_pieces
from kllama.errors import NonFiniteError, ResourceError

# What `kllama.text.chat.template` has, which must not be imported before the backend is chosen.
TEMPLATES = ("llama2", "llama3", "llama3.1", "chatml", "vicuna", "mistral")

MAX_LINE = 1_000_000
"""How many characters a message may have; a binary file on stdin has no lines."""

MAX_ANSWER = 1024
"""How many tokens an answer has at most where nothing is said about it."""

EPILOG = "/reset begins a new conversation, /quit or Ctrl-D ends the program, Ctrl-C ends an answer."


@click.command("chat", epilog=EPILOG)
@click.option("--preset", required=True, help="Name of a preset, or path of a checkpoint.")
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--template", type=click.Choice(TEMPLATES), help="How conversations are written. [default: as trained]")
@writing_options
@debug_option
@click.pass_obj
def command(settings: Settings, preset, system, template, backend, dtype, quiet, **sampling):
    """Talk with a model that was trained on conversations."""
    model = open_model(preset, backend, dtype, quiet, show_logs=settings.debug)
    check_template(model, template, preset)
    if not quiet:
        print_notice(EPILOG)
    Conversation(model, system, sampling).run(read_lines())


def check_template(model, template: str | None, preset: str) -> None:
    """Give the model's tokenizer a template, or raise a ValueError if it has none."""
    if model.preprocessor is None:
        raise ValueError(f"{preset} has no tokenizer; expected a checkpoint with one.")
    tokenizer = model.preprocessor.tokenizer
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{preset} has no chat template. If it was trained on conversations, --template chooses how they are "
            f"written: {', '.join(TEMPLATES)}. If not, kllama generate continues texts."
        )


def read_lines() -> Iterator[str]:
    """Give the lines of stdin, up to its end; on a terminal with a prompt, and with its line editing."""
    if sys.stdin is None:  # it was closed before we started
        return
    sys.stdin.reconfigure(errors="replace")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows has none, and edits lines by itself
            import readline  # noqa: F401
    while True:
        try:
            line = _read_line(is_terminal)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            click.echo(err=True)  # as a shell does: a new line
            continue
        if line is None:
            if is_terminal:
                click.echo(err=True)
            return
        yield line


def _read_line(is_terminal: bool) -> str | None:
    if is_terminal and sys.stdout is not None and sys.stdout.isatty():
        try:
            return input("> ")
        except EOFError:
            return None
    if is_terminal:
        click.echo("> ", nl=False, err=True)
    line = sys.stdin.readline(MAX_LINE + 1)
    if len(line) > MAX_LINE:
        raise ValueError(f"a line of stdin has more than {MAX_LINE} characters; expected messages, one a line.")
    return line.removesuffix("\n") if line else None


class Conversation:
    """What was said so far, and the model that answers.

    Args:
        model: a `LlamaCausalLM` with a chat template.
        system: what the model is told before the conversation, or None.
        sampling: keyword arguments of `LlamaCausalLM.stream`.
    """

    def __init__(self, model, system: str | None, sampling: dict):
        self._model = model
        self._before = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._before)
        self._sampling = dict(sampling)
        seed = self._sampling.pop("seed")
        self._seeds = itertools.repeat(None) if seed is None else itertools.count(seed)

    def run(self, lines: Iterator[str]) -> None:
        """Answer lines until there are none, or one says /quit."""
        for line in lines:
            if line.strip() == "/quit":
                return
            if line.strip() == "/reset":
                self._messages = list(self._before)
            elif line.strip():
                self._answer(line)

    def _answer(self, line: str) -> None:
        """Print an answer and remember it; what fails at a terminal leaves the conversation as it was."""
        asked = [*self._messages, {"role": "user", "content": line}]
        pieces = []
        try:
            print_pieces(self._written(asked, pieces))
        except (ValueError, ResourceError, NonFiniteError) as error:
            if not sys.stdin.isatty():
                raise
            print_notice(f"error: {error}. The message is forgotten; /reset begins a new conversation.")
            return
        if pieces:
            self._messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _written(self, messages: list[dict], pieces: list[str]) -> Iterator[str]:
        """Give an answer in pieces, and put them into a list; Ctrl-C ends it."""
        lengths = {"max_new_tokens": self._room_for_answer(messages)}
        answer = self._model.stream(messages, seed=next(self._seeds), **self._sampling | lengths)
        with contextlib.closing(answer), interruptions() as is_interrupted:
            for piece in answer:
                pieces.append(piece)
                yield piece
                if is_interrupted():
                    return

    def _room_for_answer(self, messages: list[dict]) -> int:
        """Give how many tokens an answer may have: what was asked for, else many, as far as there is room."""
        if (asked := self._sampling["max_new_tokens"]) is not None:
            return asked
        longest = self._model.backbone.max_sequence_length
        if longest is None:
            return MAX_ANSWER
        return max(1, min(MAX_ANSWER, longest - len(self._model.preprocessor.prompt_rows(messages)[0])))


@contextlib.contextmanager
def interruptions() -> Iterator:
    """Note the first Ctrl-C inside instead of raising it, for it may come in the middle of anything; raise the second.

    Gives a function that tells whether there was one.
    """
    noted = []

    def note(number, frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)
