"""cellbench bench: measures the speed of this machine, and checks the equalities that speed rests on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.console import say
from cellbench.data.loading import open_dataset
from cellbench.files import make_folder, write_atomic
from cellbench.hardware import detect_hardware


def bench(
    *,
    backbone: str = "",
    data: Path | None = None,
    weights: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    out: Path | None = None,
    quick: bool = False,
    scale: bool = False,
) -> int:
    """``cellbench bench``: measures, prints, and writes JSON and a plot to ``out``. Exit code 1 where a check failed."""
    from cellbench.diagnostics import scaling
    from cellbench.diagnostics.benchmark_setup import BenchmarkSetup
    from cellbench.diagnostics.speed import measure, table

    registry = Registry()
    if out is not None:
        make_folder(out)
    if not backbone:
        there = weights is not None and any(weights.glob("vit*tiny*"))
        backbone = "vit-tiny-in1k" if there else "vit-tiny-random"
    spec = DataSpec(limit=3 if quick else None, draw={} if data else {"num_train": 8, "num_test": 2})
    dataset = open_dataset(registry.dataset("folder" if data else "smears"), data, spec)
    setup = BenchmarkSetup(
        registry=registry,
        dataset=dataset,
        machine=detect_hardware(device, precision),
        backbone=backbone,
        weights=weights,
        epochs=2 if quick else 3,
        crops=8 if quick else 16,
        quick=quick,
        say=say,
    )
    if scale:
        found = scaling.measure(setup)
        say("")
        say(scaling.table(found))
        if out is not None:
            write_atomic(out / "scale.json", json.dumps(asdict(found), indent=1))
            say(f"written to {out}/scale.json")
        return 0
    result = measure(setup)
    say("")
    say(table(result))
    if out is not None:
        from cellbench.reporting.plots import comparison as comparison_plots
        from cellbench.reporting.plots import style

        write_atomic(out / "bench.json", json.dumps(asdict(result), indent=1))
        style.save_figure(comparison_plots.plot_speeds(result.facts), out / "bench.png")
        say(f"written to {out}/bench.json and bench.png")
    return 0 if all(result.checks.values()) else 1
