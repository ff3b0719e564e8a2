"""The command line: `kllama COMMAND ...`. A command is a file of this folder that is named in `COMMANDS`.

Neither this file nor the top of a command's file imports Keras: `kllama --help` answers at once, and a command can
still choose the backend. Exit codes and error messages are in `failures`.
"""

import importlib
import sys
from collections.abc import Sequence

import click

from kllama import __version__
from kllama.cli.failures import Settings, debug_option, report

COMMANDS = ("generate", "chat", "convert", "inspect", "verify")


class _Commands(click.Group):
    """Imports a command's file when the command is asked for."""

    def list_commands(self, context):
        return COMMANDS

    def get_command(self, context, name):
        return importlib.import_module(f"kllama.cli.{name}").command if name in COMMANDS else None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kllama", message="%(prog)s %(version)s")
@debug_option
def commands():
    """Llama models for Keras, on JAX, PyTorch and TensorFlow."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name. Defaults to `sys.argv[1:]`.

    Returns:
        The exit code.
    """
    settings = Settings()
    try:
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        with commands.make_context("kllama", arguments, obj=settings) as context:
            commands.invoke(context)
        print(end="", flush=True)  # a full disk or a closed pipe has to show here, while it can still be reported
        return 0
    except click.exceptions.Exit as end:  # after --help and --version
        return end.exit_code
    except SystemExit:
        raise
    except BaseException as error:  # a panic of a Rust library is not an Exception
        return report(error, settings)
