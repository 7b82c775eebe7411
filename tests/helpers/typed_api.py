"""The Python API as its users' type checker sees it. Not run: `mypy`, as of `make check`, reads it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import numpy as np
import pandas as pd

import cellbench as cb

results = cb.grid("bccd", data="BCCD", set={"run.epochs": 3}, limit=4, progress=False)
assert_type(results, cb.Results)
assert_type(cb.results("bccd"), cb.Results)
frame: pd.DataFrame = results.leaderboard()
assert_type(results.compare("uni · fpn", "otsu"), cb.Comparison)
assert_type(results.compare("otsu").low, float | None)
assert_type(results.verdict(), str)
assert_type(results.report("report"), Path)
assert_type(results.segmenter(), cb.Segmenter)
found = cb.Segmenter.load("best").predict("smear.png")
assert_type(found, cb.Prediction)
assert_type(found.num_cells, int)
pixels: np.ndarray = found.instances
checked = cb.check("BCCD", set={"data.folds": 5})
assert_type(checked.fit, bool)
assert_type(cb.score("cellpose", "masks", data="BCCD"), cb.Results)
assert_type(cb.search(data="BCCD", trials=5).trials, pd.DataFrame)
cb.gird("bccd")  # type: ignore[attr-defined]  # an unknown name is an error, not Any
cb.grid("bccd", epochs=3)  # type: ignore[call-arg]
