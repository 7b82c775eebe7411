"""Who is asked: the best models, further seeds only where models are few, none that is much worse."""

from __future__ import annotations

from finished_runs import finished_run, per_image_scores

from cellbench.inference.committee import MOST, choose_members
from cellbench.reporting.grouping import group_models


def members(means: dict[str, float], seeds: int = 1, folds: int = 0) -> list[tuple[str, int]]:
    runs = []
    for head, mean in means.items():
        for seed in range(seeds):
            if not folds:
                runs.append(finished_run(head, per_image_scores(mean, seed), seed))
            for fold in range(folds):
                images = tuple(f"{fold}-{k}.png" for k in range(4))
                scores = per_image_scores(mean, seed, images) | {"fold": fold, "num_folds": folds, "pool": "p"}
                runs.append(finished_run(head, scores, seed, fold))
    (here,), _ = group_models(runs)
    return [(one.name, len(one.runs)) for one in choose_members(here)]


def test_the_best_models_are_asked_and_much_worse_ones_are_not() -> None:
    heads = {f"head{k}": 0.9 - 0.005 * k for k in range(7)}
    assert members(heads) == [(f"uni · head{k}", 1) for k in range(MOST)]
    assert members({"fpn": 0.9, "detail": 0.86, "bilinear": 0.8}) == [("uni · fpn", 1), ("uni · detail", 1)]


def test_a_few_models_send_more_of_their_seeds_each_with_all_its_folds() -> None:
    found = members({"fpn": 0.9, "detail": 0.88}, seeds=3, folds=2)
    assert found == [
        ("uni · fpn · seed 0", 2),
        ("uni · detail · seed 0", 2),
        ("uni · fpn · seed 1", 2),
        ("uni · detail · seed 1", 2),
        ("uni · fpn · seed 2", 2),
    ]


def test_where_a_threshold_is_far_ahead_the_best_of_those_that_learn_can_still_be_asked() -> None:
    (here,), _ = group_models(
        [finished_run(head, per_image_scores(mean, 0)) for head, mean in {"a": 0.95, "b": 0.6, "c": 0.58, "d": 0.3}.items()]
    )
    assert [one.name for one in choose_members(here)] == ["uni · a"]
    assert [one.name for one in choose_members(here, lambda model: model.name != "uni · a")] == ["uni · b", "uni · c"]
