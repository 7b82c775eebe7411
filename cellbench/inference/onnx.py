"""Exports backbone and head as one ONNX file and compares its output with torch.

Input: ``pixels`` (B, 3, T, T) float32, RGB in 0..1, T the run's tile, any B. Output: ``probabilities`` (B, K, T, T) float32 of the classes,
NaN where a score is not finite; with a cell target also its ``fields`` (B, F, T, T) float32, 0..1. What `predict` does before and after is left to
the caller (:func:`left_to_caller`); batch norms adapt inside.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cellbench.data.cell_targets.catalog import TARGETS
from cellbench.data.io.intensity import IntensityScaling
from cellbench.errors import CellbenchError, one_line
from cellbench.features.extractor import Batch
from cellbench.features.frozen_backbone import TOKENS
from cellbench.files import write_atomic
from cellbench.inference.segmenter import Segmenter
from cellbench.inference.trained_run import TrainedRun
from cellbench.training.tiled_inference import mark_non_finite

TOLERANCE = 1e-3
"""Largest difference of a probability or field between onnxruntime and torch."""


class _Network(nn.Module):
    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        assert segmenter.model is not None
        self.backbone, self.model = segmenter.backbone.module, segmenter.model
        self._indices, self._unfreeze = segmenter.backbone.indices, segmenter.backbone.unfreeze

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        maps: dict[int, Tensor] = {}
        if self.backbone is not None:
            x = (pixels - self.backbone.mean) / self.backbone.std
            if self._unfreeze:
                found, tokens_BND = self.backbone.begin(x, self._indices, len(self.backbone.levels) - self._unfreeze)
                maps[TOKENS] = tokens_BND.transpose(1, 2).unsqueeze(-1)
            else:
                found = self.backbone.maps(x, self._indices)
            maps |= dict(zip(self._indices, found, strict=True))
        logits: Tensor = self.model(Batch(maps, pixels, pixels))
        probabilities = logits[:, : self.model.num_classes].softmax(1) + mark_non_finite(logits)
        target = self.model.cell_target
        return (probabilities,) if target is None else (probabilities, target.fields(logits[:, self.model.num_classes :]))


def write_onnx(path: Path, segmenter: Segmenter) -> float:
    """Writes the file; returns the largest difference to torch over batches of 1 and 3.

    Raises CellbenchError above ``TOLERANCE``, for a method without a network, for whole images (``pad``) and for a missing package.
    """
    run = segmenter.trained.run
    if segmenter.model is None or run.framing == "pad":
        raise CellbenchError(f"--onnx: '{segmenter.trained.name}' has no network for tiles of one size. Export it without --onnx.")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  needed by torch's exporter, whose error takes twenty lines
    except ImportError as error:
        raise CellbenchError(f"--onnx: {error.name} is not installed. `pip install onnx onnxscript onnxruntime`, then again.") from None
    network = _Network(segmenter).eval().float().to("cpu")
    side = segmenter.trained.preparation.framing.side_px
    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # before the export: what a network keeps from it has no values
        expected = {num: [out.numpy() for out in network(pixels[:num])] for num in (1, 3)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                (pixels[:2],),
                str(path),
                input_names=["pixels"],
                output_names=["probabilities", "fields"][: len(expected[1])],
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1, max=1024)}},
                dynamo=True,
                external_data=False,
            )
    except Exception as error:  # torch's exporter wraps any error of the network in its own kinds
        path.unlink(missing_ok=True)
        raise CellbenchError(_why_not(segmenter, error)) from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for num, values in expected.items():
        for found, value in zip(session.run(None, {"pixels": pixels[:num].numpy()}), values, strict=True):
            worst = max(worst, float(np.abs(found - value).max()))
    if not worst <= TOLERANCE:
        path.unlink()
        raise CellbenchError(f"--onnx: onnxruntime differs from torch by {worst:.2g}, more than {TOLERANCE:g}; the file is not kept.")
    return worst


def left_to_caller(trained: TrainedRun) -> list[str]:
    """What `predict` does with this run before and after its network, in order; an ONNX file does none of it."""
    run, made, calibration = trained.run, trained.preparation, trained.calibration
    framing = made.framing
    steps = [
        "values of more than 8 bits scaled to 0..255 by `reading` in run.json" if made.reading != IntensityScaling() else "",
        f'`normalise = "{run.normalise}"`, with the fitted values in run.json' if made.normaliser is not None else "",
        f"the image resized to {framing.side_px} x {framing.side_px} px" if framing.kind == "resize" else "",
        f"the image scaled by {framing.scale:g}" if framing.scale != 1 else "",
        f"tiles of {framing.side_px} px that overlap by {run.overlap:.0%}, and their blending" if framing.kind == "tile" else "",
        f'`tta = "{run.tta}"`: the mean over changed tiles' if run.tta != "none" else "",
        f"logits divided by the temperature {calibration.temperature:.3g}" if calibration.temperature != 1 else "",
        f'`edge_cells = "{run.edge_cells}"`: small regions that the frame cuts are dropped' if calibration.edge_share else "",
        f"single cells ({trained.separation.description})",
    ]
    return [step for step in steps if step]


def write_readme(path: Path, trained: TrainedRun) -> None:
    """Writes what a user of ``model.onnx`` has to know beside it."""
    side, num, target = trained.preparation.framing.side_px, len(trained.classes), TARGETS[trained.run.targets]
    fields = ""
    if target is not None:
        shape = f"(B, {target.num_fields}, {side}, {side}) float32, 0..1"
        fields = f"\n- output `fields`: {shape}, in which single cells are found: {target.fields_meaning}"
    steps = "\n".join(f"{k}. {step}" for k, step in enumerate(left_to_caller(trained), 1))
    text = f"""# {trained.name}

`cellbench predict THIS_FOLDER IMAGES --out DIR` does everything. `model.onnx` is the network alone:

- input `pixels`: (B, 3, {side}, {side}) float32, RGB in 0..1, any B
- output `probabilities`: (B, {num}, {side}, {side}) float32: {", ".join(trained.classes)}{fields}

`predict` does more around the network, which is left to the caller of `model.onnx`:

{steps}
"""
    write_atomic(path, text)


def _why_not(segmenter: Segmenter, error: BaseException) -> str:
    """Why a network cannot be written, in one line; torch's own advice is for those who write networks."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", one_line(error))
    run = segmenter.trained.run
    if "specialized" in text or "Constraints violated" in text:
        why = "it computes differently for each number of tiles, as a loop over them does, so that a file for any number cannot be written"
    elif "data-dependent" in text.lower() or "DataDependent" in text:
        why = "what it computes depends on the values of the pixels, as an `if` on them does"
    else:
        why = f"torch {torch.__version__} has no ONNX form for a part of it ({type(error).__name__}: {text[:120].rstrip('. ')})"
    return (
        f"--onnx: the network of '{segmenter.trained.name}' ({run.backbone or 'no backbone'}, {run.head or run.baseline}) cannot be written as "
        f"ONNX: {why}. Export it without --onnx: the folder and --mlflow need no ONNX."
    )
