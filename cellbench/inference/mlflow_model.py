"""A run as a model for ``mlflow models serve``. Input: the bytes of an image file. Output: a mask as PNG."""

from __future__ import annotations

import base64
import io
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, Schema

from cellbench.data.io.png_stream import PngWriter
from cellbench.inference.segmenter import Segmenter


class ServedSegmenter(PythonModel):
    """Loads an exported folder, MLflow's artifact ``run``. The environment must have cellbench installed."""

    def load_context(self, context: Any) -> None:
        self.segmenter = Segmenter.load(context.artifacts["run"], trust=True)  # who serves a model of MLflow runs its code

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Segments the column ``image``: the bytes of PNG, JPEG, TIFF, BMP or WebP files.

        Returns ``mask`` (a PNG in base64: 0 and 255, or class numbers for more than two classes), ``height_px``, ``width_px``, ``share`` (of
        the pixels that are not background), ``notes`` (remarks on how the file's values were read) and ``distance`` (from the training images, NaN
        if unknown).
        """
        rows = []
        for data in model_input["image"]:
            with tempfile.NamedTemporaryFile(suffix=".image") as file:
                file.write(data)
                file.flush()
                found = self.segmenter.predict(file.name)
            out = io.BytesIO()
            png = PngWriter(out, found.classes.shape, 1, self.segmenter.trained.name)
            png.add(found.classes * np.uint8(255 if len(found.class_names) == 2 else 1))
            png.end()
            height, width = found.classes.shape
            notes = "; ".join(f"{note.message} ({note.detail})" if note.detail else note.message for note in found.notes)
            mask = base64.b64encode(out.getvalue()).decode()
            rows.append(
                {
                    "mask": mask,
                    "height_px": height,
                    "width_px": width,
                    "share": found.share,
                    "notes": notes,
                    "distance": math.nan if found.distance is None else found.distance,
                }
            )
        return pd.DataFrame(rows)


SCRIPT = """from cellbench.inference.mlflow_model import ServedSegmenter
from mlflow.models import set_model

set_model(ServedSegmenter())
"""
"""The model's code in MLflow: readable, unlike a pickle."""


def save_model(folder: Path, exported: Path) -> None:
    """Writes the MLflow model of an exported folder, with a copy of it inside; ``folder`` appears complete or not at all."""
    outputs = {"mask": "string", "height_px": "long", "width_px": "long", "share": "double", "notes": "string", "distance": "double"}
    signature = ModelSignature(
        inputs=Schema([ColSpec("binary", "image")]), outputs=Schema([ColSpec(kind, name) for name, kind in outputs.items()])
    )
    with tempfile.TemporaryDirectory(dir=folder.parent.parent, prefix=".cellbench-") as name:
        script = Path(name) / "model.py"
        script.write_text(SCRIPT, encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing input example, which would be a whole image
            mlflow.pyfunc.save_model(
                str(Path(name) / "model"),
                python_model=str(script),
                artifacts={"run": str(exported)},
                signature=signature,
                pip_requirements=["cellbench"],
            )
        (Path(name) / "model").replace(folder)
