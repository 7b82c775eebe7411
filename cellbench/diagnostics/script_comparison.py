"""``bench``'s first line: ``grid`` as a whole process, beside the plain script of :mod:`cellbench.diagnostics.script_reference` as another.

Both train the same heads at the same rates on the same images, from cached features. ``grid`` does besides what it always does: MLflow, checkpoints,
instance scores, tuning, figures and the report.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tomli_w
import torch

from cellbench.diagnostics.benchmark_setup import BenchmarkSetup, store_in
from cellbench.diagnostics.script_reference import BATCH_SIZE, ScriptSettings
from cellbench.errors import CellbenchError
from cellbench.parallel import repeating
from cellbench.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class ProcessCost:
    """A process from its start to its end."""

    wall_s: float
    cpu_s: float
    """User and system time, of its children too."""
    peak_mib: float
    """Largest resident memory; 0 where the system does not say."""
    gpu_busy_pct: float
    """Mean over its time; NaN on a processor."""
    dice: float
    """The best mean Dice over the test images."""
    places: Mapping[str, float] = field(default_factory=dict)
    """Seconds of its main thread by what it did, where that was sampled."""


def settings_of(setup: BenchmarkSetup) -> ScriptSettings:
    """What both sides train."""
    data = setup.data
    return ScriptSettings(
        dataset=setup.card,
        data="" if data is None else str(data.absolute()),
        limit=setup.spec.limit,
        draw=dict(setup.spec.draw),
        backbone=setup.backbone,
        weights="" if setup.weights is None else str(setup.weights.absolute()),
        heads=list(setup.heads),
        rates=list(setup.rates),
        epochs=setup.epochs,
        crops_per_image=setup.crops,
        device=str(setup.machine.device),
    )


def cost_of_script(settings: ScriptSettings, module: str = "script_reference") -> ProcessCost:
    """Runs the script, or the same runs by a peer (``eva_reference``), in an empty folder. Raises CellbenchError if it fails."""
    with tempfile.TemporaryDirectory(prefix="cellbench-bench-") as folder:
        cost, printed = _timed([f"cellbench.diagnostics.{module}", json.dumps(asdict(settings))], Path(folder), settings.device)
    return ProcessCost(**cost, dice=json.loads(printed)["dice"], places={})


def cost_of_grid(settings: ScriptSettings, setup: BenchmarkSetup, *, sampled: bool = False) -> ProcessCost:
    """Runs ``grid`` in an empty folder with a fresh store. Raises CellbenchError if it fails.

    ``sampled``: what its main thread does is sampled (:mod:`cellbench.diagnostics.stack_samples`).
    """
    experiment = {
        "experiment": "bench",
        "dataset": settings.dataset,
        "data": {name: value for name, value in (("limit", settings.limit), ("draw", settings.draw)) if value},
        "grid": {"backbone": [settings.backbone], "head": settings.heads, "lr": settings.rates},
        "run": setup.run_settings | {"repeat_views_every": 1, "batch_size": BATCH_SIZE, "val_overlap": 0.0},
    }
    with tempfile.TemporaryDirectory(prefix="cellbench-bench-") as name:
        folder = Path(name)
        (folder / "bench.toml").write_text(tomli_w.dumps(experiment))
        command = ["cellbench.diagnostics.stack_samples", "samples.json"] if sampled else ["cellbench.run"]
        command += ["grid", "bench.toml", "--device", settings.device, "--precision", setup.precision]
        command += ["--data", settings.data] if settings.data else []
        command += ["--weights", settings.weights] if settings.weights else []
        cost, _ = _timed(command, folder, settings.device)
        with store_in(folder):
            found = [run.metrics.get("test_image/dice", 0.0) for run in Tracker("bench", make=False).stored()]
        places = json.loads((folder / "samples.json").read_text()) if sampled else {}
    return ProcessCost(**cost, dice=max(found, default=0.0), places=places)


def _timed(arguments: list[str], folder: Path, device: str) -> tuple[dict[str, float], str]:
    """Runs ``python -m`` with these arguments in a folder: what it cost, and its last line. Raises CellbenchError if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "OMP_NUM_THREADS")}
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with (folder / "printed.txt").open("w+", encoding="utf-8") as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=folder, env=environment, stdout=output, stderr=output)
        with _watch_gpu(device) as busy:
            cpu_s, peak_mib = _wait(process)
        wall_s = time.perf_counter() - start
        output.seek(0)
        printed = output.read().strip().splitlines() or ["no output"]
    if process.returncode not in (0, 1):
        raise CellbenchError(f"bench: `python -m {arguments[0]}` failed: {printed[-1]}")
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_mib": peak_mib, "gpu_busy_pct": statistics.fmean(busy or [math.nan])}, printed[-1]


@contextlib.contextmanager
def _watch_gpu(device: str) -> Iterator[list[float]]:
    """The GPU's load in percent, five times a second during the block; nothing on a processor."""
    busy: list[float] = []
    watching = repeating(lambda: busy.append(torch.cuda.utilization(torch.device(device))), 0.2)
    with watching if device.startswith("cuda") else contextlib.nullcontext():
        yield busy


def _wait(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Waits for a process: CPU seconds of it and its children, and its largest memory in MiB; zeros on Windows."""
    if sys.platform == "win32":
        process.wait()
        return 0.0, 0.0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
