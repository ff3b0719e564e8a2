"""The progress display: nothing where nobody looks, a bar on a terminal."""

import io

import pytest
import rich.console

from kllama.checkpoints import progress

pytestmark = pytest.mark.backend_independent


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal in the place of stderr would be sent."""
    output = io.StringIO()
    console = rich.console.Console(file=output, force_terminal=True, width=80)
    monkeypatch.setattr(rich.console, "Console", lambda **_: console)
    return output


def test_without_a_display_it_only_iterates(capsys):
    assert list(progress.track(iter("abc"), "weights", total=3)) == list("abc")
    with progress.show():
        assert list(progress.track("abc", "weights")) == list("abc")  # stderr is no terminal here
    assert capsys.readouterr() == ("", "")


def test_bar(terminal, capsys):
    with progress.show():
        assert list(progress.track(iter("abc"), "weights of [model]", total=3)) == list("abc")
    assert "weights of [model]" in terminal.getvalue() and "3/3" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_the_display_ends_with_its_block(terminal):
    with pytest.raises(KeyError), progress.show():
        raise KeyError
    before = terminal.getvalue()
    assert list(progress.track("abc", "weights")) == list("abc")
    assert terminal.getvalue() == before
