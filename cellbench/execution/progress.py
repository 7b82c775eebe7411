"""Progress of a grid or search: one bar over all of it with the time left on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from cellbench.console import progress_bar
from cellbench.execution.planning import ResolvedRun

Report = Callable[[float, str], object]
"""Takes the part of a cohort that is done, 0 to 1, and what it is doing."""
EVERY_S = 60.0
"""Interval of the lines where there is no terminal."""
LEAST_SHARE = 0.01
"""Part of the whole from which on the lines give the time left: before, most of the time past is that of starting."""
STEP_COSTS = {"training": 3.0, "validating": 1.0, "testing": 2.0}
"""Relative cost of a tile in each phase: a training step also goes backwards; a test blends tiles and scores cells."""


class Progress:
    """One bar with the time left on a terminal; elsewhere a line now and then. ``done``: the part of ``total`` that earlier calls have done."""

    def __init__(self, total: float, say: Callable[[str], None], done: float = 0.0) -> None:
        self.total, self._first, self._now = max(total, 1e-9), done, done
        self._say, self._start_s, self._said_s, self._doing = say, time.monotonic(), time.monotonic(), ""
        look = "{percentage:3.0f} % {bar} {elapsed}, {remaining} left  {desc}"
        # miniters: else a large step would hide the small ones after it.
        self._bar = progress_bar(total=self.total, initial=done, bar_format=look, smoothing=0.0, miniters=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def move(self, now: float, doing: str = "") -> None:
        """Moves the bar to ``now`` of its total, never back. ``doing``: what is being done; by default as before."""
        if doing:
            self._doing = f" ({doing})"  # a bar that is switched off has no description
            self._bar.set_description_str(doing, refresh=False)
        step = max(0.0, min(now, self.total) - self._now)
        self._now += step
        self._bar.update(step)
        share, past_s = self._now / self.total, time.monotonic() - self._start_s
        if not sys.stderr.isatty() and time.monotonic() - self._said_s > EVERY_S and self._first < self._now < self.total:
            self._said_s = time.monotonic()
            here = self._now - self._first
            left = ""
            if here >= LEAST_SHARE * self.total:
                left_min = round(past_s * (self.total - self._now) / here / 60)
                left = f", about {left_min} min left" if left_min else ", less than a minute left"
            self._say(f"{share:.0%} done{left}{self._doing}")


class GridProgress(Progress):
    """Progress of a grid. Cohorts are weighted by their expected cost, so that it moves at about the same speed throughout."""

    def __init__(self, cohorts: Sequence[Sequence[ResolvedRun]], say: Callable[[str], None]) -> None:
        self._weights = {_key(cohort): relative_cost(cohort) for cohort in cohorts}
        self._done = dict.fromkeys(self._weights, 0.0)
        super().__init__(sum(self._weights.values()), say)

    def of(self, cohort: Sequence[ResolvedRun]) -> Report:
        """The function through which one cohort reports."""
        return lambda part, doing: self.update(cohort, part, doing)

    def update(self, cohort: Sequence[ResolvedRun], part: float, doing: str = "") -> None:
        key, run = _key(cohort), cohort[0].run
        self._done[key] = min(1.0, max(part, self._done[key]))
        now = sum(self._weights[one] * done for one, done in self._done.items())
        self.move(now, f"{run.backbone or run.baseline}, {doing}" if doing else "")


class CohortProgress:
    """The steps of one cohort: ``steps`` holds the number of tiles in each phase, by :data:`STEP_COSTS`."""

    def __init__(self, report: Report, steps: Mapping[str, float]) -> None:
        self._report, self._steps, self._done = report, dict(steps), dict.fromkeys(steps, 0.0)

    def update(self, phase: str, num: float) -> None:
        self._done[phase] = min(self._steps[phase], self._done[phase] + num)
        total = sum(STEP_COSTS[one] * num for one, num in self._steps.items())
        done = sum(STEP_COSTS[one] * num for one, num in self._done.items())
        self._report(0.97 * done / max(total, 1e-9), phase)  # the rest is for writing results

    def end(self, *phases: str) -> None:
        """Counts these phases as done."""
        for phase in phases:
            self.update(phase, self._steps[phase])


def no_report(part: float, doing: str) -> Any:
    """Reports to nobody."""


def relative_cost(cohort: Sequence[ResolvedRun]) -> float:
    """The expected cost of a cohort, compared with other cohorts."""
    if not cohort[0].trained:
        return 10.0
    params_m = cohort[0].backbone.params_m if cohort[0].backbone else 0.0
    return (10 + params_m) * max(one.run.epochs for one in cohort) + sum(one.run.epochs for one in cohort)


def _key(cohort: Sequence[ResolvedRun]) -> str:
    return cohort[0].fingerprint
