"""Opens a trained run, for `predict`, `evaluate` and `export`."""

from __future__ import annotations

from cellbench import startup
from cellbench.config.options import InferenceOptions
from cellbench.console import say
from cellbench.inference.segmenter import Segmenter


def open_run(options: InferenceOptions, *, device: str | None = None) -> Segmenter:
    """Opens the run that the options name and prints its origin. ``device`` overrides the option. Raises CellbenchError."""
    device = device or options.device
    startup.configure_threads(device)
    segmenter = Segmenter.load(options.run, weights=options.weights, registry=options.registry, device=device, precision=options.precision)
    for line in segmenter.trained.origin:
        say(line)
    return segmenter
