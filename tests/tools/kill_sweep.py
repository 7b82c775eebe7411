"""Kills commands at random moments, and gives each of them again: is anything lost, or any number changed?

    python tests/tools/kill_sweep.py --kills 200 --jobs 2 [--kinds grid workers ray search predict] [--seconds S] [--out FOLDER] [--seed N]

A try has a folder, a cache and a store of its own. The command is started; at a random moment one of its processes (mostly the first) is killed by
SIGKILL, together with nobody else. The moment is drawn in processor seconds, so that on a busy machine too every part of a command is met. Then the
same command runs to its end, and is compared with one that nobody disturbed. Faults that are counted:

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
import importlib.util
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parent)]

from disturbed_commands import COMMANDS, Try, compare, end, write_table  # noqa: E402

COLUMNS = ["tries", "kills", "of workers", "survived", "with results", "lost", "numbers", "unreadable", "leftovers", "orphans", "refused"]


def spent_s(process: psutil.Popen) -> float:
    """Processor seconds of a command, with those of the processes under it that still run."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += sum(one.cpu_times()[:2])
    return total


def measure(one: Try, arguments: list[str]) -> tuple[int, float, float]:
    """Exit code, wall seconds and processor seconds of an undisturbed command."""
    begin, process, most_s = time.monotonic(), one.start(arguments), 0.0
    while process.poll() is None:
        most_s = max(most_s, spent_s(process))
        time.sleep(0.05)
    return process.returncode, time.monotonic() - begin, most_s


def attempt(kind: str, place: Path, usual: dict, cpu_s: float, seed: int, template: Path) -> dict:
    """One kill and what follows. ``usual``: the state that an undisturbed command leaves; ``cpu_s``: its processor seconds."""
    dice, one = random.Random(seed), Try(place, template if seed % 5 else None)
    process = one.start(COMMANDS[kind])
    at_s = dice.uniform(0.35 if dice.random() < 0.9 else 0.0, 1.0) * cpu_s
    while process.poll() is None and spent_s(process) < at_s:
        time.sleep(0.02)
    tree = [process, *process.children(recursive=True)] if process.poll() is None else []
    facts: Counter[str] = Counter(tries=1, kills=bool(tree))
    victim = dice.choice(tree) if tree and dice.random() < 0.4 else process
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.kill()
    facts["of workers"] = victim is not process
    code = end(process)
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
        print(
            f"{place}: {kind}, seed {seed}, killed after {at_s:.1f} processor seconds of {cpu_s:.1f}, exit code {again}: {bad}", flush=True
        )
    else:
        shutil.rmtree(place, ignore_errors=True)
    return {"kind": kind, "seed": seed, "at_s": at_s, "facts": dict(facts), "bad": {k: str(v) for k, v in bad.items()}}


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
    code, wall_s, cpu_s = measure(reference, COMMANDS["grid"])
    assert code == 0, (folder / "grid" / "log").read_text()
    (folder / "images").mkdir()
    assert reference.run(["export", "best:x", "--out", "../model"])[0] == 0, (folder / "grid" / "log").read_text()
    for path in sorted((folder / "grid" / "cache" / "drawn").glob("*/t*/original/*.png")):
        for copy in range(3):  # enough that predict takes some seconds
            shutil.copy(path, folder / "images" / f"{path.stem}-{copy}.png")
    # Workers and Ray have to give the numbers of one process.
    usual, walls, costs = (dict.fromkeys(asked.kinds, value) for value in (reference.state(), wall_s, cpu_s))
    with ThreadPoolExecutor(asked.jobs) as pool:
        tries = {kind: Try(folder / f"usual-{kind}", folder / "grid") for kind in asked.kinds if kind != "grid"}
        for kind, (code, walls[kind], costs[kind]) in zip(tries, pool.map(lambda k: measure(tries[k], COMMANDS[k]), tries), strict=True):
            assert code == 0, (folder / f"usual-{kind}" / "log").read_text()
            if kind in ("search", "predict"):
                usual[kind] = tries[kind].state()
        for left in (left for one_try in (reference, *tries.values()) if (left := one_try.leftovers())):
            print(f"left by a command that nobody disturbed: {left}", flush=True)
        print(f"undisturbed: {', '.join(f'{kind} {walls[kind]:.0f} s, {costs[kind]:.0f} of processors' for kind in walls)}", flush=True)

        def one(number: int) -> dict | None:
            kind = asked.kinds[number % len(asked.kinds)]
            if time.monotonic() - begin + 2.5 * walls[kind] > asked.seconds:
                return None
            return attempt(kind, folder / f"try-{number}", usual[kind], costs[kind], asked.seed + number, folder / "grid")

        for done in as_completed([pool.submit(one, number) for number in range(asked.kills)]):
            if (result := done.result()) is not None:
                results.append(result)
                if len(results) % 10 == 0:
                    print(f"{len(results)} tries after {time.monotonic() - begin:.0f} s", flush=True)
                    write_table("kill_sweep", results, asked.kinds, COLUMNS, asked.out)
    print(write_table("kill_sweep", results, asked.kinds, COLUMNS, asked.out), flush=True)
    bad = any(result["bad"] for result in results)
    print(f"the folders of tries with faults are in {folder}" if bad else "no faults", flush=True)
    if not bad:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
