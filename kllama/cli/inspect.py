"""`kllama inspect SOURCE`: what a checkpoint is, without loading its weights: tables for people, or JSON."""

import json
import os

import click

from kllama.cli.backend_choice import choose_backend, use_backend
from kllama.cli.failures import Settings, debug_option
from kllama.cli.terminal import escape_controls, native_stderr_hidden, print_text

# What the tables call an argument of the backbone; the others are shown where they are not what Llama has.
_SIZES = {
    "num_layers": "layers",
    "hidden_dim": "hidden dim",
    "intermediate_dim": "intermediate dim",
    "num_query_heads": "query heads",
    "num_key_value_heads": "key/value heads",
    "head_dim": "head dim",
    "vocabulary_size": "vocabulary",
    "max_sequence_length": "longest sequence",
    "rope_max_wavelength": "rope theta",
    "rope_scaling": "rope scaling",
    "layer_norm_epsilon": "norm epsilon",
    "tie_word_embeddings": "head tied to the embedding",
}
_USUAL = {
    "attention_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "sliding_window": None,
    "layer_types": None,
    "activation": "silu",
    "attention_dropout": 0,
    "dropout": 0,
}


@click.command("inspect")
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of tables.")
@debug_option
@click.pass_obj
def command(settings: Settings, source, as_json):
    """Say what the checkpoint SOURCE is: architecture, parameters, tokenizer, size, and the memory it needs.

    SOURCE is the name of a preset, or the path of a checkpoint of any format. Its weights are not loaded.
    """
    use_backend(choose_backend())
    with native_stderr_hidden(unless=settings.debug):
        from kllama.checkpoints.formats import open_checkpoint
        from kllama.checkpoints.summary import summarize

    checkpoint = open_checkpoint(os.path.expanduser(source))
    summary = summarize(checkpoint)
    summary["tokenizer"] = describe_tokenizer(checkpoint)
    print_text(json.dumps(summary, indent=2) if as_json else render(summary))


def describe_tokenizer(checkpoint) -> dict | None:
    """Open the tokenizer of a checkpoint and say what it has; None where there is none."""
    if checkpoint.tokenizer_config is None:
        return None
    from kllama.text.tokenizer import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_checkpoint(checkpoint)
    template = tokenizer.chat_template
    return {
        "source": str(checkpoint.tokenizer_config["tokenizer"]),
        "vocabulary_size": tokenizer.vocabulary_size(),
        "start_token": tokenizer.start_token,
        "end_token": tokenizer.end_token,
        "pad_token": tokenizer.pad_token,
        "chat_template": sorted(template) if isinstance(template, dict) else template is not None,
    }


def render(summary: dict) -> str:
    """Write the tables that a person reads."""
    from kllama.checkpoints.files.reader import size_text
    from kllama.checkpoints.summary import LORA_RANK, TOKENS

    total = summary["parameters"]["total"]
    parameters = [(part, f"{count:,}", f"{100 * count / total:.1f} %") for part, count in summary["parameters"].items()]
    sizes = [(dtype, size_text(size)) for dtype, size in summary["stored_bytes"].items()]
    memory = [("", *summary["memory"]["run"])]
    memory += [(task, *map(size_text, sizes.values())) for task, sizes in summary["memory"].items()]
    parts = [
        f"{_one_line(summary['path'])}: {summary['format']}",
        _table("Architecture", _architecture_rows(summary["architecture"])),
        _table("Parameters", parameters, right=(1, 2)),
        _table("Tokenizer", _tokenizer_rows(summary["tokenizer"], summary["generation"])),
        _table("Weights in the files", sizes, right=(1,)),
        _table(
            f"Memory for one sequence of {TOKENS} tokens, about (Adam; LoRA of rank {LORA_RANK} on query and value)",
            memory,
            right=(1, 2),
        ),
        *summary["open_questions"].values(),
    ]
    return "\n\n".join(parts)


def _architecture_rows(architecture: dict) -> list[tuple[str, str]]:
    has_head = architecture["has_head"]
    names = [name for name in _SIZES if has_head or name != "tie_word_embeddings"]
    rows = [(_SIZES[name], _value_text(architecture[name])) for name in names]
    unusual = [name for name, usual in _USUAL.items() if architecture.get(name, usual) != usual]
    rows += [(name.replace("_", " "), _value_text(architecture[name])) for name in unusual]
    return rows if has_head else [*rows, ("head", "none: a base model")]


def _value_text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        counts = {item: value.count(item) for item in value}
        return ", ".join(f"{count} x {item}" if count > 1 else f"{item}" for item, count in counts.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _tokenizer_rows(tokenizer: dict | None, generation: dict) -> list[tuple[str, str]]:
    rows = [("tokenizer", "none")]
    if tokenizer is not None:
        template = tokenizer["chat_template"]
        rows = [
            ("source", tokenizer["source"]),
            ("tokens", f"{tokenizer['vocabulary_size']:,}"),
            *(
                (name.replace("_", " "), _value_text(tokenizer[name]))
                for name in ("start_token", "end_token", "pad_token")
            ),
            ("chat template", ", ".join(template) if isinstance(template, list) else _value_text(template)),
        ]
    return rows + [(name.replace("_", " "), _value_text(value)) for name, value in generation.items()]


def _table(title: str, rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """Write rows under a title, in columns; those of `right` end at their right."""
    rows = [tuple(map(_one_line, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            text.rjust(width) if place in right else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


def _one_line(text: str) -> str:
    """Write line ends and tabs as text, too: a token of a file might be a line that looks like ours."""
    return escape_controls(text).replace("\n", "\\n").replace("\t", "\\t")
