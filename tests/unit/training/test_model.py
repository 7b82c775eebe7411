"""What a head returns is checked before a loss or a blend reads it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cellbench.errors import CellbenchError
from cellbench.features.extractor import Batch
from cellbench.models.backbones.base import Level
from cellbench.models.heads.base import Head
from cellbench.training.model import SegmentationModel

BATCH = Batch(maps={0: torch.zeros(2, 4, 2, 2)}, pixels=torch.zeros(2, 3, 32, 32), target=torch.zeros(2, 32, 32, dtype=torch.int64))


class OfShape(Head):
    """Scores of any shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__((Level(index=0, dim=4, stride_px=16),), 3)
        self.shape, self.scale = shape, nn.Parameter(torch.ones(1))

    def forward(self, maps, pixels_BCHW):
        return self.scale * torch.zeros(self.shape) if self.shape else [self.scale]


def scores(head: Head) -> torch.Tensor:
    return SegmentationModel(head, head.levels)(BATCH)


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (2, 4, 32, 32), (3, 32, 32), ()])
def test_scores_of_another_shape_are_named_with_the_shape_that_is_expected(shape: tuple[int, ...]) -> None:
    with pytest.raises(CellbenchError, match="the head OfShape returned ") as caught:
        scores(OfShape(*shape))
    assert "where scores (2, 3, 32, 32) are expected" in str(caught.value)
    assert f"returned {shape or 'list'} " in str(caught.value)


def test_scores_for_each_class_and_pixel_pass() -> None:
    assert scores(OfShape(2, 3, 32, 32)).shape == (2, 3, 32, 32)
