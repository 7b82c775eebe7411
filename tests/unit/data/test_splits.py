"""Splits that do not leak: groups stay whole, strata are shared out, folds test every image once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellbench.config.experiment import DataSpec
from cellbench.data.dataset import Sample
from cellbench.data.splits import Splits, choose_folds, split_of
from cellbench.data.stratify import allocate
from cellbench.errors import CellbenchError


def pool(num: int, **fields) -> tuple[Sample, ...]:
    """Samples p<i // 3>_<i>.png; ``fields`` are functions of i."""
    return tuple(
        Sample(name=f"p{i // 3}_{i}.png", image=Path(f"p{i // 3}_{i}.png"), mask=Path("m.png"), **{key: f(i) for key, f in fields.items()})
        for i in range(num)
    )


def split(root: Path, samples: tuple[Sample, ...], test: tuple[Sample, ...] = (), foreground=lambda _: 0.0, **settings) -> Splits:
    found = split_of(root, samples, test, DataSpec(**settings), foreground)
    found.keep()
    return found


def names(samples) -> set[str]:
    return {sample.name for sample in samples}


@pytest.mark.parametrize("num", [10, 23])
@pytest.mark.parametrize("group", ["none", "prefix"])
def test_folds_test_every_image_once_and_are_about_equal(tmp_path: Path, num: int, group: str) -> None:
    folds = [split(tmp_path, pool(num), folds=3, fold=k, group=group) for k in range(3)]
    assert Counter(name for fold in folds for name in names(fold.test)) == Counter(names(pool(num)))
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= (1 if group == "none" else 3)
    for fold in folds:
        assert names(fold.train) | names(fold.val) | names(fold.test) == names(pool(num))
        assert len(fold.train) + len(fold.val) + len(fold.test) == num
        assert fold.val


def test_folds_take_the_test_folder_in(tmp_path: Path) -> None:
    test = tuple(Sample(name=f"t{i}.png", image=Path(f"t{i}.png"), mask=Path("m.png")) for i in range(3))
    folds = [split(tmp_path, pool(12), test, folds=5, fold=k) for k in range(5)]
    assert {name for fold in folds for name in names(fold.test)} == names(pool(12)) | names(test)
    folds = [split(tmp_path / "same", pool(12), pool(1), folds=5, fold=k) for k in range(5)]
    assert {name for fold in folds for name in names(fold.test)} == names(pool(12)) | {"test__p0_0.png"}


# The number of folds that few images get


@pytest.mark.parametrize(
    ("num", "num_test", "group", "expected"),
    [
        (11, 3, None, 5),
        (100, 0, None, 5),  # 20 would be tested
        (150, 0, None, 0),
        (100, 30, None, 0),
        (12, 0, lambda i: f"patient {i % 4}", 4),
        (12, 0, lambda i: f"patient {i % 2}", 0),  # none would be left to validate on
        (2, 0, None, 0),
    ],
)
def test_fewer_than_30_test_images_are_tested_in_folds(tmp_path: Path, num: int, num_test: int, group, expected: int) -> None:
    fields = {"group": group} if group else {}
    test = tuple(Sample(name=f"t{i}.png", image=Path(f"t{i}.png"), mask=Path("m.png")) for i in range(num_test))
    num_folds, why = choose_folds(tmp_path, {"train": pool(num, **fields), "test": test}, DataSpec())
    assert num_folds == expected
    assert why == "" if not expected else f"all {num + num_test} are tested instead, each once, in {expected} folds" in why
    for fold in range(expected):
        assert split(tmp_path, pool(num, **fields), test, folds=expected, fold=fold).val


def test_a_users_own_split_of_few_images_is_kept(tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["p0_0"], "val": ["p0_1"], "test": ["p0_2"]}))
    assert choose_folds(tmp_path, {"train": pool(9)}, DataSpec()) == (0, "")


@pytest.mark.parametrize("settings", [{}, {"folds": 4, "fold": 1}, {"test_fraction": 0.4, "val_fraction": 0.3}])
@pytest.mark.parametrize("seed", range(3))
def test_no_group_lies_in_two_parts(tmp_path: Path, settings: dict, seed: int) -> None:
    found = split(tmp_path, pool(40, group=lambda i: "" if i > 35 else f"patient {i % 7}"), split_seed=seed, **settings)
    home: dict[str, str] = {}
    for part in ("train", "val", "test"):
        for sample in getattr(found, part):
            assert home.setdefault(sample.group or sample.name, part) == part
    assert len(home) == 7 + 4


