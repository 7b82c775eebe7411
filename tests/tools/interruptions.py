"""Disturbs a grid or search from outside: its folder turns read-only, its clock jumps, its machine sleeps, its PostgreSQL restarts.

    python tests/tools/interruptions.py [--what read-only clock sleep postgresql] [--tries N]

- ``read-only``: at a random moment the folders of a grid, which runs as the user ``nobody``, may no longer be written; later they may, and it is given again.
- ``clock``: Python's clock of a grid jumps by two hours forwards and then four backwards.
- ``sleep``: a grid is stopped (SIGSTOP) for 20 s.
- ``postgresql``: trials and runs of a search are on PostgreSQL, which is stopped for 20 s in the middle.

The results are compared with those of an undisturbed grid, and of the search it is asked whether all trials are complete. The first and the last need root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

from disturbed_commands import COMMANDS, START, Try, compare, end  # noqa: E402

GRID = COMMANDS["grid"]
JUMPS = """import time
real, begin = time.time, time.monotonic()
time.time = lambda: real() + (7200 if JUMP < time.monotonic() - begin < 2 * JUMP else -7200 if time.monotonic() - begin >= 2 * JUMP else 0)
"""
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
AWAY_S = 20.0


def verdict(name: str, one: Try, codes: list[int], faults: dict[str, object]) -> bool:
    log = (one.place / "log").read_text(errors="replace")
    bad = {key: value for key, value in faults.items() if value} | ({"traceback": True} if "Traceback" in log else {})
    print(f"{name}: exit codes {codes}, {bad or 'no faults'}", flush=True)
    return bool(bad)


def sleep(one: Try, usual: dict, at_s: float) -> bool:
    process = one.start(GRID)
    time.sleep(at_s)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(AWAY_S)
    os.killpg(process.pid, signal.SIGCONT)
    code = end(process)
    return verdict(f"sleep after {at_s:.0f} s", one, [code], compare(one.state(), one.state(), usual) | {"refused": code != 0})


def clock(one: Try, usual: dict, at_s: float) -> bool:
    code = end(one.start(GRID, code=JUMPS.replace("JUMP", f"{at_s / 2:.1f}") + START))
    return verdict(
        f"clock, at {at_s / 2:.0f} and {at_s:.0f} s", one, [code], compare(one.state(), one.state(), usual) | {"refused": code != 0}
    )


def read_only(one: Try, usual: dict, at_s: float) -> bool:
    def may_write(writable: bool) -> None:
        for folder in [one.place, *(path for path in one.place.rglob("*") if path.is_dir())]:
            folder.chmod(0o777 if writable else 0o555)
            if not writable:
                shutil.chown(folder, 0, 0)

    may_write(True)
    process = one.start(GRID, prefix=NOBODY, MPLCONFIGDIR=str(one.place / "cache"))
    time.sleep(at_s)
    may_write(False)
    code, said = end(process), (one.place / "log").read_text(errors="replace")
    may_write(True)
    before = one.state()
    again = end(one.start(GRID, prefix=NOBODY, MPLCONFIGDIR=str(one.place / "cache")))
    last = said.strip().rpartition("\n")[2]
    print(f"  it said: {last[:200]}", flush=True)
    faults = compare(before, one.state(), usual) | {
        "refused": again != 0,
        "unsaid": code != 0 and "writable" not in last,
    }
    return verdict(f"read-only after {at_s:.0f} s", one, [code, again], faults)


def postgresql(one: Try, usual: dict, at_s: float) -> bool:
    data, user = one.place / "pg", ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups") if os.getuid() == 0 else ()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data.mkdir()
    if user:
        shutil.chown(data, "postgres", "postgres")
        one.place.chmod(0o755)

    def control(*words: str) -> None:
        options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"
        subprocess.run(
            [*user, "pg_ctl", "-D", str(data), "-w", "-o", options, "-l", str(data / "log"), *words], check=True, stdout=subprocess.DEVNULL
        )

    subprocess.run([*user, "initdb", "-D", str(data), "-U", "lab", "-A", "trust"], check=True, stdout=subprocess.DEVNULL)
    control("start")
    try:
        address = f"postgresql+psycopg://lab@127.0.0.1:{port}"
        for name in ("mlflow", "optuna"):
            subprocess.run(["createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "lab", name], check=True)
        process = one.start(COMMANDS["search"], MLFLOW_TRACKING_URI=f"{address}/mlflow", OPTUNA_STORAGE=f"{address}/optuna")
        time.sleep(at_s)
        control("stop", "-m", "immediate")
        time.sleep(AWAY_S)
        control("start")
        code = end(process)
        import optuna

        states = [trial.state.name for trial in optuna.load_study(study_name="x", storage=f"{address}/optuna").get_trials()]
        return verdict(
            f"PostgreSQL stopped after {at_s:.0f} s",
            one,
            [code],
            {"refused": code != 0, "trials": states if states != ["COMPLETE"] * 6 else ""},
        )
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            control("stop", "-m", "immediate")


WAYS = {"read-only": read_only, "clock": clock, "sleep": sleep, "postgresql": postgresql}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--tries", type=int, default=1)
    asked = parser.parse_args()
    folder, dice = Path(tempfile.mkdtemp(prefix="interruptions-")), random.Random(0)
    folder.chmod(0o755)
    first = Try(folder / "usual")
    code, wall_s = first.run(GRID)
    assert code == 0, (first.place / "log").read_text()
    usual, bad = first.state(), False
    for number in range(asked.tries):
        for what in asked.what:
            bad |= WAYS[what](Try(folder / f"{what}-{number}", first.place), usual, dice.uniform(0.4, 0.9) * wall_s)
    print(f"logs in {folder}" if bad else "no faults", flush=True)
    if not bad:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
