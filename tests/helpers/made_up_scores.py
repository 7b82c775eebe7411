"""Made-up scores: of one model in a line, and of kinds that statistics may stumble over."""

from __future__ import annotations

import numpy as np

from cellbench.statistics.scores import ModelScores


def scores(name, values, **more):
    values = np.atleast_2d(values)
    return ModelScores(**{"model": name, "images": [f"{n}.png" for n in range(values.shape[1])], "values": values} | more)


def degenerate_scores(rng, kind, n, num):
    """(seeds, num) scores of model ``n``: constant, equal, binary or random."""
    if kind == "constant":
        return np.full((1, num), n / 10)
    if kind == "equal":
        return np.full((2, num), 0.5)
    return rng.integers(0, 2, (1, num)) if kind == "binary" else rng.random((2, num))
