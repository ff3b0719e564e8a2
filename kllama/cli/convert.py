"""`kllama convert SOURCE DESTINATION --to FORMAT`: writes a checkpoint in another format."""

import os
from contextlib import nullcontext

import click

from kllama.cli.backend_choice import BACKENDS, choose_backend, use_backend
from kllama.cli.failures import Settings, debug_option
from kllama.cli.terminal import native_stderr_hidden, print_notice, warnings_as_notices

# What `kllama.models.convert` has, which must not be imported before the backend is chosen.
FORMATS = ("preset", "huggingface", "gguf")
DTYPES = ("float32", "bfloat16", "float16", "q8_0", "q4_0")


@click.command("convert")
@click.argument("source")
@click.argument("destination")
@click.option(
    "--to",
    type=click.Choice(FORMATS),
    help="What to write. [default: gguf for a DESTINATION that ends in .gguf]",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights; q8_0 and q4_0 for gguf. [default: as SOURCE]")
@click.option(
    "--rope-factor",
    type=click.FloatRange(min=1),
    help="The position scaling, where Meta's files do not tell it: 8 for Llama 3.1 and 3.3, 32 for 3.2.",
)
@click.option("--overwrite", is_flag=True, help="Replace what is at DESTINATION.")
@click.option("--backend", type=click.Choice(BACKENDS), help="What builds the model of a preset.")
@click.option("--quiet", is_flag=True, help="Write nothing on stderr unless something goes wrong.")
@debug_option
@click.pass_obj
def command(settings: Settings, source, destination, to, dtype, rope_factor, overwrite, backend, quiet):
    """Write the checkpoint SOURCE in another format at DESTINATION.

    SOURCE is the name of a preset, or the path of a checkpoint of any format: a preset of kllama or KerasHub, a Hugging
    Face directory, Meta's directory, a GGUF or a llama2.c file. DESTINATION is a directory, or a GGUF file.
    """
    to = to or ("gguf" if destination.endswith(".gguf") else None)
    if to is None:
        raise click.UsageError(f"--to is missing; expected one of {', '.join(FORMATS)}.")
    if dtype in ("q8_0", "q4_0") and to != "gguf":
        raise click.BadParameter(f"{dtype} is for --to gguf.", param_hint="--dtype")
    source, destination = map(os.path.expanduser, (source, destination))
    if not overwrite and os.path.exists(destination) and not _is_empty_directory(destination):
        raise click.BadParameter(f"{destination} is there already; --overwrite replaces it.", param_hint="DESTINATION")
    use_backend(choose_backend(backend))
    with native_stderr_hidden(unless=settings.debug):
        from kllama.checkpoints import progress
        from kllama.checkpoints.meta.params import llama3_scaling
        from kllama.models.convert import convert
    answers = {} if rope_factor is None else {"rope_scaling": llama3_scaling(rope_factor)}
    with progress.quiet() if quiet else nullcontext(), warnings_as_notices():
        convert(source, destination, to, dtype=dtype, overwrite=overwrite, **answers)
    if not quiet:
        print_notice(f"wrote {destination}")


def _is_empty_directory(path: str) -> bool:
    return os.path.isdir(path) and not os.listdir(path)
