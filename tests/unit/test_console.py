"""Claims about output: a line and a bar are shown, and inside ``silent`` neither is."""

from __future__ import annotations

from cellbench.console import ProgressBar, say, silent


def test_lines_and_bars_are_shown_again_after_silence(capsys):
    with silent():
        say("first")
        assert list(ProgressBar(range(3), desc="first")) == [0, 1, 2]
    say("second")
    list(ProgressBar(range(3), desc="second"))
    shown = capsys.readouterr()
    assert shown.out == "second\n"
    assert "second" in shown.err
    assert "first" not in shown.err
