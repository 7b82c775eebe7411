"""Two drivers start one grid, or one search, at the same moment, as if on two machines that share nothing but MLflow's server.

    python tests/tools/two_machines.py --tries 5 [--database postgresql://…] [--search] [--kill]

Each driver has its own temporary folder, home and cache, and where Linux permits it its own host name and process numbers. ``--database``: where the
server keeps its runs, and the search its trials; by default SQLite files. ``--kill``: one driver is killed after a few seconds, and started again.
Counts runs that exist twice, parent runs, missing runs, model entries that exist twice, and trials beyond those asked for. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from mlflow_server import Server  # noqa: E402

GRID = """experiment = "{name}"
dataset = "smears"
baselines = ["otsu"]
[data.draw]
num_train = 4
num_test = 2
width_px = 200
height_px = 200
[grid]
backbone = ["filter-bank", "vit-tiny-random"]
head = ["bilinear"]
[run]
epochs = 5
patience = 0
crops_per_image = 2
tile_px = 128
"""
SEARCH = """experiment = "{name}"
dataset = "smears"
[data.draw]
num_train = 4
num_test = 2
width_px = 200
height_px = 200
[search]
trials = 8
batch = 2
startup = 4
repeat_best = 1
[space]
backbone = ["filter-bank"]
head = ["bilinear"]
lr = {{low = 1e-4, high = 1e-2, log = true}}
[run]
epochs = 4
patience = 0
crops_per_image = 2
tile_px = 128
"""


def start(number: int, command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    home = folder / f"machine-{number}"
    for part in ("tmp", "home", "cache", "work"):
        (home / part).mkdir(parents=True, exist_ok=True)
    names = {"TMPDIR": home / "tmp", "HOME": home / "home", "CELLBENCH_CACHE": home / "cache", "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "cellbench", *command]
    if shutil.which("unshare") and os.getuid() == 0:
        inner = f'hostname machine-{number}; exec "$@"'
        call = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", inner, "-", *call]
    with (home / "log").open("ab") as log:
        return subprocess.Popen(
            call, cwd=home / "work", env=os.environ | environment | {k: str(v) for k, v in names.items()}, stdout=log, stderr=log
        )


def count(server: Server, name: str, trials: int) -> dict[str, int]:
    """The faults that MLflow holds of one experiment."""
    import mlflow

    client = mlflow.MlflowClient(server.address)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None, f"{name} was not made"
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [run for run in runs if "cellbench.kind" in run.data.tags]
    others = [run for run in runs if run not in parents]
    same = Counter(run.data.tags.get("cellbench.fingerprint", "") for run in others)
    models = Counter(model.source_run_id for model in client.search_logged_models([experiment.experiment_id]))
    wanted = 0 if trials else 3
    faults = {
        "duplicate runs": sum(num - 1 for num in same.values()),
        "extra parents": len(parents) - 1,
        "missing runs": max(0, wanted - sum(run.data.tags.get("cellbench.status") == "finished" for run in others)),
        "duplicate models": sum(num - 1 for num in models.values()),
    }
    if trials:
        faults["extra trials"] = sum("optuna.trial" in run.data.tags for run in others) - trials
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--database", default="", help="URL of a server of databases; `mlflow` and `optuna` must exist there")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--kill", action="store_true")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="two-machines-"))
    server = Server(folder / "server", f"{asked.database}/mlflow" if asked.database else "")
    server.start()
    total: Counter[str] = Counter()
    try:
        for attempt in range(asked.tries):
            name = f"{'search' if asked.search else 'grid'}-{os.getpid()}-{attempt}"
            file = folder / f"{name}.toml"
            file.write_text((SEARCH if asked.search else GRID).format(name=name))
            command = ["search" if asked.search else "grid", str(file)]
            storage = f"{asked.database}/optuna" if asked.database else f"sqlite:///{folder / 'optuna.db'}"
            environment = {"MLFLOW_TRACKING_URI": server.address, "OPTUNA_STORAGE": storage}
            drivers = [start(number, command, folder, environment) for number in (1, 2)]
            if asked.kill:
                time.sleep(12)
                drivers[0].kill()
                drivers[0].wait()
                drivers[0] = start(1, command, folder, environment)
            codes = [driver.wait() for driver in drivers]
            faults = count(server, name, 8 if asked.search else 0) | {"exit codes": sum(code != 0 for code in codes)}
            print(f"{name}: exit codes {codes}, {faults}", flush=True)
            total.update(faults)
    finally:
        server.stop()
    print(f"{asked.tries} tries, two drivers each: {dict(total)}" + (f"; logs in {folder}" if any(total.values()) else ""))
    if not any(total.values()):
        shutil.rmtree(folder)
    return 1 if any(total.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
