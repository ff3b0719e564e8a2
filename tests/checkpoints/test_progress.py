"""The progress display: nothing where nobody looks or nothing takes long, else a bar on a terminal that vanishes."""

import io
import itertools
from types import SimpleNamespace

import pytest
import rich.console

from kllama.checkpoints import progress

pytestmark = pytest.mark.backend_independent


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal in the place of stderr would be sent."""
    output = io.StringIO()
    output.isatty = lambda: True
    console = rich.console.Console(file=output, force_terminal=True, width=80)
    monkeypatch.setattr(rich.console, "Console", lambda **_: console)
    # Not sys.stderr itself, in whose place pytest puts its own for each phase of a test.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=output, modules={}))
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    return output


@pytest.fixture
def slow(monkeypatch):
    """Every look at the clock finds that two seconds have gone by."""
    times = itertools.count(0, 2)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times)))


def test_where_nobody_looks_it_only_iterates(capsys, slow):
    items = iter("abc")
    assert progress.track(items, "weights", total=3) is items  # which costs nothing
    assert list(items) == list("abc")
    assert capsys.readouterr() == ("", "")


def test_without_a_stderr(monkeypatch):
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=None, modules={}))
    assert list(progress.track("abc", "weights")) == list("abc")


def test_bar(terminal, slow, capsys):
    assert list(progress.track(iter("abc"), "weights of [model]", total=3)) == list("abc")
    shown = terminal.getvalue()
    assert "weights of [model]" in shown and "100%" in shown
    assert shown.endswith("\x1b[2K")  # the line is wiped
    assert capsys.readouterr().out == ""


def test_items_count_by_their_size(terminal, slow):
    items = progress.track([b"aaa", b"b"], "bytes", total=4, size=len)
    next(items), next(items)
    items.close()
    assert "75%" in terminal.getvalue()


def test_what_is_soon_done_shows_nothing(terminal):
    assert list(progress.track("abc", "weights")) == list("abc")
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("how", ["quiet", "variable"])
def test_silence(terminal, slow, monkeypatch, how):
    if how == "variable":
        monkeypatch.setenv(progress.VARIABLE, "0")
        assert list(progress.track("abc", "weights")) == list("abc")
    else:
        with progress.quiet():
            assert list(progress.track("abc", "weights")) == list("abc")
    assert terminal.getvalue() == ""


def test_the_bar_ends_with_an_error(terminal, slow):
    def fail():
        yield from "ab"
        raise KeyError

    with pytest.raises(KeyError):
        list(progress.track(fail(), "weights", total=9))
    assert terminal.getvalue().endswith("\x1b[2K")


def test_two_bars_at_a_time(terminal, slow):
    pairs = [(a, b) for a in progress.track("ab", "outer") for b in progress.track("cd", "inner")]
    assert len(pairs) == 4
