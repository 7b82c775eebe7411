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
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, Schema

from cellbench.data.io.png_stream import PngWriter
from cellbench.errors import CellbenchError
from cellbench.inference.segmenter import Prediction, Segmenter
from cellbench.temporary import TemporaryFolder


class ServedSegmenter(PythonModel):
    """Loads an exported folder, MLflow's artifact ``run``. The environment must have cellbench installed."""

    def load_context(self, context: Any) -> None:
        self.segmenter = Segmenter.load(context.artifacts["run"], trust=True)  # who serves a model of MLflow runs its code

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Segments the column ``image``: the bytes of PNG, JPEG, TIFF, BMP or WebP files.

        Returns ``mask`` (a PNG in base64: 0 and 255, or class numbers for more than two classes), ``height_px``, ``width_px``, ``share`` (of
        the pixels that are not background), ``notes`` (remarks on how the file's values were read) and ``distance`` (from the training images, NaN
        if unknown).

        Raises MlflowException, which the server answers with status 400, for rows that are no readable image; it names each of them.
        """
        if "image" not in model_input:
            raise _refused(f"there is no column 'image', only {', '.join(map(repr, model_input))}. It holds the bytes of image files.")
        rows, faults = [], []
        for number, data in enumerate(model_input["image"]):
            try:
                rows.append(self._answer(self._segment(data)))
            except CellbenchError as error:
                faults.append(f"row {number}: {error}")
        if faults:
            more = f" {len(faults) - 5} more rows." if len(faults) > 5 else ""
            raise _refused(
                f"{len(faults)} of {len(model_input)} rows cannot be segmented (the first row is 0). {' '.join(faults[:5])}{more}"
            )
        return pd.DataFrame(rows)

    def _answer(self, found: Prediction) -> dict[str, object]:
        out = io.BytesIO()
        png = PngWriter(out, found.classes.shape, 1, self.segmenter.trained.name)
        png.add(found.classes * np.uint8(255 if len(found.class_names) == 2 else 1))
        png.end()
        height, width = found.classes.shape
        notes = "; ".join(f"{note.message} ({note.detail})" if note.detail else note.message for note in found.notes)
        mask = base64.b64encode(out.getvalue()).decode()
        distance = math.nan if found.distance is None else found.distance
        return {"mask": mask, "height_px": height, "width_px": width, "share": found.share, "notes": notes, "distance": distance}

    def _segment(self, data: object) -> Prediction:
        """Raises CellbenchError."""
        if not isinstance(data, bytes) or not data:
            what = "empty" if data is None or data is pd.NaT or isinstance(data, bytes | float) else f"of the type {type(data).__name__}"
            raise CellbenchError(f"'image' is {what}. Expected the bytes of an image file; in JSON, base64.")
        with TemporaryFolder() as folder:
            file = Path(folder) / "image"
            file.write_bytes(data)
            try:
                return self.segmenter.predict(file)
            except CellbenchError as error:
                raise CellbenchError(str(error).replace(f"{file}", "the image").replace(repr(file.name), "the image")) from error


def _refused(text: str) -> MlflowException:
    return MlflowException(text, error_code=INVALID_PARAMETER_VALUE)


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
