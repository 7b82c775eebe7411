"""``export``: writes a run as a portable folder, and optionally as ONNX and as a model for MLflow serving."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from cellbench.cli.runs import open_run
from cellbench.config.options import ExportOptions
from cellbench.config.registry import Registry
from cellbench.console import say
from cellbench.errors import CellbenchError
from cellbench.inference.export import CARDS, write_export


def export(options: ExportOptions) -> int:
    """Writes the folder. Returns exit code 0."""
    out = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CellbenchError(f"--out {out}: exists and is not empty. Name a new folder.")
    segmenter = open_run(options, device="cpu" if options.onnx else options.device)
    weights = options.weights or (Path(os.environ["CELLBENCH_WEIGHTS"]) if os.environ.get("CELLBENCH_WEIGHTS") else None)
    source = Path(options.run) if Path(options.run).is_dir() else None
    cards = Registry(source / CARDS if source else options.registry)
    said = write_export(out, segmenter.trained, cards, weights or source, options.backbone)
    say(f"{out}: {segmenter.trained.name}. {said}")
    if options.mlflow:
        from cellbench.inference.mlflow_model import save_model  # imports MLflow

        save_model(out / "mlflow", out)
        say(f"{out / 'mlflow'}: `mlflow models serve -m {shlex.quote(str(out / 'mlflow'))} --env-manager local` answers with masks.")
    if options.onnx:
        from cellbench.inference.onnx import write_onnx

        worst = write_onnx(out / "model.onnx", segmenter)
        say(f"{out / 'model.onnx'}: differs from torch by at most {worst:.1g} (onnxruntime, batches of 1 and 3).")
    return 0
