"""Records refuse unknown keys, a grid is a product, and a fingerprint changes with everything that can change numbers."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from cellbench.config.experiment import DataSpec, Experiment, cohorts, expand, labels
from cellbench.config.registry import Registry, shipped
from cellbench.config.run import RUN_KEYS, SAMPLING_FIELDS, RunSpec, fingerprint, weighted_terms
from cellbench.config.search_space import GRID_ONLY, Space
from cellbench.errors import CellbenchError
from cellbench.metrics.catalog import objectives

RUN = RunSpec(backbone="uni", head="fpn")


def experiment(text: str) -> Experiment:
    return Experiment.of(tomllib.loads('experiment = "e"\ndataset = "smears"\n' + text), "e.toml")


def refusal(text: str) -> str:
    with pytest.raises(CellbenchError) as caught:
        experiment(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


GRID = '[grid]\nbackbone = ["uni", "dinobloom-s"]\nhead = ["fpn", "bilinear"]\nseed = [0, 1, 2]\n'


def test_a_grid_is_the_product_of_its_lists_each_point_once() -> None:
    runs = expand(experiment(GRID))
    points = {(run.backbone, run.head, run.seed) for run in runs}
    assert len(runs) == len(points) == 12
    assert points == {(b, h, s) for b in ("uni", "dinobloom-s") for h in ("fpn", "bilinear") for s in range(3)}


def test_run_settings_reach_all_runs_and_those_of_a_head_its_own_only() -> None:
    runs = expand(experiment(GRID + "[run]\nepochs = 3\n[head.fpn]\nlr = 0.5\nwidth = 32"))
    assert {run.epochs for run in runs} == {3}
    assert {(run.head, run.lr, run.options.get("width")) for run in runs} == {("fpn", 0.5, 32), ("bilinear", 1e-3, None)}


PAIRS = """
[[pair]]
backbone = "uni"
head = "fpn"
epochs = 3
width = 64
[[pair]]
backbone = "dinobloom-s"
head = "bilinear"
"""


def test_pairs_run_alone_with_their_own_settings_at_each_point_of_the_grid() -> None:
    runs = expand(experiment(PAIRS + "[grid]\nseed = [0, 1]\n[run]\nepochs = 5\n[head.fpn]\nepochs = 4\nlr = 0.5"))
    assert [(run.backbone, run.head, run.seed, run.epochs, run.lr, run.options) for run in runs] == [
        ("uni", "fpn", 0, 3, 0.5, {"width": 64}),
        ("uni", "fpn", 1, 3, 0.5, {"width": 64}),
        ("dinobloom-s", "bilinear", 0, 5, 1e-3, {}),
        ("dinobloom-s", "bilinear", 1, 5, 1e-3, {}),
    ]


def test_a_trained_baseline_runs_once_a_seed_and_an_untrained_one_once() -> None:
    runs = expand(experiment('baselines = ["otsu", "unet"]\n' + GRID), trained={"otsu": False, "unet": True})
    assert [(run.baseline, run.seed) for run in runs if run.baseline] == [("otsu", 0), ("unet", 0), ("unet", 1), ("unet", 2)]


def test_a_baseline_takes_the_run_settings_and_its_own_table() -> None:
    (run,) = expand(experiment('baselines = ["unet"]\n[run]\nepochs = 3\nseed = 7\n[baseline.unet]\nlr = 0.25\nwidth = 8'))
    assert (run.epochs, run.seed, run.lr, run.options, run.backbone) == (3, 7, 0.25, {"width": 8}, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[run]\nepohcs = 3", ["e.toml", "epohcs", "Did you mean 'epochs'"]),
        ("[data]\nlimt = 3", ["limt", "Did you mean 'limit'"]),
        ("[gird]\nseed = [1]", ["gird", "Did you mean 'grid'"]),
        ('[grid]\nbackbone = ["uni"]\nheads = ["fpn"]', ["heads", "Did you mean 'head'"]),
        ("[run]\nepochs = 0", ["epochs = 0", "greater than or equal to 1"]),
        ('[run]\nepochs = "3"', ["epochs = '3'", "integer"]),
        ("[run]\nepochs = 2.5", ["epochs = 2.5", "integer"]),
        ("[run]\nflips = 1", ["flips = 1", "boolean"]),
        ("[run]\noverlap = 0.95", ["overlap = 0.95", "0.9"]),
        ("[run]\ntile_px = 8", ["tile_px = 8", "16"]),
        ("[run]\nlr = nan", ["lr = nan"]),
        ("[run]\nwarmup_epochs = inf", ["warmup_epochs = inf", "finite"]),
        ("[run]\nepochs = 2026-11-22", ["epochs", "2026-11-22"]),
        ('[run]\nschedule = "cosin"', ["schedule = 'cosin'", "'cosine'"]),
        ('[run]\nloss = "0.5 ce 0.5 dice"', ["loss", "a sum like"]),
        ('[run]\naugmentations = "blur + blur"', ["augmentations", "names 'blur' twice"]),
        ('[run]\nbackbone = "uni"', ["[run]", "backbone"]),
        ("[data]\nval_fraction = 1.0", ["data.val_fraction = 1.0", "less than 1"]),
        ("[head.fpn]\nwidth = [1, 2]", ["[head.fpn] width = [1, 2]"]),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it_and_what_would_be_right(text: str, says: list[str]) -> None:
    line = refusal(('baselines = ["otsu"]\n' if "grid" in text else GRID) + text)
    assert [part for part in says if part not in line] == []
    assert ".." not in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no runs"),
        ("[grid]\nseed = [0, 1]", "has no runs"),
        ('[grid]\nbackbone = ["uni"]', "both 'backbone' and 'head'"),
        ('[grid]\nbackbone = ["uni"]\nhead = []', "head is an empty list"),
        ('[grid]\nbackbone = ["uni"]\nhead = [3]', "head holds 3"),
        (GRID + "lr = [0.1, 0.1]", "names a value twice"),
        (GRID + "epochs = [1, 2]\n[run]\nepochs = 3", "'epochs' is set in [grid] and in [run]"),
        ('baselines = ["unet"]\n[grid]\nlr = [0.1, 0.2]', "[grid] lr"),
        (PAIRS + GRID, "'backbone' is set in [grid] and in [[pair]]"),
        (PAIRS + "[grid]\nepochs = [1, 2]", "'epochs' is set in [[pair]] 1"),
        (PAIRS + "fold = 1", "'fold' is set in [[pair]] 2"),
        ('[[pair]]\nbackbone = "uni"', "[[pair]] 1 needs 'head'"),
        ('[[pair]]\nbackbone = "uni"\nhead = 3', "[[pair]] 1 needs 'head'"),
        (PAIRS + PAIRS, "twice"),
    ],
)
def test_a_contradictory_experiment_is_refused(text: str, says: str) -> None:
    assert says in refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        GRID + "lr = [0.1, 0.2]\n[head.fpn]\nlr = 0.5",  # the head's own value hides the axis
        GRID + "lr = [1, 1.0]",
        'baselines = ["otsu", "otsu"]',
    ],
)
def test_a_run_occurs_once_in_an_experiment(text: str) -> None:
    assert "twice" in refusal(text)


SEARCH = """
experiment = "s"
dataset = "smears"
ensemble_seeds = true
[search]
repeat_best = 3
[space]
backbone = ["uni"]
head = ["fpn"]
lr = { low = 1e-4, high = 1e-2, log = true }
"""


def space_of(text: str) -> Space:
    return Space.of(tomllib.loads(text), "s.toml", Registry(), objectives())


def test_the_repeats_of_a_searchs_best_setting_have_an_ensemble_and_trials_have_none() -> None:
    space = space_of(SEARCH)
    point = {"backbone": "uni", "head": "fpn", "lr": 1e-3}
    assert [run.ensemble for run in expand(Experiment.of(space.best_tree(point), "best.toml"))] == ["none"] * 3 + ["0, 1, 2"]
    assert [run.ensemble for run in expand(Experiment.of(space.tree(point), "trial.toml"))] == ["none"]


def test_a_search_names_why_it_has_no_setting_of_a_grid() -> None:
    assert set(GRID_ONLY) == set(Experiment.model_fields) - set(tomllib.loads(SEARCH)) - {"data", "head", "run"}
    for key, text in (("ensemble_best", "ensemble_best = 3"), ("baselines", 'baselines = ["otsu"]')):
        with pytest.raises(CellbenchError, match=f"s.toml: '{key}' is for grids: a search ") as error:
            space_of(f"{text}\n{SEARCH}")
        assert "\n" not in str(error.value)


def test_a_search_cannot_choose_what_validation_does_not_see() -> None:
    with pytest.raises(CellbenchError, match=r"\[space\] tta: trials are compared in validation"):
        space_of(SEARCH + 'tta = ["none", "d4"]')


def test_with_ensemble_seeds_each_model_of_several_seeds_has_an_ensemble() -> None:
    runs = expand(experiment(f'ensemble_seeds = true\nbaselines = ["otsu", "unet"]\n{GRID}'), trained={"otsu": False, "unet": True})
    ensembles = [run for run in runs if run.ensemble != "none"]
    assert [run.model for run in ensembles] == ["uni · fpn", "uni · bilinear", "dinobloom-s · fpn", "dinobloom-s · bilinear", "unet"]
    for run in ensembles:
        assert run.members == [other for other in runs if other.ensemble == "none" and other.model == run.model]
    assert "uni · fpn · ensemble of seeds 0, 1, 2" in labels(runs)
    assert len(set(labels(runs))) == len(runs)


@pytest.mark.parametrize("text", ["0", "0, 0", "a, b", "", "0 1"])
def test_an_ensemble_of_anything_but_several_seeds_is_refused(text: str) -> None:
    assert "seeds like" in refusal(f'[grid]\nbackbone = ["uni"]\nhead = ["fpn"]\n[run]\nensemble = "{text}"')


@pytest.mark.parametrize(
    ("settings", "part"),
    [('framing = "resize"', 'framing = "tile"'), ('sampling = "tiles"', 'sampling = "crops"'), ('targets = "stars"', "lengths of rays")],
)
def test_zoom_where_nothing_can_be_magnified_is_refused(settings: str, part: str) -> None:
    assert part in refusal(GRID + f"[run]\nzoom = 0.3\n{settings}")


def test_the_refusal_of_settings_that_do_not_go_together_begins_with_them() -> None:
    assert refusal(GRID + "[run]\nlora_rank = 4").split(": ")[1].startswith("lora_rank = 4 is for the last blocks")


def test_labels_are_unique_and_name_what_differs() -> None:
    runs = expand(experiment('baselines = ["otsu"]\n' + GRID + "lr = [0.1, 0.01]"))
    names = labels(runs)
    assert len(set(names)) == len(runs)
    assert "uni · fpn · lr 0.1 · seed 2" in names
    assert "otsu · seed 0" in names


def test_cohorts_share_a_stream_and_differ_in_it() -> None:
    text = 'baselines = ["otsu", "unet"]\n' + GRID + "tile_px = [224, 448]\nlr = [0.1, 0.01]"
    runs = expand(experiment(text), trained={"otsu": False, "unet": True})
    groups = cohorts(runs)
    assert sorted(len(group) for group in groups) == [1, 3, 12, 12, 12, 12]
    assert [group[0].backbone for group in groups] == ["uni", "uni", "dinobloom-s", "dinobloom-s", None, None]
    for group in groups:
        assert len({(run.backbone, run.baseline, run.tile_px) for run in group}) == 1


OTHER = {
    "backbone": "dinobloom-s", "head": "bilinear", "options": {"width": 1}, "seed": 1, "tile_px": 448, "framing": "pad", "tile_scale":
    2.0, "overlap": 0.25, "val_overlap": 0.25, "sampling": "tiles", "crops_per_image": 2, "repeat_views_every": 3, "flips": False, "rotations":
    False, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "hed": 0.1, "reference_stains": 0.2, "normalise": "macenko", "data_seed": 1,
    "fraction": 0.5, "fold": 1, "epochs": 3, "batch_size": 4, "lr": 0.01, "weight_decay": 0.0, "schedule": "constant",
    "warmup_epochs": 0.0, "patience": 0, "loss": "ce", "select": "val/loss", "unfreeze": 2, "tail_lr_scale": 0.1, "layer_decay": 0.5,
    "targets": "cell+distance", "augmentations": "0.3 blur", "tta": "d4", "adapt": "batchnorm",
    "edge_cells": "tuned", "ensemble": "0, 1", "lora_rank": 4, "pixel_adapter": 8, "zoom": 0.3,
}  # fmt: skip


FIELDS = set(RunSpec.model_fields) - {"baseline"}  # excluded by a backbone


def test_every_field_has_another_test_value() -> None:
    assert FIELDS - set(OTHER) == set()


@pytest.mark.parametrize("key", sorted(FIELDS))
def test_every_field_changes_a_runs_fingerprint_and_the_streams_alone_its_cohort(key: str) -> None:
    before = RUN.model_copy(update={"unfreeze": 1}) if key in ("lora_rank", "pixel_adapter") else RUN
    changed = RunSpec.model_validate({**before.model_dump(), key: OTHER[key]})
    assert fingerprint(changed, "d", "w") != fingerprint(before, "d", "w")
    assert (changed.stream != before.stream) == (key in SAMPLING_FIELDS)


def test_a_cohort_is_not_split_by_what_only_heads_and_training_read() -> None:
    own = {"head", "options", "seed", "epochs", "batch_size", "lr", "weight_decay", "schedule", "warmup_epochs", "patience"}
    own |= {
        "loss",
        "select",
        "tail_lr_scale",
        "layer_decay",
        "lora_rank",
        "pixel_adapter",
        "targets",
        "tta",
        "adapt",
        "edge_cells",
        "ensemble",
    }
    assert FIELDS - set(SAMPLING_FIELDS) == own & FIELDS


def test_a_fingerprint_depends_on_data_and_weights_and_on_nothing_else() -> None:
    same = RunSpec(head="fpn", backbone="uni", options={})
    assert fingerprint(same, "d", "w") == fingerprint(RUN, "d", "w")
    assert len({fingerprint(RUN, "d", "w"), fingerprint(RUN, "D", "w"), fingerprint(RUN, "d", "W"), fingerprint(RUN, "dw", "")}) == 4


def test_options_in_another_order_are_the_same_run() -> None:
    one, two = (RUN.model_copy(update={"options": dict(items)}) for items in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)]))
    assert fingerprint(one, "d", "w") == fingerprint(two, "d", "w")


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RUN.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("parts", [{}, {"backbone": "uni"}, {"head": "fpn"}, {"backbone": "uni", "head": "fpn", "baseline": "otsu"}])
def test_a_run_is_a_backbone_with_a_head_or_a_baseline(parts: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="either a backbone with a head, or a baseline"):
        RunSpec(**parts)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("ce", {"ce": 1}),
        ("0.5 ce + 0.5 dice", {"ce": 0.5, "dice": 0.5}),
        (" 2 * bce+.25 lovasz ", {"bce": 2, "lovasz": 0.25}),
        ("0 ce + 1. dice", {"ce": 0, "dice": 1}),
    ],
)
def test_losses_are_read_as_written(text: str, weights: dict[str, float]) -> None:
    assert weighted_terms(text) == weights


@pytest.mark.parametrize("text", ["", "ce dice", "ce +", "-1 ce", "ce + ce", "0 ce", "1e-3 ce", "CE"])
def test_an_invalid_loss_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a sum like|twice|are 0"):
        weighted_terms(text)


@pytest.mark.parametrize("path", sorted(shipped("experiments").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_experiments_are_valid_and_begin_with_their_question(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "cellbench grid" in text or "cellbench search" in text  # the command
    tree = tomllib.loads(text)
    assert Space.of(tree, path.name, Registry(), objectives()).dimensions if "space" in tree else expand(Experiment.of(tree, path.name))


def test_every_run_key_can_be_set_for_all_runs() -> None:
    assert not {"backbone", "head", "baseline", "options"} & set(RUN_KEYS)
    defaults = RUN.model_dump()
    tree = {"experiment": "e", "dataset": "d", "baselines": ["otsu"], "run": {key: defaults[key] for key in RUN_KEYS}}
    assert expand(Experiment.of(tree, "e"))[0].model_dump() | {"baseline": None} == RunSpec.model_construct().model_dump()


def test_the_published_split_is_the_default() -> None:
    assert DataSpec().val_fraction == 0.2  # seed.md: 80/20


def test_folds_are_all_run_by_baselines_too_unless_some_are_named() -> None:
    text = 'baselines = ["otsu"]\n[data]\nfolds = 3\n' + GRID
    runs = expand(experiment(text), trained={"otsu": False})
    assert len(runs) == 12 * 3 + 3
    assert [run.fold for run in runs if run.baseline] == [0, 1, 2]
    assert len({(run.model, run.seed, run.fold) for run in runs}) == len(set(labels(runs))) == len(runs)
    assert all(len({run.fold for run in group}) == 1 for group in cohorts(runs))
    assert {run.fold for run in expand(experiment(text + "fold = [0, 2]"))} == {0, 2}
    assert {run.fold for run in expand(experiment(text + "[run]\nfold = 1"))} == {1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GRID + "fold = [0, 1]", ["fold 1", "[data] folds"]),
        ("[data]\nfolds = 3\n" + GRID + "[run]\nfold = 3", ["fold 3", "there are 3"]),
        ("[data]\nfolds = 3\nfold = 1\n" + GRID, ["a grid runs all folds", "[grid] fold"]),
        (GRID + "[run]\nframing = 'resize'\ntile_px = 50\ntile_scale = 0.25", ["resize", "12.5", "whole number"]),
    ],
)
def test_folds_and_squares_that_do_not_exist_are_refused(text: str, says: list[str]) -> None:
    assert all(word in refusal(text) for word in says)
