"""Data that `check` calls not fit is refused before training unless the user insists; too few images are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from labelled_folders import FOLDER, pairs, picture

from cellbench.config.experiment import DataSpec
from cellbench.data.audit.checks import FEWEST_IMAGES
from cellbench.data.audit.quick_check import require_fit
from cellbench.data.loading import open_dataset
from cellbench.errors import CellbenchError
from cellbench.statistics.hypothesis_tests import is_decidable


def checked(folder: Path, *, unfit: bool = False, **settings) -> list[str]:
    lines: list[str] = []
    require_fit(open_dataset(FOLDER, folder, DataSpec(group="none", **settings)), unfit, lines.append)
    return lines


def test_the_fewest_images_are_those_that_can_decide_between_two_models() -> None:
    assert is_decidable(FEWEST_IMAGES)
    assert not is_decidable(FEWEST_IMAGES - 1)


def test_too_few_images_are_named_and_a_quick_try_on_many_is_not(tmp_path: Path) -> None:
    (said,) = checked(pairs(tmp_path / "five", 5))
    assert said.startswith("Note: too few to compare. With 5 images no difference")
    assert checked(pairs(tmp_path / "six", 6)) == []
    assert checked(pairs(tmp_path / "twelve", 12), limit=1) == []


def test_a_leak_is_refused_in_one_line_unless_the_user_insists(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "own", 8)
    for k in (0, 1, 2):
        picture(7).save(folder / "images" / f"i{k}.png")
    with pytest.raises(CellbenchError, match="NOT FIT to train on: ") as caught:
        checked(folder)
    assert "\n" not in str(caught.value)
    warnings = checked(folder, unfit=True)
    assert any("leak: same" in line for line in warnings)
    assert all(line.startswith("Warning: NOT FIT") for line in warnings)
