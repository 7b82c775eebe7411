"""Opens a trained run, for `predict`, `evaluate` and `export`."""

from __future__ import annotations

import os
from pathlib import Path

from cellbench import startup
from cellbench.config.options import InferenceOptions, PredictOptions
from cellbench.config.registry import Registry
from cellbench.config.trust import describe_code, require_trust
from cellbench.console import say_lines
from cellbench.inference.export import CARDS
from cellbench.inference.segmenter import Segmenter


def open_run(options: InferenceOptions, *, device: str | None = None) -> Segmenter:
    """Opens the run that the options name and prints its origin. ``device`` overrides the option. Raises CellbenchError."""
    device = device or options.device
    startup.configure_threads(device)
    folder = options.registry
    if os.path.isdir(options.run):
        folder = Path(options.run) / CARDS
        require_trust(Registry(folder), folder, options.trust)
    say_lines(describe_code(Registry(folder), folder))
    segmenter = Segmenter.load(
        options.run,
        weights=options.weights,
        registry=options.registry,
        device=device,
        precision=options.precision,
        trust=options.trust,
        skip_empty=isinstance(options, PredictOptions) and options.skip_empty,
    )
    say_lines(segmenter.trained.origin)
    return segmenter
