"""How the command line fails: one line on stderr, an exit code, and the traceback only with `--debug`.

| code | after                                               |
|------|-----------------------------------------------------|
| 1    | a defect of kllama, or numbers that are not finite  |
| 2    | a wrong command, option or argument                 |
| 3    | a wrong, damaged or missing checkpoint              |
| 4    | memory, disk, network or another resource ran out   |
| 130  | Ctrl-C                                              |
| 141  | the reader of the output went away, as in `| head`  |
"""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import click

from kllama.cli.terminal import print_notice
from kllama.errors import CheckpointError, NonFiniteError, ResourceError

# The first match counts: a MissingFileError is a CheckpointError, a ValueError and an OSError.
_EXIT_CODES = (
    (click.ClickException, 2),
    (KeyboardInterrupt, 130),
    (BrokenPipeError, 141),
    (CheckpointError, 3),
    (ResourceError, 4),
    (NonFiniteError, 1),
    ((MemoryError, OSError), 4),
    ((ValueError, TypeError), 2),
)


@dataclass
class Settings:
    """What every command shares; click hands it on as `context.obj`."""

    debug: bool = False


def debug_option(command: Callable) -> Callable:
    """Add `--debug` to a command."""

    def remember(context, parameter, value):
        context.obj.debug |= value

    option = click.option("--debug", is_flag=True, expose_value=False, callback=remember, help="Show tracebacks.")
    return option(command)


def report(error: BaseException, settings: Settings) -> int:
    """Say on stderr what went wrong, and return the exit code for it."""
    code = next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), None)
    if code == 141:
        # Python flushes stdout once more at exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    if settings.debug:
        traceback.print_exception(error)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
    else:
        _print_usage(error)
        print_notice(_describe(error, is_defect=code is None))
    return 1 if code is None else code


def _describe(error: BaseException, is_defect: bool) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, click.ClickException):
        return f"error: {error.format_message()}"
    if is_defect:
        return f"error: {type(error).__name__}: {error} (a defect of kllama; --debug shows where)"
    return f"error: {str(error) or type(error).__name__}"


def _print_usage(error: BaseException) -> None:
    """Print the usage where the command line is put together wrongly; a wrong value needs only the message."""
    wrong_value = isinstance(error, click.BadParameter) and not isinstance(error, click.MissingParameter)
    if isinstance(error, click.UsageError) and error.ctx is not None and not wrong_value:
        click.echo(error.ctx.get_usage(), err=True)
