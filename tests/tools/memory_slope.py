"""Does memory grow with the number of runs of one grid, or of trials of one search?

    python tests/tools/memory_slope.py --runs 200 [--search] [--seconds S]

Runs one command in a folder of its own, with tiny runs of which each is a cohort, and samples the resident memory of its process. Prints it against the
number of finished runs, and the slope of a line through the second half of the samples, with processor seconds a run.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

sys.path[:0] = [str(Path(__file__).parent)]

from disturbed_commands import DATA, HEAD, RUN, SPACE, Try  # noqa: E402


def finished(place: Path) -> int:
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(place / "mlflow.db", timeout=30)) as store:
        query = "SELECT COUNT(*) FROM tags WHERE key = 'cellbench.status' AND value IN ('finished', 'validated', 'pruned')"
        return int(store.execute(query).fetchone()[0])
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--search", action="store_true", help="trials of a search instead")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after this time, with what there is")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="memory-slope-"))
    one, run = Try(folder / "x"), RUN.replace("epochs = 3", "epochs = 1")
    strengths = [round(0.001 * (k + 1), 4) for k in range(asked.runs)]
    (one.place / "grid.toml").write_text(
        f'{HEAD}{DATA}[grid]\nbackbone = ["filter-bank"]\nhead = ["bilinear"]\nbrightness = {strengths}\n{run}'
    )
    (one.place / "search.toml").write_text(f"{HEAD}{DATA}[search]\ntrials = {asked.runs}\nbatch = 2\nrepeat_best = 1\n{SPACE}{run}")
    process, begin = one.start(["search", "search.toml"] if asked.search else ["grid", "grid.toml"]), time.monotonic()
    rows: list[tuple[int, float]] = []
    cpu_s = 0.0
    while process.poll() is None and time.monotonic() - begin < asked.seconds:
        with contextlib.suppress(psutil.Error):
            rows.append((finished(one.place), process.memory_info().rss / 2**20))
            cpu_s = sum(process.cpu_times()[:2])
        time.sleep(0.5)
    ended = process.poll()
    if ended is None:
        process.terminate()
        process.wait(60)
    done = [(num, rss) for num, rss in rows if num > 0]
    for limit in range(10, asked.runs + 1, max(10, asked.runs // 10)):
        if at := [rss for num, rss in done if num >= limit]:
            print(f"{limit:>6} runs: {at[0]:.0f} MiB")
    late = np.array([row for row in done if row[0] >= done[-1][0] / 2])
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0])
    how = "ended by --seconds" if ended is None else f"exit code {ended}"
    print(f"{done[-1][0]} of {asked.runs} runs, {how}: {slope * 1024:.1f} KiB a run, {cpu_s / done[-1][0]:.2f} processor seconds a run")
    print(f"log: {(one.place / 'log').stat().st_size} bytes, {(one.place / 'log').read_text(errors='replace').count(chr(10))} lines")
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
