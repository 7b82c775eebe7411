"""Progress of a grid: one bar over all cohorts with the time left on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from cellbench.console import progress_bar
from cellbench.execution.planning import ResolvedRun

Report = Callable[[float, str], object]
"""Takes the part of a cohort that is done, 0 to 1, and what it is doing."""
EVERY_S = 60.0
"""Interval of the lines where there is no terminal."""
STEP_COSTS = {"training": 3.0, "validating": 1.0, "testing": 2.0}
"""Relative cost of a tile in each phase: a training step also goes backwards; a test blends tiles and scores cells."""


class GridProgress:
    """The bar. Cohorts are weighted by their expected cost, so that it moves at about the same speed throughout."""

    def __init__(self, cohorts: Sequence[Sequence[ResolvedRun]], say: Callable[[str], None]) -> None:
        self._weights = {_key(cohort): relative_cost(cohort) for cohort in cohorts}
        self._done = dict.fromkeys(self._weights, 0.0)
        self._say, self._start_s, self._said_s = say, time.monotonic(), time.monotonic()
        look = "{percentage:3.0f} % {bar} {elapsed}, {remaining} left  {desc}"
        self._bar = progress_bar(total=max(sum(self._weights.values()), 1e-9), bar_format=look, smoothing=0.0)

    def __enter__(self) -> GridProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def of(self, cohort: Sequence[ResolvedRun]) -> Report:
        """The function through which one cohort reports."""
        return lambda part, doing: self.update(cohort, part, doing)

    def update(self, cohort: Sequence[ResolvedRun], part: float, doing: str = "") -> None:
        key, run = _key(cohort), cohort[0].run
        if doing:
            self._bar.set_description_str(f"{run.backbone or run.baseline}, {doing}", refresh=False)
        self._done[key] = min(1.0, max(part, self._done[key]))
        now = sum(self._weights[one] * done for one, done in self._done.items())
        self._bar.update(now - self._bar.n)
        share, past_s = now / self._bar.total, time.monotonic() - self._start_s
        if not sys.stderr.isatty() and time.monotonic() - self._said_s > EVERY_S and 0 < share < 1:
            self._said_s = time.monotonic()
            self._say(f"{share:.0%} done, about {past_s * (1 - share) / share / 60:.0f} min left ({run.backbone or run.baseline}, {doing})")


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
