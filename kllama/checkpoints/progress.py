"""The progress of loading and saving: the loaders say what they do, and whoever wants to see it opens a display.

    with progress.show():                                        # the command line
        for name, tensor in progress.track(tensors, "weights"):  # a loader, anywhere beneath it

Outside `show` nothing is drawn and `track` costs nothing. It knows nothing of checkpoints.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

_display: ContextVar["Progress | None"] = ContextVar("display", default=None)


@contextmanager
def show() -> Iterator[None]:
    """Draw a bar on stderr for everything that is tracked inside the `with` block.

    The bars vanish at the end of the block. Where stderr is not a terminal nothing is drawn.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    # Without markup: a description may hold a path, and a path may hold brackets.
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal
    ) as display:
        token = _display.set(display)
        try:
            yield
        finally:
            _display.reset(token)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items`, and show how far the iteration is where `show` is active.

    Args:
        items: what is worked through.
        description: what is being done, in a few words.
        total: how many items there are. Defaults to `len(items)` where they have a length.

    Returns:
        An iterator over the same items.
    """
    display = _display.get()
    return iter(items if display is None else display.track(items, total=total, description=description))
