"""The progress of loading and saving: whatever is tracked and takes over a second shows a bar on stderr.

    for name, tensor in progress.track(tensors, "loading weights"):

Only where stderr is a terminal or a notebook; the bar vanishes when the work is done. `quiet()` and the environment
variable `KLLAMA_PROGRESS=0` keep it away. It knows nothing of checkpoints.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

VARIABLE = "KLLAMA_PROGRESS"
_SECONDS = 1.0

_is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Show nothing of what is tracked inside the `with` block."""
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def track(
    items: Iterable[T], description: str, total: int | None = None, size: Callable[[T], int] | None = None
) -> Iterator[T]:
    """Iterate over `items`, and show how far the iteration is once it has taken a second.

    Args:
        items: what is worked through.
        description: what is being done, in a few words.
        total: the sum of all sizes. Defaults to `len(items)` where they have a length.
        size: gives the part of `total` that an item is, such as its bytes. By default each is 1.

    Returns:
        An iterator over the same items.
    """
    if _is_quiet.get() or os.environ.get(VARIABLE) == "0" or not _is_seen():
        return iter(items)
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    return _tracked(items, description, total, size or (lambda item: 1))


def _is_seen() -> bool:
    """Tell whether somebody may look at stderr, without importing anything."""
    if "ipykernel" in sys.modules:
        return importlib.util.find_spec("ipywidgets") is not None  # rich draws with it
    return sys.stderr is not None and sys.stderr.isatty()


def _tracked(items: Iterable[T], description: str, total: int | None, size: Callable[[T], int]) -> Iterator[T]:
    start, done, bar = time.monotonic(), 0, None
    try:
        for item in items:
            yield item
            done += size(item)
            del item  # a tensor must not stay while the next one is read
            if bar is None and time.monotonic() - start > _SECONDS:
                bar = _open_bar(description, total)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
    finally:
        if bar is not None:
            bar.stop()


def _open_bar(description: str, total: int | None) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    # Without markup: a description may hold a path, and a path may hold brackets.
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
    bar.add_task(description, total=total)
    bar.start()
    return bar