def test_groups_are_read_from_names_by_a_pattern(tmp_path: Path) -> None:
    found = split(tmp_path, pool(30), group="prefix")
    parts = [{name.split("_")[0] for name in names(getattr(found, part))} for part in ("train", "val", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 10
    one = r"^(p)(?=[0-4]_)|^(?=p)"
    assert {name[:2] for name in names(split(tmp_path, pool(30), group="prefix", group_pattern=one).train)} >= {
        "p0",
        "p1",
        "p2",
        "p3",
        "p4",
    }
    with pytest.raises(CellbenchError, match="no name, such as 'p0_0"):
        split(tmp_path, pool(30), group="prefix", group_pattern="^(slide)")


@pytest.mark.parametrize("group", ["none", "column"])
def test_every_part_gets_its_share_of_every_label(tmp_path: Path, group: str) -> None:
    samples = pool(200, label=lambda i: "rare" if i % 10 == 0 else "common", group=lambda i: str(i // 2))
    found = split(tmp_path, samples, stratify="label", group=group)
    for part, share in (("train", 0.64), ("val", 0.16), ("test", 0.2)):
        rare = sum(sample.label == "rare" for sample in getattr(found, part))
        assert abs(rare - share * 20) <= 1
        assert abs(len(getattr(found, part)) - share * 200) <= 2


def test_the_share_of_cells_is_stratified(tmp_path: Path) -> None:
    found = split(
        tmp_path, pool(100), foreground=lambda sample: int(sample.image.stem.split("_")[1]) / 100, stratify="foreground", folds=5, fold=2
    )
    fifths = Counter(int(sample.name.split("_")[1].split(".")[0]) // 20 for sample in found.test)
    assert fifths == dict.fromkeys(range(5), 4)


def test_sizes_are_stratified_without_decoding(tmp_path: Path) -> None:
    samples = pool(20)
    for i, sample in enumerate(samples):
        Image.fromarray(np.zeros((10, 20 if i % 4 else 30), np.uint8)).save(tmp_path / sample.name)
    placed = tuple(Sample(name=s.name, image=tmp_path / s.name, mask=s.mask) for s in samples)
    found = split(tmp_path, placed, stratify="size", folds=5, fold=0)
    assert sum(int(sample.name.split("_")[1].split(".")[0]) % 4 == 0 for sample in found.test) == 1


def test_a_written_split_is_read_again_and_each_setting_has_its_own_file(tmp_path: Path) -> None:
    first = split(tmp_path, pool(30), folds=3, fold=1, group="prefix")
    again = split_of(tmp_path, pool(30), (), DataSpec(folds=3, fold=1, group="prefix"))
    assert (again.record, again.place) == ("", first.place)
    assert (again.train, again.val, again.test) == (first.train, first.val, first.test)
    places = {split(tmp_path, pool(30), **settings).place for settings in ({}, {"folds": 3, "fold": 1}, {"folds": 3}, {"group": "prefix"})}
    assert len(places | {first.place}) == 5


def test_a_users_own_split_is_not_used_for_folds(tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text(
        json.dumps({"train": [s.name for s in pool(30)[:20]], "val": [s.name for s in pool(30)[20:]], "test": []})
    )
    tests = [names(split(tmp_path, pool(30), folds=3, fold=k).test) for k in range(3)]
    assert set.union(*tests) == names(pool(30))


def test_a_split_that_tears_a_group_apart_is_refused(tmp_path: Path) -> None:
    record = {"train": [s.name for s in pool(30)[:20]], "val": [s.name for s in pool(30)[20:25]], "test": [s.name for s in pool(30)[25:]]}
    (tmp_path / "splits.json").write_text(json.dumps(record))
    split(tmp_path, pool(30))
    with pytest.raises(CellbenchError, match="group 'p6' lies in 'train' and in 'val'"):
        split(tmp_path, pool(30), group="prefix")


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"group": "column"}, "no image has a group"), ({"stratify": "label"}, "no image has a label"), ({"folds": 50}, "too few")],
)
def test_what_cannot_be_grouped_is_refused(tmp_path: Path, settings: dict, says: str) -> None:
    with pytest.raises(CellbenchError, match=says):
        split(tmp_path, pool(30), **settings)


@pytest.mark.parametrize(
    "settings", [{"folds": 1}, {"folds": 3, "fold": 3}, {"fold": 1}, {"group_pattern": "("}, {"group_pattern": "patient"}]
)
def test_invalid_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"fold|regular|parentheses"):
        DataSpec(**settings)


def test_a_test_folder_that_tears_a_group_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CellbenchError, match="group 'p9' lies in"):
        split(tmp_path, pool(29), (Sample(name="p9_30.png", image=Path("i"), mask=Path("m")),), group="prefix")


def test_one_giant_group_leaves_no_part_empty() -> None:
    parts = allocate(["giant"] * 90 + ["b", "c"], [0] * 92, [0.6, 0.2, 0.2], [0])
    assert sorted(Counter(parts.tolist()).values()) == [1, 1, 90]
