"""What an experiment leaves to its data is chosen once, recorded as a setting, and gives way to what the user sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from labelled_folders import pairs

from cellbench.config.experiment import Experiment
from cellbench.config.loading import changed_experiment, read_experiment, read_space
from cellbench.config.registry import Registry
from cellbench.data.loading import settings_for_data
from cellbench.errors import CellbenchError
from cellbench.metrics.catalog import objectives


def chosen(data: Path, *changes: str, limit: int | None = None) -> list[str]:
    experiment, _ = read_experiment("own", changes, data, limit)
    return [setting for setting, _ in settings_for_data(experiment, Registry(), data)]


def test_ones_own_few_images_are_all_tested_and_give_many_crops_each(tmp_path: Path) -> None:
    assert chosen(pairs(tmp_path / "own", 10)) == ["data.folds=5", "run.crops_per_image=13"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["data.folds=0"], ["run.crops_per_image=13"]),
        (["data.folds=3", "run.crops_per_image=2"], []),
        (["data.auto_folds=false", "run.crops_per_image=2"], []),
    ],
)
def test_what_the_user_sets_is_not_chosen(tmp_path: Path, changes: list[str], expected: list[str]) -> None:
    assert chosen(pairs(tmp_path / "own", 10), *changes) == expected


def test_a_quick_try_stays_quick(tmp_path: Path) -> None:
    assert chosen(pairs(tmp_path / "own", 10), limit=2) == ["run.crops_per_image=40"]


def test_the_experiment_is_recorded_with_what_was_chosen_and_named_after_the_folder(tmp_path: Path) -> None:
    data = pairs(tmp_path / "slides", 6)
    experiment, text = changed_experiment(read_experiment("own", (), data)[1], ["data.folds=5", "run.crops_per_image=9"], "own")
    assert (experiment.experiment, experiment.data.folds, experiment.run["crops_per_image"]) == ("own on slides", 5, 9)
    assert "# Changed by the call: --set data.folds=5 --set run.crops_per_image=9" in text
    (tmp_path / "again.toml").write_text(text)
    assert read_experiment(str(tmp_path / "again.toml"), (), data)[0] == experiment


def test_the_default_for_ones_own_images_asks_for_each_kind_of_backbone_and_for_no_licence() -> None:
    registry = Registry()
    cards = [registry.backbone(name) for name in read_experiment("own")[0].grid["backbone"]]
    assert {"blood", "pathology", "natural-image", ""} == {card.domain for card in cards}
    assert not any(card.gated for card in cards)
    assert any(card.weights.startswith("package:") for card in cards)


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "x = " + "9" * 5000, "x = ", 'experiment = "x"\x00'])
def test_what_no_editor_writes_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(CellbenchError, match="cannot be read as an experiment") as caught:
        read_experiment(str(tmp_path / "x.toml"))
    assert "\n" not in str(caught.value)
    with pytest.raises(CellbenchError, match="is damaged"):
        Experiment.of_text(text, "config.toml")


def test_a_range_beyond_all_floats_is_one_line(tmp_path: Path) -> None:
    text = (
        f'experiment = "x"\ndataset = "smears"\n[space]\nlr = {{low = 0.1, high = {10**400}}}\nbackbone = ["filter-bank"]\nhead = ["fpn"]\n'
    )
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(CellbenchError, match="high") as caught:
        read_space(str(tmp_path / "x.toml"), (), None, None, Registry(), objectives())
    assert "\n" not in str(caught.value)
