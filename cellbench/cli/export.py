"""``export``: writes a run as a portable folder, and optionally as ONNX and as a model for MLflow serving."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path

from cellbench.cli.runs import open_run
from cellbench.config.options import ExportOptions
from cellbench.config.registry import Registry
from cellbench.console import say
from cellbench.errors import CellbenchError
from cellbench.files import make_folder, os_errors_as
from cellbench.inference.export import CARDS, write_export


def export(options: ExportOptions) -> int:
    """Writes the folder, complete or not at all. Returns exit code 0."""
    out = options.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CellbenchError(f"--out {options.out}: exists and is not empty. Name a new folder.")
    segmenter = open_run(options, device="cpu" if options.onnx else options.device)
    weights = options.weights or (Path(os.environ["CELLBENCH_WEIGHTS"]) if os.environ.get("CELLBENCH_WEIGHTS") else None)
    source = Path(options.run) if os.path.isdir(options.run) else None
    cards = Registry(source / CARDS if source else options.registry)
    with os_errors_as(f"writing {out}"), tempfile.TemporaryDirectory(dir=make_folder(out.parent), prefix=".cellbench-") as name:
        made = Path(name) / out.name
        lines = [
            f"{options.out}: {segmenter.trained.name}. {write_export(made, segmenter.trained, cards, weights or source, options.backbone)}"
        ]
        if options.mlflow:
            from cellbench.inference.mlflow_model import save_model  # imports MLflow

            save_model(made / "mlflow", made)
            serve = f"mlflow models serve -m {shlex.quote(str(options.out / 'mlflow'))} --env-manager local"
            lines.append(f"{options.out / 'mlflow'}: `{serve}` answers with masks.")
        if options.onnx:
            from cellbench.inference.onnx import left_to_caller, write_onnx, write_readme

            worst = write_onnx(made / "model.onnx", segmenter)
            write_readme(made / "README.md", segmenter.trained)
            lines += [
                f"{options.out / 'model.onnx'}: differs from torch by at most {worst:.1g} (onnxruntime, batches of 1 and 3).",
                f"It is the network alone; left to its caller are {'; '.join(left_to_caller(segmenter.trained))}. README.md there says so too.",
            ]
        if out.exists():
            out.rmdir()
        made.replace(out)
    say("\n".join(lines))
    return 0
