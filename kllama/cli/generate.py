"""`kllama generate PROMPT`: writes the prompt and its continuation on stdout as they come, and nothing else there."""

import click

from kllama.cli.failures import Settings, debug_option
from kllama.cli.loading import open_model
from kllama.cli.sampling_options import writing_options
from kllama.cli.terminal import print_pieces

EPILOG = 'A prompt that begins with a dash comes after two dashes: kllama generate -- "-1 is".'


@click.command("generate", epilog=EPILOG)
@click.argument("prompt")
@click.option("--preset", default="stories_1m_en", show_default=True, help="Name of a preset, or path of a checkpoint.")
@writing_options
@debug_option
@click.pass_obj
def command(settings: Settings, prompt, preset, backend, dtype, quiet, **sampling):
    """Continue the text PROMPT."""
    model = open_model(preset, backend, dtype, quiet, show_logs=settings.debug)
    print_pieces(model.stream(prompt, strip_prompt=False, **sampling))
