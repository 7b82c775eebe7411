"""Small commands in folders of their own, and what has to be the same after a disturbance.

For ``kill_sweep.py``, ``disk_sweep.py``, ``interruptions.py`` and ``memory_slope.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
HEAD = 'experiment = "x"\ndataset = "smears"\n'
DATA = "[data.draw]\nnum_train = 4\nnum_test = 2\nwidth_px = 128\nheight_px = 128\n"
RUN = "[run]\nepochs = 3\npatience = 0\ncrops_per_image = 2\ntile_px = 128\n"
GRID = f'{HEAD}baselines = ["otsu"]\n{DATA}[grid]\nbackbone = ["filter-bank"]\nhead = ["bilinear"]\nseed = [0, 1]\nlr = [1e-3, 3e-3]\n{RUN}'
SPACE = '[space]\nbackbone = ["filter-bank"]\nhead = ["bilinear"]\nlr = {low = 1e-4, high = 1e-2, log = true}\n'
SEARCH = f"{HEAD}{DATA}[search]\ntrials = 6\nbatch = 2\nstartup = 4\nrepeat_best = 1\n{SPACE}{RUN}"
COMMANDS = {
    "grid": ["grid", "grid.toml"],
    "workers": ["grid", "grid.toml", "--workers", "2"],
    "ray": ["grid", "grid.toml", "--on", "ray"],
    "search": ["search", "search.toml"],
    "predict": ["predict", "../model", "../images", "--out", "masks", "--instances", "--geojson", "--coco", "--overlay"],
}
# A checkpoint after each epoch, in this process; by default they are written every 30 s, longer than these runs take.
START = (
    "import sys\nfrom cellbench.training import checkpoints\ncheckpoints.EVERY_S = 0\nfrom cellbench.cli.main import main\nsys.exit(main())"
)
SILENT_S = 400.0
"""A command that takes longer does not end."""


class Try:
    """One folder with its cache and store, in which commands run."""

    def __init__(self, place: Path, template: Path | None = None) -> None:
        self.place = place
        for part in ("cache", "tmp"):
            (place / part).mkdir(parents=True)
        (place / "grid.toml").write_text(GRID)
        (place / "search.toml").write_text(SEARCH)
        if template is not None:  # the empty store that a command makes once for each version of MLflow
            shutil.copytree(template / "cache" / "mlflow_store", place / "cache" / "mlflow_store", dirs_exist_ok=True)

    def start(self, arguments: list[str], *, prefix: tuple[str, ...] = (), code: str = START, **names: str) -> psutil.Popen:
        """The command, started behind the words ``prefix``, with more environment variables ``names``."""
        folders = {"CELLBENCH_CACHE": "cache", "TMPDIR": "tmp", "RAY_TMPDIR": "tmp"}
        there = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "OPTUNA_STORAGE")}
        there |= {name: str(self.place / part) for name, part in folders.items()}
        there |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
        there |= {"OMP_NUM_THREADS": "2" if "--workers" in arguments else "1"}
        call = [sys.executable, "-m", "cellbench"] if "--workers" in arguments or "--on" in arguments else [sys.executable, "-c", code]
        with (self.place / "log").open("ab") as log:
            return psutil.Popen(
                [*prefix, *call, *arguments], cwd=self.place, env=there | names, stdout=log, stderr=log, start_new_session=True
            )

    def run(self, arguments: list[str]) -> tuple[int, float]:
        """Exit code and wall seconds; -999 for a command that does not end."""
        begin, process = time.monotonic(), self.start(arguments)
        return end(process), time.monotonic() - begin

    def state(self) -> dict[str, object]:
        """What is finished: runs as ``(fingerprint, id, end, numbers)``, trials, and files of ``predict``; and whether the stores are sound."""
        runs, trials, sound = [], {}, True
        for name in ("mlflow.db", "mlruns/optuna.db"):
            if (self.place / name).exists():
                with contextlib.closing(sqlite3.connect(self.place / name, timeout=60)) as store:
                    sound &= store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                    with contextlib.suppress(sqlite3.OperationalError):  # killed before the tables were made
                        if name == "mlflow.db":
                            runs = _runs(store)
                        else:
                            rows = store.execute("SELECT number, state, value FROM trials LEFT JOIN trial_values USING (trial_id)")
                            trials = {number: value for number, state, value in rows if state == "COMPLETE"}
        masks = {path.name: path for path in sorted(self.place.glob("masks/*")) if not path.name.startswith(".")}
        digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in masks.items()}
        done = {name: path.stat().st_mtime_ns for name, path in masks.items() if name.count(".") == 1 and name.endswith(".png")}
        return {"runs": runs, "trials": trials, "sound": sound, "files": digests, "done": done}

    def leftovers(self) -> list[str]:
        kinds = (
            "**/*.cellbench-part",
            "**/*-journal",
            "cache/checkpoints/*.pt",
            "cache/offline_queue/*/*",
            "**/.*.????????",
            "tmp/cellbench-*",
        )
        found = {path for kind in kinds for path in self.place.glob(kind) if "ray" not in path.parts}
        return [str(path.relative_to(self.place)) for path in sorted(found) if path.name not in (".cellbench",)]


def _runs(store: sqlite3.Connection) -> list[tuple[str, str, int, str]]:
    found = []
    for run, end in store.execute("SELECT run_uuid, end_time FROM runs WHERE lifecycle_stage = 'active' ORDER BY run_uuid").fetchall():
        tags = dict(store.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run,)))
        numbers = sorted(store.execute("SELECT key, value FROM latest_metrics WHERE run_uuid = ?", (run,)))
        kept = [one for one in numbers if not one[0].startswith(("cost/", "system/"))]
        if "mlflow.parentRunId" in tags and tags.get("cellbench.status") in ("finished", "validated", "pruned"):
            found.append((tags["cellbench.fingerprint"] + tags.get("optuna.trial", ""), run, end, json.dumps(kept)))
    return found


def end(process: psutil.Popen) -> int:
    try:
        return process.wait(SILENT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return -999


def compare(before: dict, after: dict, usual: dict) -> dict[str, object]:
    """Faults of the state ``after`` a command that went on from ``before``. ``usual``: the state that an undisturbed command leaves."""
    known = {run[1]: run for run in after["runs"]}
    same = Counter(run[0] for run in after["runs"])
    return {
        "lost": sum(run != known.get(run[1]) for run in before["runs"])
        + sum(after["done"].get(name) != at for name, at in before["done"].items())
        + sum(num - 1 for num in same.values()),
        "numbers": sorted((r[0], r[3]) for r in after["runs"]) != sorted((r[0], r[3]) for r in usual["runs"])
        or any(after[what] != usual[what] for what in ("trials", "files")),
        "unreadable": not before["sound"] or not after["sound"],
    }


def write_table(name: str, results: list[dict], kinds: list[str], columns: list[str], out: Path | None) -> str:
    """The table of all tries; it and the tries are also written to the folder ``out``, as files of this name."""
    lines = [" ".join(f"{column:>12}" for column in ["command", *columns])]
    for kind in [*kinds, "all"]:
        total: Counter[str] = Counter()
        for result in results:
            if kind in (result["kind"], "all"):
                total.update(result["facts"])
        lines.append(" ".join(f"{value:>12}" for value in [kind, *(total[column] for column in columns)]))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.txt").write_text("\n".join(lines) + "\n")
        (out / f"{name}.json").write_text(json.dumps(results, indent=1))
    return "\n".join(lines)
