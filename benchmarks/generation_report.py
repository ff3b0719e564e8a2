"""The tables and the plot of `generation.py`, made of what it measured."""

import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

NAMES = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
LIBRARIES = ("kllama", "KerasHub", "transformers", "llama.cpp")
COLOURS = {"kllama": "#d1495b", "KerasHub": "#30638e", "transformers": "#8d99ae", "llama.cpp": "#c9c9c9"}
OTHER_DTYPE = "another dtype"
"""What `agreement` says where ids need not agree."""
UNSTEADY = 0.05
"""The interquartile range, over the median, above which a figure gets a star."""


def merge(reports: list[dict]) -> dict:
    """Make one report of several, such as one of each backend."""
    return {
        **reports[0],
        "results": [result for report in reports for result in report["results"]],
        "fresh": [result for report in reports for result in report["fresh"]],
        "refused": [text for report in reports for text in report["refused"]],
    }


def tables(report: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """Give the title, the header and the rows of each table that has rows."""
    return [table for table in (_speed(report), _steps(report), _bfloat16(report), _fresh(report)) if table[2]]


def markdown(report: dict) -> str:
    """Write the tables as a README holds them."""
    parts = [f"{title}:\n\n{_pipes([header, *rows])}" for title, header, rows in tables(report)]
    return "\n\n".join([*parts, *_notes(report)])


def show(report: dict) -> None:
    """Print the tables, and what else is to be known of the run."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for title, header, rows in tables(report):
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in _notes(report):
        console.print(note)


def plot(report: dict, path: Path) -> None:
    """Draw tokens per second as bars: a panel for each case that KerasHub was measured in, a group for a backend."""
    from matplotlib import pyplot

    cases = {result["case"] for result in report["results"] if result["library"] == "KerasHub"}
    results = [result for result in report["results"] if result["case"] in cases and _is_float32(result)]
    panels = list(dict.fromkeys((result["case"], result["model"], result["title"]) for result in results))
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    size = {"figsize": (8, 0.7 + 2.3 * num_rows), "dpi": 200, "squeeze": False}
    figure, axes = pyplot.subplots(num_rows, num_columns, **size)
    for (case, model, title), ax in zip(panels, axes.flat, strict=False):
        _draw_panel(ax, [result for result in results if result["case"] == case])
        ax.set_title(f"{model}: {title}", fontsize=8)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    used = [name for name in LIBRARIES if any(result["library"] == name for result in results)]
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in used]
    legend = {"loc": "upper center", "ncols": len(used), "frameon": False, "fontsize": 9, "title_fontsize": 9}
    threads = report["machine"]["threads"]
    figure.legend(handles, used, title=f"Tokens per second, float32, {threads} threads", **legend)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / figure.get_figheight()), h_pad=1.5)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_panel(ax, results: list[dict]) -> None:
    """Draw the bars of one case, with the speed above each."""
    groups = {}
    for result in results:
        group = "C++" if result["library"] == "llama.cpp" else NAMES[result["backend"]]
        groups.setdefault(group, []).append(result)
    place, ticks = 0.0, {}
    for group in filter(groups.get, (*NAMES.values(), "C++")):
        ticks[place + (len(groups[group]) - 1) / 2] = group
        for result in groups[group]:
            speed = _tokens_per_second(result)
            ax.bar(place, speed, width=0.9, color=COLOURS[result["library"]])
            ax.text(place, speed, f"{speed:.0f}", ha="center", va="bottom", fontsize=6.5)
            place += 1
        place += 0.7
    ax.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    ax.tick_params(length=0)
    ax.set_yticks([])
    ax.spines[["left", "top", "right"]].set_visible(False)
    ax.margins(y=0.12)


def _notes(report: dict) -> list[str]:
    """Say what else is to be known of the run."""
    if not report["results"]:
        return []
    results = report["results"]
    idle = max(result["idle"] for result in results)
    rates = sorted({f"{result['bandwidth'] / 1e9:.1f}" for result in results}, key=float)
    ties = [result for result in results if result["agreement"] not in ("equal", OTHER_DTYPE)]
    return [
        *(f"Left out: {text}." for text in report["refused"]),
        f"Memory is read at {' to '.join(rates[:: len(rates) - 1 or 1])} GB/s; {report['machine']['threads']} threads. "
        f"Waiting processes used at most {idle:.1%} of a core.",
        *(f"{result['case']}, {result['backend']}, {result['library']}: {result['agreement']}." for result in ties),
    ]


def _speed(report: dict) -> tuple[str, list[str], list[list[str]]]:
    """Give tokens per second, and in brackets how many times as fast kllama is."""
    libraries = [name for name in LIBRARIES if any(result["library"] == name for result in report["results"])]
    rows = []
    for (model, title, backend), group in _groups(report).items():
        cells = [_speed_cell(group[name], group["kllama"]) if name in group else "" for name in libraries]
        rows.append([model, title, NAMES[backend], *cells])
    title = f"Tokens per second, all rows together; median of {report['rounds']} rounds"
    return title, ["model", "task", "backend", *libraries], rows


def _speed_cell(result: dict, kllama: dict) -> str:
    speed = f"{_tokens_per_second(result):.0f}{_star(result['seconds'])}"
    if result is kllama:
        return speed
    return f"{speed} ({statistics.median(result['seconds']) / statistics.median(kllama['seconds']):.2f})"


def _steps(report: dict) -> tuple[str, list[str], list[list[str]]]:
    """Give the time to the first token, the time of each step after it, and how well it uses the memory."""
    libraries = [name for name in LIBRARIES if any(result["library"] == name for result in report["results"])]
    rows = []
    for (model, title, backend), group in _groups(report).items():
        cells = [_step_cell(group[name]) if name in group else "" for name in libraries]
        rows.append([model, title, NAMES[backend], *cells])
    title = "Milliseconds to the first token, then for each further step, and its share of the read bandwidth"
    return title, ["model", "task", "backend", *libraries], rows


def _step_cell(result: dict) -> str:
    first = 1e3 * statistics.median(result["first"])
    return f"{first:.{_digits(first)}f}, {1e3 * _step(result):.2f}, {_share(result):.0%}"


def _bfloat16(report: dict) -> tuple[str, list[str], list[list[str]]]:
    """Compare kllama in bfloat16 with itself in float32: time, and the memory of a new process."""
    rows = []
    for result in sorted(report["results"], key=_order(report)):
        if _is_float32(result):
            continue
        key = result["case"], result["backend"], result["library"]
        wide = next(
            other for other in report["results"]
            if _is_float32(other) and (other["case"], other["backend"], other["library"]) == key
        )  # fmt: skip
        speeds = _tokens_per_second(wide), _tokens_per_second(result)
        rows.append(
            [
                result["model"],
                NAMES[result["backend"]],
                *(f"{speed:.0f}" for speed in speeds),
                f"{speeds[0] / speeds[1]:.2f}",
                f"{_share(wide):.0%}, {_share(result):.0%}",
            ]
        )
    header = ["model", "backend", "float32", "bfloat16", "time, bfloat16 / float32", "share of bandwidth"]
    return "kllama in bfloat16, tokens per second", header, rows


def _fresh(report: dict) -> tuple[str, list[str], list[list[str]]]:
    """Give what a new process takes; on JAX one that finds no compiled programs, and one that does."""
    rows = []
    for result in report["fresh"]:
        weights = result["weights"]
        rows.append(
            [
                NAMES[result["backend"]] + (", programs on disk" if result["has_programs"] else ""),
                result["library"],
                result["dtype"],
                f"{result['load']:.1f}",
                f"{result['first_call']:.2f}",
                f"{result['first_call'] - result['later_call']:.2f}",
                f"{result['loaded'] / weights:.2f}",
                f"{result['held'] / weights:.2f}",
                f"{result['peak'] / weights:.2f}",
            ]
        )
    model = report["fresh"][0]["model"] if report["fresh"] else ""
    header = ["backend", "library", "dtype", "load, s", "first call, s", "of it once", "memory loaded", "held", "peak"]
    return f"A new process, {model}, prompt 16 + 128; memory over that of the float32 weights", header, rows


def _groups(report: dict) -> dict:
    """Collect the float32 results by model, task and backend, as libraries by name."""
    groups = {}
    for result in sorted(filter(_is_float32, report["results"]), key=_order(report)):
        groups.setdefault((result["model"], result["title"], result["backend"]), {})[result["library"]] = result
    return groups


def _order(report: dict):
    cases = list(dict.fromkeys(result["case"] for result in report["results"]))
    return lambda result: (cases.index(result["case"]), list(NAMES).index(result["backend"]))


def _is_float32(result: dict) -> bool:
    return result["dtype"] == "float32"


def _tokens_per_second(result: dict) -> float:
    return result["num_rows"] * result["num_new"] / statistics.median(result["seconds"])


def _step(result: dict) -> float:
    """Give the seconds of a step: what a call takes beyond the first new token, for each of the others."""
    return (statistics.median(result["seconds"]) - statistics.median(result["first"])) / (result["num_new"] - 1)


def _share(result: dict) -> float:
    return result["bytes_per_step"] / _step(result) / result["bandwidth"]


def _star(seconds: list[float]) -> str:
    if len(seconds) < 2:
        return ""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return "*" if high - low > UNSTEADY * statistics.median(seconds) else ""


def _digits(number: float) -> int:
    return 1 if number < 100 else 0


def _pipes(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
