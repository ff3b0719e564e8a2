"""`kllama verify PRESET`: reads all of a checkpoint and says whether it is whole; nothing of it is kept."""

import os
from contextlib import nullcontext

import click

from kllama.cli.backend_choice import choose_backend, use_backend
from kllama.cli.failures import Settings, debug_option
from kllama.cli.terminal import native_stderr_hidden, print_text


@click.command("verify")
@click.argument("preset")
@click.option("--quiet", is_flag=True, help="Write nothing unless something is wrong.")
@debug_option
@click.pass_obj
def command(settings: Settings, preset, quiet):
    """Check the checkpoint PRESET: every file against its manifest, every tensor, and the tokenizer.

    PRESET is the name of a preset, or the path of a checkpoint of any format.
    """
    use_backend(choose_backend())
    with native_stderr_hidden(unless=settings.debug):
        from kllama.checkpoints import progress
        from kllama.models.verify import verify_checkpoint
    with progress.quiet() if quiet else nullcontext():
        lines = verify_checkpoint(os.path.expanduser(preset))
    if not quiet:
        print_text("\n".join(lines))
