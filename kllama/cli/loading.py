"""Opening the model that a command writes with."""

import os
from contextlib import nullcontext

from kllama.cli.backend_choice import choose_backend, use_backend
from kllama.cli.terminal import native_stderr_hidden, print_notice


def open_model(preset: str, backend: str | None, dtype: str | None, quiet: bool, show_logs: bool):
    """Choose the backend, say which, and load a `LlamaCausalLM`; the arguments are those of a command line.

    Args:
        preset: name of a preset, or path of a checkpoint.
        backend: as for `choose_backend`.
        dtype: as for `LlamaCausalLM.from_preset`.
        quiet: whether to say nothing on stderr.
        show_logs: whether native libraries may write to stderr meanwhile.
    """
    choice = choose_backend(backend)
    use_backend(choice)
    if not quiet:
        print_notice(f"loading {preset} on {choice.name} ({choice.source})")
    return load_model(os.path.expanduser(preset), dtype, show_progress=not quiet, show_logs=show_logs)


def load_model(preset: str, dtype: str | None, show_progress: bool, show_logs: bool):
    """Import Keras and load a `LlamaCausalLM`; `show_logs` lets the native libraries write to stderr meanwhile."""
    with native_stderr_hidden(unless=show_logs):
        from kllama.checkpoints import progress
        from kllama.models.llama_causal_lm import LlamaCausalLM
    with nullcontext() if show_progress else progress.quiet():
        return LlamaCausalLM.from_preset(preset, dtype=dtype)
