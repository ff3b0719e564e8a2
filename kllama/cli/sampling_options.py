"""The options of the commands that write text: what computes, and how tokens are chosen."""

import functools
from collections.abc import Callable

import click

from kllama.cli.backend_choice import BACKENDS

_BACKEND = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    help="What computes. [default: KERAS_BACKEND, else keras.json, else the first installed]",
)
_DTYPE = click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: the checkpoint's own]"
)
_QUIET = click.option("--quiet", is_flag=True, help="Write nothing on stderr unless something goes wrong.")
_SAMPLING = (
    click.option("--max-new-tokens", type=click.IntRange(min=1), help="Stop after this many tokens."),
    click.option("--min-new-tokens", type=click.IntRange(min=0), default=0, help="Do not stop before this many."),
    click.option("--temperature", type=click.FloatRange(min=0), help="0 always takes the likeliest token."),
    click.option("--top-k", type=click.IntRange(min=1), help="Sample among the K likeliest tokens."),
    click.option(
        "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample among the likeliest that make up P."
    ),
    click.option("--min-p", type=click.FloatRange(0, 1), help="Sample among those P times as likely as the likeliest."),
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(min=0, min_open=True),
        help="Above 1, make tokens that were there already less likely.",
    ),
    click.option("--stop", "stop_strings", multiple=True, help="End the text before this string; may be repeated."),
    click.option(
        "--prompt-lookup",
        "prompt_lookup_num_tokens",
        type=click.IntRange(min=1),
        help="Draft this many tokens from the text itself: the same text, sooner where it repeats itself.",
    ),
    click.option("--seed", type=click.IntRange(min=0), help="The same seed writes the same text."),
)


def writing_options(command: Callable) -> Callable:
    """Add the options to a command, which gets those of sampling as the keyword arguments of `LlamaCausalLM.stream`."""

    @functools.wraps(command)
    def call(*arguments, stop_strings=(), **options):
        return command(*arguments, stop_strings=list(stop_strings) or None, **options)

    for option in reversed((_BACKEND, *_SAMPLING, _DTYPE, _QUIET)):
        call = option(call)
    return call
