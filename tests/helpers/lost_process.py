"""A worker that dies over every cohort but the last, for tests: what it was handed stands in ``handed.txt``."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from cellbench.execution.claims import Outcome


def work(pipe: Any, order: Any, cores: Any) -> None:
    while (asked := pipe.recv()) is not None:
        _, title, halvings = asked
        with Path("handed.txt").open("a") as file:
            file.write(f"{title}: {halvings}\n")
        if title == "cohort 1 of 2":
            os.kill(os.getpid(), signal.SIGKILL)
        pipe.send(("done", Outcome(skipped={title: "nothing done"})))
