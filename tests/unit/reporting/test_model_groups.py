"""Which runs are compared, and on what: folds are parts of one test, groups are units, and the best was picked by its scores."""

from __future__ import annotations

import numpy as np
import pytest
from finished_runs import IMAGES, finished_run, per_image_scores

from cellbench.metrics.pixel import pixel_scores
from cellbench.reporting import model_groups
from cellbench.reporting.grouping import group_models
from cellbench.reporting.model_groups import FinishedRun
from cellbench.statistics.bootstrap import mean_interval
from cellbench.statistics.comparison import compare_all
from cellbench.statistics.scores import ModelScores


def fold_of(head: str, mean: float, fold: int, seed: int = 0, num: int = 4) -> FinishedRun:
    """The run that tested a quarter of the images."""
    record = per_image_scores(mean, seed, IMAGES, f"fold {fold}")
    mine = slice(fold, None, num)
    record |= {name: values[mine] for name, values in record.items() if isinstance(values, list) and len(values) == len(IMAGES)}
    counts = np.random.default_rng(fold).integers(50, 100, (len(record["images"]), 2, 2)).tolist()
    return finished_run(head, record | {"fold": fold, "num_folds": num, "pool": "all", "confusion": counts}, seed, fold)


def test_the_folds_of_a_seed_are_one_row_over_all_images():
    runs = [fold_of(head, mean, fold, seed) for head, mean in (("fpn", 0.9), ("bilinear", 0.8)) for seed in (0, 1) for fold in (2, 0, 3, 1)]
    (here,), left_out = group_models(runs)
    assert left_out == []
    assert here.num_folds == 4
    assert sorted(here.images) == sorted(IMAGES)
    best = here.best.scores()
    assert best.values.shape == (2, len(IMAGES))
    whole = per_image_scores(0.9, 1)
    assert best.values[1].tolist() == [whole["dice"][IMAGES.index(image)] for image in here.images]
    assert [IMAGES.index(image) % 4 for image in here.images] == list(best.folds)


def test_the_pictures_of_a_model_are_of_the_fold_that_tested_the_worst_image():
    ((here,), _) = group_models([fold_of("fpn", 0.9, fold, seed) for seed in (0, 1) for fold in range(4)])
    worst = here.images[int(here.best.scores().values[0].argmin())]
    assert worst in here.best.example_run.per_image["images"]
    assert here.best.example_run.seed == 0


def test_pooled_scores_over_folds_come_from_all_counts_and_not_from_a_mean_of_folds():
    runs = [fold_of("fpn", 0.9, fold) for fold in range(4)]
    ((model,),) = [here.models for here in group_models(runs)[0]]
    counts = np.concatenate([run.per_image["confusion"] for run in runs]).sum(0)
    assert model.pooled("dice") == [pytest.approx(2 * counts[1, 1] / (2 * counts[1, 1] + counts[0, 1] + counts[1, 0]))]
    each = [pixel_scores(np.sum(run.per_image["confusion"], axis=0)).dice[1] for run in runs]
    assert model.pooled("dice")[0] != pytest.approx(np.mean(each), abs=1e-9)


def test_a_seed_that_lacks_a_fold_is_left_out_and_the_report_names_them():
    runs = [fold_of("fpn", 0.9, fold, seed) for seed in (0, 1) for fold in range(4)]
    (here,), left_out = group_models(runs[:-1])
    assert len(here.best.by_seed) == 1
    assert left_out == ["uni · fpn, seed 1, is left out: fold 3 is missing."]


def test_scores_over_folds_and_over_one_test_are_never_paired():
    runs = [fold_of("fpn", 0.9, fold) for fold in range(4)] + [finished_run("fpn", per_image_scores(0.9, 0))]
    assert len(group_models(runs)[0]) == 2


def test_folds_are_named_with_the_differences():
    runs = [fold_of(head, mean, fold) for head, mean in (("fpn", 0.9), ("bilinear", 0.8)) for fold in range(4)]
    (here,), _ = group_models(runs)
    (d,) = here.differences_to_best()
    assert d.p_folds is not None
    assert "scores from 4 folds, whose training images overlap: p is optimistic" in d.notes


def test_images_of_a_group_are_resampled_as_one():
    groups = [f"patient-{k // 4}" for k in range(len(IMAGES))]
    runs = [finished_run(head, per_image_scores(mean, 0) | {"groups": groups}) for head, mean in (("fpn", 0.9), ("bilinear", 0.8))]
    (here,), _ = group_models(runs)
    interval = here.intervals("dice")[0]
    assert interval == mean_interval(here.best.scores().per_image, groups=groups)
    assert interval.num == 4
    (d,) = here.differences_to_best()
    assert d.interval.num == 4
    assert any("4 groups" in note for note in d.notes)


