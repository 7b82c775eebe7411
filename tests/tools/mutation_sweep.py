"""Damages files at random and has them read: does every reader return something, or refuse in one line?

    python tests/tools/mutation_sweep.py --inputs 100000 --jobs 2 [--kinds png …] [--seed N] [--replay KIND:NUMBER]

A reader may return what it read, or raise CellbenchError with a message of one line. Faults are any other exception, a message of several lines, a
crash, more than 5 processor seconds, and more than 1 GiB of memory. Every input is drawn from the seed, its kind and its number, which are printed
with each fault: ``--replay`` reads that one again, shows the traceback and keeps the file. Images may have 10 megapixels here. Exit code 1 for faults.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
MOST_S, MOST_BYTES = 5, 2**30
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    1e308,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "\0",
    "\ud800",
    "1" * 5000,
]
VALUES += [[], {}, [[]], [0], [1, 2], {"a": 1}, [[[0, 0], [9, 0], [9, 9]]], "é", "best:x", [None] * 3]

Reader = Callable[[bytes], object]


def mutated(dice: random.Random, samples: list[bytes], kind: str) -> bytes:
    """A damaged sample: the tree of JSON and TOML in half of the draws, else its bytes."""
    data = dice.choice(samples)
    if data[:1] in (b"{", b"[") and dice.random() < 0.6:
        return _written(_changed_tree(dice, json.loads(data)), data)
    if kind in ("card", "experiment", "search", "mlflow-config.toml") and dice.random() < 0.6:
        return _toml(_changed_tree(dice, tomllib.loads(data.decode())))
    if kind in ("safetensors", "head", "mlflow-head.safetensors") and dice.random() < 0.6:
        length = int.from_bytes(data[:8], "little")
        head = json.dumps(_changed_tree(dice, json.loads(data[8 : 8 + length]))).encode()
        return len(head).to_bytes(8, "little") + head + data[8 + length :]
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 1, 2, 4, 16])):
        _change_bytes(dice, changed, samples)
    return _with_checksums(bytes(changed)) if changed[:4] == b"\x89PNG" and dice.random() < 0.7 else bytes(changed)


def _change_bytes(dice: random.Random, data: bytearray, samples: list[bytes]) -> None:
    # Mostly near the start: the header decides how the rest is read.
    at = dice.randrange(min(len(data), 200) if dice.random() < 0.5 and data else len(data) + 1)
    length = dice.choice([1, 2, 4, 8, 64])
    match dice.randrange(8):
        case 0 if at < len(data):
            data[at] ^= 1 << dice.randrange(8)
        case 1 if at < len(data):
            data[at] = dice.choice([0, 1, 0x7F, 0x80, 0xFF, 10, 34, 44, 58, 91, 123, dice.randrange(256)])
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = data[at : at + length]
        case 4:
            del data[at:]
        case 5:
            number = dice.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, len(data)])
            data[at : at + 4] = number.to_bytes(4, dice.choice(["big", "little"]))
        case 6:
            other = dice.choice(samples)
            data[at : at + length] = other[at : at + length]
        case _:
            data[at:at] = dice.choice([b"\0", b"\xff", b"\r\n", b'"', b"[[[[", b"\xef\xbb\xbf", b"9" * 400, b"-", b"[" * 3000])


def _with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have valid checksums again, so that what they hold is read."""
    import zlib

    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        at += 12 + length
    return bytes(out) + data[at:]


def _changed_tree(dice: random.Random, tree: object) -> object:
    """The tree with one to three nodes replaced, removed, doubled or moved."""
    for _ in range(dice.choice([1, 1, 2, 3])):
        places = list(_places(tree))
        if not places:
            return copy.deepcopy(dice.choice(VALUES))
        holder, key = dice.choice(places)
        match dice.randrange(5):
            case 0:
                del holder[key]
            case 1:
                other, there = dice.choice(places)
                holder[key] = json.loads(json.dumps(other[there])) if there in other or isinstance(other, list) else 0
            case 2 if isinstance(holder, list):
                holder.insert(key, json.loads(json.dumps(holder[key])))
            case 3 if isinstance(holder, dict):
                holder[dice.choice(["x", "", "id", "type", "name"])] = holder.pop(key)
            case _:
                holder[key] = copy.deepcopy(dice.choice(VALUES))
    return tree


def _places(tree: object):
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()):
        yield tree, key
        yield from _places(value)


def _written(tree: object, before: bytes) -> bytes:
    return json.dumps(tree, indent=1 if b"\n " in before[:20] else None).encode()


def _toml(tree: object) -> bytes:
    import tomli_w

    try:
        return tomli_w.dumps(tree).encode()  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError, UnicodeEncodeError):  # None, half characters
        return json.dumps(tree).encode()


