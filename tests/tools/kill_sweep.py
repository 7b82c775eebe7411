"""Kills commands at random moments, and gives each of them again: is anything lost, or any number changed?

    python tests/tools/kill_sweep.py --kills 200 --jobs 2 [--kinds grid workers ray search predict] [--seconds S] [--out FOLDER] [--seed N]

A try has a folder, a cache and a store of its own. The command is started; at a random moment one of its processes (mostly the first) is killed by
SIGKILL, together with nobody else. Then the same command runs to its end, and is compared with one that nobody disturbed. Faults that are counted:

- lost: a run, trial or mask that was finished at the kill and is not, or was made once more, or runs that exist twice;
- numbers: a metric, a value of a trial or a byte of a predicted file that differs;
- unreadable: a store that SQLite calls damaged, right after the kill;
- leftovers: unfinished files, checkpoints, journals or temporary folders after the end;
- orphans: processes that still run 60 s after the first one was killed;
- refused: the second command ends with an exit code other than 0, or a command prints a traceback or does not end.

Exit code 1 if there is any. The last lines are a table; with ``--out``, ``kill_sweep.json`` and ``kill_sweep.txt`` hold it too.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
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
        return _end(process), time.monotonic() - begin

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


def _end(process: psutil.Popen) -> int:
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


def attempt(kind: str, place: Path, usual: dict, wall_s: float, seed: int, template: Path) -> dict:
    """One kill and what follows. ``usual``: the state that an undisturbed command leaves; ``wall_s``: how long it takes."""
    dice, one = random.Random(seed), Try(place, template if seed % 5 else None)
    process = one.start(COMMANDS[kind])
    at_s, end = dice.uniform(0.35 if dice.random() < 0.9 else 0.0, 1.0) * wall_s, time.monotonic()
    end += at_s
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.01)
    tree = [process, *process.children(recursive=True)] if process.poll() is None else []
    facts: Counter[str] = Counter(tries=1, kills=bool(tree))
    victim = dice.choice(tree) if tree and dice.random() < 0.4 else process
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.kill()
    facts["of workers"] = victim is not process
    code = _end(process)
    facts["survived"] = bool(tree) and code == 0
    _, left = psutil.wait_procs([other for other in tree if other is not process], timeout=60)
    for other in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            other.kill()
    before = one.state()
    facts["with results"] = bool(before["runs"] or before["done"])
    again, _ = one.run(COMMANDS[kind])
    after, log = one.state(), (place / "log").read_text(errors="replace")
    faults = compare(before, after, usual) | {
        "leftovers": one.leftovers(),
        "orphans": len(left),
        "refused": again != 0 or "Traceback" in log or code == -999,
    }
    bad = {name: value for name, value in faults.items() if value}
    facts.update({name: bool(faults[name]) for name in faults})
    if bad:
        print(f"{place}: {kind}, seed {seed}, killed after {at_s:.1f} s of {wall_s:.1f}, exit code {again}: {bad}", flush=True)
    else:
        shutil.rmtree(place, ignore_errors=True)
    return {"kind": kind, "seed": seed, "at_s": at_s, "facts": dict(facts), "bad": {k: str(v) for k, v in bad.items()}}


def _write(out: Path | None, results: list[dict], kinds: list[str]) -> str:
    """The table of all tries; it and the tries are also written to the folder ``out``."""
    columns = [
        "tries",
        "kills",
        "of workers",
        "survived",
        "with results",
        "lost",
        "numbers",
        "unreadable",
        "leftovers",
        "orphans",
        "refused",
    ]
    lines = [" ".join(f"{name:>12}" for name in ["command", *columns])]
    for kind in [*kinds, "all"]:
        total: Counter[str] = Counter()
        for result in results:
            if kind in (result["kind"], "all"):
                total.update(result["facts"])
        lines.append(" ".join(f"{value:>12}" for value in [kind, *(total[name] for name in columns)]))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "kill_sweep.txt").write_text("\n".join(lines) + "\n")
        (out / "kill_sweep.json").write_text(json.dumps(results, indent=1))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--kinds", nargs="+", default=[k for k in COMMANDS if k != "ray" or importlib.util.find_spec("ray")], choices=COMMANDS
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no try that would end later")
    parser.add_argument("--out", type=Path, help="folder of kill_sweep.json and kill_sweep.txt")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    begin, folder, results = time.monotonic(), Path(tempfile.mkdtemp(prefix="kill-sweep-")), []
    reference = Try(folder / "grid")
    code, wall_s = reference.run(COMMANDS["grid"])
    assert code == 0, (folder / "grid" / "log").read_text()
    (folder / "images").mkdir()
    assert reference.run(["export", "best:x", "--out", "../model"])[0] == 0, (folder / "grid" / "log").read_text()
    for path in sorted((folder / "grid" / "cache" / "drawn").glob("*/t*/original/*.png")):
        for copy in range(3):  # enough that predict takes some seconds
            shutil.copy(path, folder / "images" / f"{path.stem}-{copy}.png")
    # Workers and Ray have to give the numbers of one process.
    usual, walls = dict.fromkeys(asked.kinds, reference.state()), dict.fromkeys(asked.kinds, wall_s)
    with ThreadPoolExecutor(asked.jobs) as pool:
        tries = {kind: Try(folder / f"usual-{kind}", folder / "grid") for kind in asked.kinds if kind in ("search", "predict")}
        for kind, (code, walls[kind]) in zip(tries, pool.map(lambda k: tries[k].run(COMMANDS[k]), tries), strict=True):
            assert code == 0, (folder / f"usual-{kind}" / "log").read_text()
            usual[kind] = tries[kind].state()
        for left in (left for one_try in (reference, *tries.values()) if (left := one_try.leftovers())):
            print(f"left by a command that nobody disturbed: {left}", flush=True)
        print(f"undisturbed: {', '.join(f'{kind} {wall:.0f} s' for kind, wall in walls.items())}", flush=True)

        def one(number: int) -> dict | None:
            kind = asked.kinds[number % len(asked.kinds)]
            if time.monotonic() - begin + 2.5 * walls[kind] > asked.seconds:
                return None
            return attempt(kind, folder / f"try-{number}", usual[kind], walls[kind], asked.seed + number, folder / "grid")

        for done in as_completed([pool.submit(one, number) for number in range(asked.kills)]):
            if (result := done.result()) is not None:
                results.append(result)
                if len(results) % 10 == 0:
                    print(f"{len(results)} tries after {time.monotonic() - begin:.0f} s", flush=True)
                    _write(asked.out, results, asked.kinds)
    print(_write(asked.out, results, asked.kinds), flush=True)
    bad = any(result["bad"] for result in results)
    print(f"the folders of tries with faults are in {folder}" if bad else "no faults", flush=True)
    if not bad:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
