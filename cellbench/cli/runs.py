"""What `predict`, `evaluate` and `export` share: opening a trained run."""

from __future__ import annotations

from cellbench import startup
from cellbench.config.options import InferenceOptions
from cellbench.inference.segmenter import Segmenter


def open_run(options: InferenceOptions, *, device: str | None = None) -> Segmenter:
    """The run that a call names, and a line about where it comes from. ``device``: another one than the call's. Raises CellbenchError."""
    device = device or options.device
    startup.configure_threads(device)
    segmenter = Segmenter.load(options.run, weights=options.weights, registry=options.registry, device=device, precision=options.precision)
    for line in segmenter.trained.origin:
        print(line)
    return segmenter
