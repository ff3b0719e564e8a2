"""`kllama generate PROMPT`: writes a continuation of the prompt on stdout, and nothing else there."""

import os
from contextlib import nullcontext

import click

from kllama.cli.backend_choice import BACKENDS, choose_backend, use_backend
from kllama.cli.failures import Settings, debug_option
from kllama.cli.terminal import native_stderr_hidden, print_notice, print_text

EPILOG = 'A prompt that begins with a dash comes after two dashes: kllama generate -- "-1 is".'


@click.command("generate", epilog=EPILOG)
@click.argument("prompt")
@click.option("--preset", default="stories_1m_en", show_default=True, help="Name of a preset, or path of a checkpoint.")
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    help="What computes. [default: KERAS_BACKEND, else keras.json, else the first installed]",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Stop after this many tokens.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 always takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample among the K likeliest tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample among the likeliest that make up P.")
@click.option("--seed", type=click.IntRange(min=0), help="The same seed writes the same text.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: the checkpoint's own]")
@click.option("--quiet", is_flag=True, help="Write nothing on stderr unless something goes wrong.")
@debug_option
@click.pass_obj
def command(settings: Settings, prompt, preset, backend, dtype, quiet, **sampling):
    """Continue the text PROMPT."""
    choice = choose_backend(backend)
    use_backend(choice)
    if not quiet:
        print_notice(f"loading {preset} on {choice.name} ({choice.source})")
    model = load_model(os.path.expanduser(preset), dtype, show_progress=not quiet, show_logs=settings.debug)
    print_text(model.generate(prompt, **sampling))


def load_model(preset: str, dtype: str | None, show_progress: bool, show_logs: bool):
    """Import Keras and load a `LlamaCausalLM`; `show_logs` lets the native libraries write to stderr meanwhile."""
    with native_stderr_hidden(unless=show_logs):
        from kllama.checkpoints import progress
        from kllama.models.llama_causal_lm import LlamaCausalLM
    with nullcontext() if show_progress else progress.quiet():
        return LlamaCausalLM.from_preset(preset, dtype=dtype)