def test_images_without_a_group_stand_for_themselves():
    runs = [finished_run("fpn", per_image_scores(0.9, 0) | {"groups": ["a", "a", *[""] * (len(IMAGES) - 2)]})]
    assert group_models(runs)[0][0].intervals("dice")[0].num == len(IMAGES) - 1
    runs = [finished_run("fpn", per_image_scores(0.9, 0) | {"groups": [""] * len(IMAGES)})]
    assert group_models(runs)[0][0].groups is None


def noisy(num: int) -> list[ModelScores]:
    rng = np.random.default_rng(3)
    return [ModelScores(model=f"m{k}", images=tuple(map(str, range(30))), values=rng.normal(0.9, 0.02, 30)) for k in range(num)]


def test_p_against_the_best_is_adjusted_for_all_pairs():
    models = noisy(6)
    best = max(models, key=lambda one: one.mean).model
    named, picked = (compare_all(models, against=best, picked=one) for one in (False, True))
    every = {frozenset((d.a, d.b)): d for d in compare_all(models)}
    for a, b in zip(named, picked, strict=True):
        assert b.p_adjusted == min(1, 15 * a.p)
        assert a.p_adjusted <= every[frozenset((a.a, a.b))].p_adjusted <= b.p_adjusted


def test_equal_models_are_rarely_significantly_different_from_the_best():
    """Twelve equal models, 200 worlds: against the picked best, Holm over its own eleven pairs would be wrong far more often than 5 %."""
    rng, wrong, naive = np.random.default_rng(0), 0, 0
    images = tuple(map(str, range(20)))
    for _ in range(200):
        models = [ModelScores(model=f"m{k}", images=images, values=rng.normal(0.9, 0.02, 20)) for k in range(12)]
        best = max(models, key=lambda one: one.mean).model
        wrong += any(d.better for d in compare_all(models, against=best, picked=True, resamples=199))
        naive += any(d.better for d in compare_all(models, against=best, resamples=199))
    assert wrong <= 12
    assert naive > 2 * wrong


def test_the_pairs_of_many_models_are_those_with_the_best(monkeypatch):
    runs = [finished_run(f"h{k}", per_image_scores(0.7 + k / 50, k)) for k in range(5)]
    (here,), _ = group_models(runs)
    assert len(here.differences()) == 10
    monkeypatch.setattr(model_groups, "MAX_MODELS_ALL_PAIRS", 3)
    (here,), _ = group_models(runs)
    found = here.differences()
    assert len(found) == 4
    assert {d.num_tests for d in found} == {10}
    assert {d.b for d in here.differences_to_best()} == {here.best.name}


def test_winners_are_few_and_exclude_clearly_worse_models():
    few = IMAGES[:4]  # so few that no test can decide
    runs = [
        finished_run(head, per_image_scores(mean, seed, few)) for seed, (head, mean) in enumerate((("a", 0.9), ("b", 0.9003), ("c", 0.3)))
    ]
    (here,), _ = group_models(runs)
    assert all(d.better is None for d in here.differences_to_best())
    assert "uni · c" not in [model.name for model in here.tied_winners()]
    assert here.tied_winners() == [here.best]


def test_winners_are_the_best_and_those_that_do_not_differ_significantly_in_order_of_rank():
    """The second differs from the best by little and often: its interval excludes 0, and its adjusted p is above 0.05."""
    rng = np.random.default_rng(9)
    base = rng.uniform(0.85, 0.9, len(IMAGES))
    steps = {"a": 0.0, "b": rng.normal(-0.001, 0.0015, len(IMAGES)), "c": rng.normal(-0.003, 0.02, len(IMAGES)), "d": -0.3}
    runs = [finished_run(head, per_image_scores(0.9, 0) | {"dice": (base + step).tolist()}) for head, step in steps.items()]
    (here,), _ = group_models(runs)
    second, third, last = here.differences_to_best()
    assert second.interval.excludes_zero
    assert (second.better, third.better, last.better) == (None, None, "uni · a")
    assert [model.name for model in here.tied_winners()] == ["uni · a", "uni · b", "uni · c"]
    assert [model.name for model in here.tied_winners(most=2)] == ["uni · a", "uni · b"]