def _one(kind: str, number: int, seed: int, samples: list[bytes], read: Reader) -> str:
    """What is wrong with the reading of one input; empty where nothing is."""
    from cellbench.errors import CellbenchError

    data, before = mutated(random.Random(f"{seed}-{kind}-{number}"), samples, kind), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, MOST_S)  # ends this process, also inside a library
    try:
        read(data)
        fault = ""
    except CellbenchError as error:
        fault = f"a message of several lines: {str(error)!r:.200}" if "\n" in str(error) else ""
    except Exception as error:
        frame = next((one for one in reversed(traceback.extract_tb(error.__traceback__)) if "cellbench" in one.filename), None)
        fault = f"{type(error).__name__}: {str(error)[:150]!r} at {Path(frame.filename).name}:{frame.lineno}" if frame else repr(error)
    signal.setitimer(signal.ITIMER_PROF, 0)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return fault or (f"{grown / 2**20:.0f} MiB of memory" if grown > MOST_BYTES else "")


def child(kind: str, first: int, last: int, seed: int, progress: Path) -> None:
    """Reads the inputs first to last; a line of JSON for each fault. ``progress`` holds the number of the current one."""
    from mutation_readers import READERS

    warnings.simplefilter("ignore")
    sys.stdout, out = sys.stderr, sys.stdout
    samples, read = READERS[kind](progress.parent)
    handle = os.open(progress, os.O_CREAT | os.O_WRONLY)
    for number in range(first, last):
        os.pwrite(handle, f"{number:12d}".encode(), 0)
        if fault := _one(kind, number, seed, samples, read):
            print(json.dumps([number, fault]), file=out, flush=True)
    os.pwrite(handle, f"{last:12d}".encode(), 0)


def sweep(kind: str, first: int, last: int, seed: int) -> list[tuple[str, int, str]]:
    """The faults of one share of the inputs, in a process that is started again where one of them ends it."""
    faults, begin = [], first
    while begin < last:
        with tempfile.TemporaryDirectory(prefix="mutation-") as name:
            call = [sys.executable, __file__, "--child", f"{kind}:{begin}:{last}:{seed}:{name}/number"]
            there = os.environ | {"CELLBENCH_CACHE": f"{name}/cache", "CELLBENCH_MAX_PIXELS": "10000000"}
            done = subprocess.run(call, cwd=name, env=there, capture_output=True, text=True)
            faults += [(kind, *json.loads(line)) for line in done.stdout.splitlines()]
            progress = Path(name) / "number"
            at = int(progress.read_text()) if progress.exists() else -1
        if at < 0 or done.returncode > 0:
            raise RuntimeError(f"{kind}: the sweep itself failed: {done.stderr[-2000:]}")
        if at < last:
            how = f"more than {MOST_S} s" if done.returncode == -signal.SIGPROF else f"a crash by signal {-done.returncode}"
            faults.append((kind, at, how))
        begin = at + 1 if at < last else last
    return faults


def main() -> int:
    from mutation_readers import READERS, WEIGHTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=list(READERS), choices=list(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", metavar="KIND:NUMBER")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        kind, first, last, seed, progress = asked.child.split(":", 4)
        child(kind, int(first), int(last), int(seed), Path(progress))
        return 0
    if asked.replay:
        kind, number = asked.replay.split(":")
        os.environ["CELLBENCH_MAX_PIXELS"] = "10000000"
        samples, read = READERS[kind](Path(tempfile.mkdtemp(prefix="mutation-")))
        print(read(mutated(random.Random(f"{asked.seed}-{kind}-{number}"), samples, kind)))
        return 0
    begin, total = time.monotonic(), sum(WEIGHTS.get(kind, 1.0) for kind in asked.kinds)
    shares = []
    for kind in asked.kinds:
        num = max(1, round(asked.inputs * WEIGHTS.get(kind, 1.0) / total))
        size = max(2000, -(-num // max(1, asked.jobs)))  # a process takes seconds to start
        shares += [(kind, first, min(first + size, num), asked.seed) for first in range(0, num, size)]
    faults: list[tuple[str, int, str]] = []
    with ThreadPoolExecutor(asked.jobs) as pool:
        for found in pool.map(lambda share: sweep(*share), shares):
            faults += found
            for kind, number, what in found[:3]:
                print(f"{kind}:{number}: {what}", flush=True)
    numbers: Counter[str] = Counter()
    for kind, first, last, _ in shares:
        numbers[kind] += last - first
    for (kind, what), num in Counter((kind, what) for kind, _, what in faults).most_common():
        print(f"{kind}: {num} x {what}; first --replay {kind}:{next(n for k, n, w in faults if (k, w) == (kind, what))}")
    bad = Counter(kind for kind, _, _ in faults)
    print(f"{'kind':>12} {'inputs':>8} {'faults':>8}")
    for kind in asked.kinds:
        print(f"{kind:>12} {numbers[kind]:>8} {bad[kind]:>8}")
    print(f"{'all':>12} {sum(numbers.values()):>8} {len(faults):>8}  seed {asked.seed}, {time.monotonic() - begin:.0f} s")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
