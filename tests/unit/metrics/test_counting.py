"""Cells by class and region, counted by their centres."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from cellbench.metrics.counting import PlacedCells, count_rows, counts_csv
from cellbench.metrics.instances import numbered_instances


@dataclass(frozen=True)
class LeftOf:
    name: str
    x: float

    def holds(self, xy: np.ndarray) -> np.ndarray:
        return xy[:, 0] < self.x


def test_centres_are_scipys() -> None:
    ids = np.zeros((30, 40), np.int32)
    ids[2:9, 3:15], ids[20:23, 30:31], ids[12:19, 20:22] = 1, 2, 5
    found = PlacedCells.of(numbered_instances(ids, (ids > 0).astype(np.uint8)))
    centres = np.array(ndimage.center_of_mass(ids > 0, ids, [1, 2, 5]))[:, ::-1] + 0.5
    assert np.allclose(found.xy, centres)


def test_counts_by_region_and_class() -> None:
    true = PlacedCells(xy=np.array([[1.0, 1], [8, 1], [9, 9]]), classes=np.array([1, 1, 2]))
    found = PlacedCells(xy=np.array([[1.5, 1], [2, 5]]), classes=np.array([1, 2]))
    rows = count_rows("a.png", true, found, {1: "RBC", 2: "WBC"}, [LeftOf("left", 5), LeftOf("all of it", 10)])
    assert counts_csv(rows).splitlines() == [
        "image,region,RBC true,RBC predicted,RBC difference,WBC true,WBC predicted,WBC difference,all true,all predicted,all difference",
        "a.png,left,1,1,0,0,1,1,1,2,1",
        "a.png,all of it,2,1,-1,1,1,0,3,2,-1",
    ]
    whole = count_rows("a.png", true, found, {1: "RBC"})
    assert counts_csv(whole) == "image,true,predicted,difference\na.png,2,1,-1\n"
