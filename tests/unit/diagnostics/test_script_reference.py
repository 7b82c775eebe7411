"""Claims about the plain script that ``bench`` compares with: it trains, tests whole images, and its Dice is smp's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segmentation_models_pytorch.metrics import f1_score, get_stats

from cellbench.diagnostics import script_reference
from cellbench.diagnostics.script_reference import ScriptSettings, corners, dice


def test_dice_is_that_of_smp():
    found, true = torch.randint(0, 2, (2, 1, 50, 70), generator=torch.Generator().manual_seed(0))
    assert dice(found, true) == pytest.approx(float(f1_score(*get_stats(found, true, mode="binary"), reduction="micro")))


@pytest.mark.parametrize("size", [(224, 224), (225, 500), (1200, 1600)])
def test_tiles_cover_an_image_and_lie_in_it(size):
    times = np.zeros(size, int)
    for y, x in corners(times, script_reference.STEP_PX):
        assert 0 <= y <= size[0] - 224
        assert 0 <= x <= size[1] - 224
        times[y : y + 224, x : x + 224] += 1
    assert times.min() >= 1


def test_training_is_repeatable_and_learns(small_folder, monkeypatch):
    monkeypatch.setattr(script_reference, "CHUNK", 4)
    settings = {
        "dataset": "folder",
        "data": str(small_folder),
        "backbone": "filter-bank",
        "heads": ["bilinear"],
        "rates": [1e-2],
        "crops_per_image": 2,
    }
    short, long, again = (script_reference.run(ScriptSettings(**settings, epochs=num)) for num in (1, 6, 6))
    assert long == again
    assert long > max(short, 0.5)
