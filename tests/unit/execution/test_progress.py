"""Claims about progress: the bar moves in small steps after a large one and never back; in a pipe there is a line now and then."""

from __future__ import annotations

import io
import sys
import time

import pytest

from cellbench.execution import progress
from cellbench.execution.progress import Progress
from cellbench.search.worker import SearchProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_small_step_after_a_large_one_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(100, print) as bar:
        for now in (60, 61, 40):
            time.sleep(0.11)  # tqdm shows at most ten times a second
            bar.move(now, f"at {now}")
    shown = terminal.getvalue()
    assert " 60 % " in shown
    assert " 61 % " in shown
    assert " 40 % " not in shown


def test_in_a_pipe_there_is_no_bar_but_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with Progress(10, lines.append, done=2) as bar:
        bar.move(4, "training")
        assert lines == []
        monkeypatch.setattr(progress, "EVERY_S", 0.0)
        bar._start_s -= 60  # two in a minute
        bar.move(5)
        bar.move(9)
    assert capsys.readouterr().err == ""
    assert lines == ["50% done, about 2 min left (training)", "90% done, less than a minute left (training)"]


def test_the_time_left_is_not_said_from_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time past is then that of starting, and the answer would be hours too long."""
    monkeypatch.setattr(progress, "EVERY_S", -1.0)
    lines: list[str] = []
    with Progress(1000, lines.append) as bar:
        bar.move(4, "training")
        bar.move(20)
    assert lines[0] == "0% done (training)"
    assert " left" in lines[1]


def test_a_search_shows_the_trials_of_all_processes_and_the_part_that_this_one_has_done() -> None:
    with SearchProgress(8, 2, print) as bar:
        first, shown = bar.cohort(2), []
        for part in (0.5, 1.0):
            first(part, "training")
            shown.append(bar._now)
        bar.cohort(1)(0.5, "validating")
        shown.append(bar._now)
        bar.count(6, 0.91234)
        shown.append(bar._now)
        assert bar._bar.desc == "6/8 trials, best 0.9123"
    assert shown == [3.0, 4.0, 4.5, 6.0]


def test_a_line_is_said_before_it_is_known_what_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Ray, whose cohorts report when they have ended."""
    monkeypatch.setattr(progress, "EVERY_S", -1.0)
    said: list[str] = []
    with progress.Progress(4.0, said.append) as bar:
        bar.move(1.0)
        bar.move(2.0, "testing")
    assert [line.partition("% done")[0] for line in said] == ["25", "50"]
    assert "(" not in said[0]
    assert said[1].endswith("(testing)")
