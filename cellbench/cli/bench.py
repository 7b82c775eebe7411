"""``bench``: measures the speed of this machine, and checks that the faster ways give equal results."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cellbench import startup
from cellbench.config.experiment import DataSpec
from cellbench.config.options import BenchOptions
from cellbench.config.registry import Registry
from cellbench.console import say
from cellbench.data.loading import open_dataset
from cellbench.diagnostics import gpu_speed, scaling
from cellbench.diagnostics.benchmark_setup import BenchmarkSetup
from cellbench.diagnostics.speed import checks_as_text, measure
from cellbench.errors import CellbenchError
from cellbench.files import make_folder, write_atomic
from cellbench.hardware import detect_hardware
from cellbench.models.backbones.weights import weights_folder
from cellbench.reporting.plots import comparison as comparison_plots
from cellbench.reporting.plots import style


def bench(options: BenchOptions) -> int:
    """Measures, prints, and writes JSON and a plot to ``--out``. Returns exit code 1 if a check failed."""
    if options.peer != "none" and importlib.util.find_spec(options.peer) is None:
        raise CellbenchError(f"--peer {options.peer}: kaiko-eva is not installed here. `pip install 'kaiko-eva[vision]'` installs it.")
    startup.configure_threads(options.device)
    registry = Registry()
    quick, out = options.quick, options.out
    if out is not None:
        make_folder(out)
    weights = weights_folder(options.weights)
    there = weights is not None and any(weights.glob("vit*tiny*"))
    spec = DataSpec(limit=3 if quick else None, draw={} if options.data else {"num_train": 8, "num_test": 2})
    card = "folder" if options.data else "smears"
    dataset = open_dataset(registry.dataset(card), options.data, spec)
    setup = BenchmarkSetup(
        registry=registry,
        dataset=dataset,
        machine=detect_hardware(options.device, options.precision),
        backbone=options.backbone or ("vit-tiny-in1k" if there else "vit-tiny-random"),
        weights=weights,
        data=options.data,
        card=card,
        spec=spec,
        precision=options.precision,
        epochs=2 if quick else 3,
        crops=8 if quick else 16,
        quick=quick,
        peer=options.peer if options.peer != "none" else "",
        say=say,
    )
    if options.scale:
        found = scaling.measure(setup)
        say(f"\n{scaling.table(found)}")
        _write(found, out, "scale.json")
        return 0
    if options.gpu:
        _write(gpu_speed.measure(setup), out, "gpu.json")
        return 0
    result = measure(setup)
    say(f"\n{checks_as_text(result)}")
    if out is not None:
        style.save_figure(comparison_plots.plot_speeds(result.facts), out / "bench.png")
    _write(result, out, "bench.json", " and bench.png")
    return 0 if all(result.checks.values()) else 1


def _write(measured: Any, out: Path | None, name: str, more: str = "") -> None:
    """Writes a record of figures into the folder of ``--out``, where one is named."""
    if out is not None:
        write_atomic(out / name, json.dumps(asdict(measured), indent=1))
        say(f"written to {out}/{name}{more}")
