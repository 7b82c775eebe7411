"""Lets the disk be full at many moments of a command, then frees space and gives the command again: is anything lost?

    python tests/tools/disk_sweep.py --moments 30 --jobs 2 [--kinds grid search predict] [--skip N] [--seconds S] [--out FOLDER]

Needs root, since each try has a file system of its own in memory, with working folder, cache, stores and temporary files. An undisturbed command tells how
much is written; then the file system gets, in equal steps, less than that. Counted are the faults that ``kill_sweep.py`` counts, and:

- code: the command that met the full disk ended with exit code 0 although something was missing;
- traceback: it printed a traceback;
- unsaid: it did not say in one line what could not be written.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

from disturbed_commands import COMMANDS, Try, compare, write_table  # noqa: E402

ROOMY = 2**28
COLUMNS = ["tries", "failed", "with results", "lost", "numbers", "unreadable", "leftovers", "code", "traceback", "unsaid", "refused"]
SAID = ("no space", "disk is full", "No space left")


@contextlib.contextmanager
def disk(place: Path):
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOMY}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)
        with contextlib.suppress(OSError):
            place.rmdir()


def resize(place: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


def attempt(kind: str, moment: int, moments: int, folder: Path, usual: dict, written: tuple[int, int]) -> dict:
    place = folder / f"{kind}-{moment}"
    with disk(place):
        one = Try(place / "work")
        for name in ("model", "images"):
            if kind == "predict":
                shutil.copytree(folder / name, place / name)
        # The file system counts pages of 4 KiB, and at least the files that are there.
        size = max(written[0] + (written[1] - written[0]) * moment // (moments + 1), shutil.disk_usage(place).used + 4096)
        resize(place, size // 4096 * 4096)
        code, _ = one.run(COMMANDS[kind])
        said = (one.place / "log").read_text(errors="replace")
        lacks = shutil.disk_usage(place).free
        resize(place, ROOMY)
        before = one.state()
        again, _ = one.run(COMMANDS[kind])
        log, after = (one.place / "log").read_text(errors="replace"), one.state()
        whole = before["runs"] == after["runs"] and before["files"] == after["files"]
        faults = compare(before, after, usual) | {
            "leftovers": one.leftovers(),
            "code": code == 0 and not whole,
            "traceback": "Traceback" in said,
            "unsaid": code != 0 and not any(text in said for text in SAID),
            "refused": again != 0 or "Traceback" in log[len(said) :] or code == -999,
        }
        bad = {name: str(value) for name, value in faults.items() if value}
        if bad:
            kept = folder / f"{kind}-{moment}.log"
            kept.write_text(log)
            print(
                f"{kept}: {kind}, moment {moment} of {moments}, {size} bytes ({lacks} free), exit codes {code} and {again}: {bad}",
                flush=True,
            )
    facts = {
        "tries": 1,
        "failed": code != 0,
        "with results": bool(before["runs"] or before["done"]),
        **{name: bool(value) for name, value in faults.items()},
    }
    return {"kind": kind, "moment": moment, "facts": facts, "bad": bad}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=["grid", "search", "predict"], choices=COMMANDS)
    parser.add_argument(
        "--skip", type=int, default=0, help="leave out so many tries of the order, which is always the same: an earlier sweep made them"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no try that would end later")
    parser.add_argument("--out", type=Path, help="folder of disk_sweep.json and disk_sweep.txt")
    asked = parser.parse_args()
    begin, folder, results = time.monotonic(), Path(tempfile.mkdtemp(prefix="disk-sweep-")), []
    with contextlib.ExitStack() as stack:
        first = folder / "usual-grid"
        stack.enter_context(disk(first))
        tries = {"grid": Try(first / "work")}
        code, wall_s = tries["grid"].run(COMMANDS["grid"])
        walls = [wall_s]
        assert code == 0, (first / "work" / "log").read_text()
        usual, written = {"grid": tries["grid"].state()}, {"grid": (0, shutil.disk_usage(first).used)}
        assert tries["grid"].run(["export", "best:x", "--out", str(folder / "model")])[0] == 0, (first / "work" / "log").read_text()
        (folder / "images").mkdir()
        for path in sorted((first / "work" / "cache" / "drawn").glob("*/t*/original/*.png")):
            shutil.copy(path, folder / "images")
        for kind in [kind for kind in asked.kinds if kind != "grid"]:
            place = folder / f"usual-{kind}"
            stack.enter_context(disk(place))
            tries[kind] = Try(place / "work")
            for name in ("model", "images"):
                shutil.copytree(folder / name, place / name)
            before = shutil.disk_usage(place).used if kind == "predict" else 0
            code, wall_s = tries[kind].run(COMMANDS[kind])
            walls.append(wall_s)
            assert code == 0, (place / "work" / "log").read_text()
            usual[kind], written[kind] = tries[kind].state(), (before, shutil.disk_usage(place).used)
    print(f"undisturbed after {time.monotonic() - begin:.0f} s, bytes: {written}", flush=True)
    each_s = 2.2 * max(walls)

    def one(number: int) -> dict | None:
        kind, moment = asked.kinds[number % len(asked.kinds)], number // len(asked.kinds) + 1
        if time.monotonic() - begin + each_s > asked.seconds:
            return None
        return attempt(kind, moment, asked.moments, folder, usual[kind], written[kind])

    order = list(range(asked.moments * len(asked.kinds)))
    random.Random(0).shuffle(order)  # so that a sweep that ends early has met all parts of a command
    with ThreadPoolExecutor(asked.jobs) as pool:
        for done in as_completed([pool.submit(one, number) for number in order[asked.skip :]]):
            if (result := done.result()) is not None:
                results.append(result)
    print(write_table("disk_sweep", results, asked.kinds, COLUMNS, asked.out), flush=True)
    bad = any(result["bad"] for result in results)
    print(f"logs of tries with faults: {folder}" if bad else "no faults", flush=True)
    if not bad:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
