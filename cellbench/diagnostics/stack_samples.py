"""Runs a command as ``python -m cellbench.run`` does, and samples what its main thread does: where a whole `grid` spends its time.

python -m cellbench.diagnostics.stack_samples SAMPLES.json grid FILE …
"""

from __future__ import annotations

import json
import runpy
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType

EVERY_S = 0.02
_SKIPPED = ("cellbench.parallel", "cellbench.background", "cellbench.errors", __name__)
"""Modules that only call others; who called them says more."""


def place_of(frame: FrameType | None) -> str:
    """What a thread does: ``import PACKAGE``, or the innermost function of this package, as ``module:function``."""
    place = package = ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "_find_and_load":
            name = frame.f_locals["name"].partition(".")[0]
            if name == "cellbench":
                return f"import {package or name}"
            package = name  # of several, the one that cellbench asked for
        elif not place and not package and module.startswith("cellbench.") and module not in _SKIPPED:
            place = f"{module.removeprefix('cellbench.')}:{frame.f_code.co_name}"
        frame = frame.f_back
    return f"import {package}" if package else place or "start and end"


def main(arguments: list[str]) -> None:
    """Runs the command, which exits; writes seconds of the main thread by place to the file that the first argument names."""
    seconds: dict[str, float] = defaultdict(float)
    over, watched = threading.Event(), threading.main_thread().ident

    def watch() -> None:
        last = time.perf_counter()
        while not over.wait(EVERY_S):
            place = place_of(sys._current_frames().get(watched or 0))
            now = time.perf_counter()
            seconds[place] += now - last  # long ones count in full: an import may hold the interpreter's lock
            last = now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    sys.argv = ["cellbench", *arguments[1:]]
    try:
        runpy.run_module("cellbench.run", run_name="__main__")
    finally:
        over.set()
        watcher.join()
        Path(arguments[0]).write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
