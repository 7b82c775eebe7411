"""Scores of one model, in a line."""

from __future__ import annotations

import numpy as np

from cellbench.statistics.scores import ModelScores


def scores(name, values, **more):
    values = np.atleast_2d(values)
    return ModelScores(**{"model": name, "images": [f"{n}.png" for n in range(values.shape[1])], "values": values} | more)
