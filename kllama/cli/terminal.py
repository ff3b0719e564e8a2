"""What reaches the terminal: text whose control characters are made visible, and no chatter of native libraries."""

import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import click

# All of C0 but newline and tab, DEL, C1, and the characters that override the direction of the text around them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def escape_controls(text: str) -> str:
    r"""Write control characters as text, `\x1b` for ESC: a terminal would obey them, whoever wrote them."""
    return _CONTROLS.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def print_text(text: str) -> None:
    """Print a model's text on stdout: as it is into a file or a pipe, with control characters escaped on a terminal."""
    if sys.stdout is None:  # it was closed before we started
        return
    sys.stdout.reconfigure(errors="replace")  # a stdout that is not Unicode gets a question mark, not an exception
    print(escape_controls(text) if sys.stdout.isatty() else text)


def print_pieces(pieces: Iterable[str]) -> None:
    """Print a model's text on stdout while it comes, as `print_text` does, and end the line, even if it breaks off."""
    if sys.stdout is None:
        return
    sys.stdout.reconfigure(errors="replace")
    shown = escape_controls if sys.stdout.isatty() else str
    is_begun = False
    try:
        for piece in pieces:
            print(shown(piece), end="", flush=True)
            is_begun = True
    except BaseException:
        if is_begun:
            print(flush=True)
        raise
    print(flush=True)


def print_notice(text: str) -> None:
    """Print `kllama: <text>` on stderr, as one line whatever the text holds."""
    line = re.sub(r"\s*\n\s*", " ", text.strip())
    click.echo(f"kllama: {escape_controls(line)}", err=True)


@contextmanager
def warnings_as_notices() -> Iterator[None]:
    """Print warnings inside the block as notices: the line of code that warns says nothing on a command line."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print_notice(f"warning: {message}")
        yield


@contextmanager
def native_stderr_hidden(unless: bool = False) -> Iterator[None]:
    """Discard what is written to file descriptor 2 inside the block, unless it is wanted.

    TensorFlow's libraries log there while they are loaded, before any log level that can be set applies to them.
    """
    if unless or sys.stderr is None:
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
