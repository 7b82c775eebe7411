"""``export``: a run as a folder that works elsewhere, and on request as ONNX and as a model that MLflow serves."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

from cellbench.config.registry import Registry
from cellbench.errors import CellbenchError
from cellbench.inference.export import CARDS, write_export
from cellbench.inference.segmenter import Segmenter


def export(
    asked: str,
    *,
    out: Path,
    onnx: bool = False,
    serve: bool = False,
    backbone: str = "auto",
    weights: Path | None = None,
    extra: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    say: Callable[[str], None] = print,
) -> int:
    """``cellbench export``. Exit code 0."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CellbenchError(f"--out {out}: is there already and not empty. Name a new folder.")
    segmenter = Segmenter.load(asked, weights=weights, registry=extra, device="cpu" if onnx else device, precision=precision)
    for line in segmenter.trained.origin:
        say(line)
    given = weights or (Path(os.environ["CELLBENCH_WEIGHTS"]) if os.environ.get("CELLBENCH_WEIGHTS") else None)
    inside = Path(asked) if Path(asked).is_dir() else None
    cards = Registry(inside / CARDS if inside else extra)
    said = write_export(out, segmenter.trained, cards, given or inside, backbone)
    say(f"{out}: {segmenter.trained.name}. {said}")
    if serve:
        from cellbench.inference.mlflow_model import save_model  # MLflow, which the rest does without

        save_model(out / "mlflow", out)
        say(f"{out / 'mlflow'}: `mlflow models serve -m {shlex.quote(str(out / 'mlflow'))} --env-manager local` answers with masks.")
    if onnx:
        from cellbench.inference.onnx import write_onnx

        worst = write_onnx(out / "model.onnx", segmenter)
        say(f"{out / 'model.onnx'}: differs from torch by at most {worst:.1g} (onnxruntime, batches of 1 and 3).")
    return 0
