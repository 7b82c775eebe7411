"""What becomes of a run that fails: one policy for runs in this process, in other processes and on Ray.

A run fails with a reason, and the others go on:

* An error of one run (of its head, its loss, its scores, its run in MLflow) fails this run. The others of its cohort resume from their checkpoints.
* An error of the input that all runs of a cohort read (weights that do not fit their card, an image that cannot be read) fails all of them.
* Any other error of a cohort of several runs: each of them is run alone, and those that fail again fail. Numbers do not depend on the cohort.
* A fault that all runs would meet (:class:`~cellbench.errors.SystemFault`), such as a full disk, stops the grid; the same command continues.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from cellbench.errors import CellbenchError, one_line

TRACEBACK = "error.txt"
"""The artifact of a failed run that holds the traceback."""


def describe_failure(error: BaseException) -> str:
    """The error as a reason of one line, with its place in the code where it is not one of the input."""
    if isinstance(error, CellbenchError):
        return one_line(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in Path(frame.filename).parts]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {one_line(error)}{place}. {TRACEBACK} of this run in MLflow holds the traceback."


def traceback_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
