"""Groups finished runs into models and test sets (:mod:`cellbench.reporting.model_groups`), and names the models by what distinguishes them."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

from cellbench.config.run import RUN_KEYS
from cellbench.files import to_nfc
from cellbench.reporting.model_groups import REPEATS, FinishedRun, ModelGroup, TestSet
from cellbench.statistics.bootstrap import unit_labels
from cellbench.tracking.schema import ENSEMBLE, EXTERNAL, LIMIT


def group_models(runs: Iterable[FinishedRun], started_s: Mapping[str, float] | None = None) -> tuple[list[TestSet], list[str]]:
    """Returns the test sets, and sentences about runs that are left out because folds are missing.

    Test sets of all data come before those with ``--limit``, the newest first. ``started_s``: last start of a grid, by data digest.
    """
    by_test_set: dict[str, list[FinishedRun]] = {}
    for run in runs:
        by_test_set.setdefault(run.test_set_key, []).append(run)
    sets, left_out = [], []
    for members in by_test_set.values():
        kept, sentences = _with_all_folds(members)
        left_out += sentences
        if kept:
            sets.append(_test_set(kept))
    sets = [replace(one, last_s=max(one.last_s, (started_s or {}).get(one.digest, 0.0))) for one in sets]
    return sorted(sets, key=lambda one: (bool(one.limit), -one.last_s)), left_out


def _with_all_folds(runs: list[FinishedRun]) -> tuple[list[FinishedRun], list[str]]:
    """Leaves out seeds that lack a fold, because they have fewer images than the others."""
    if runs[0].fold is None:
        return runs, []
    folds = {run.fold for run in runs}  # a user may run only some folds
    seeds: dict[tuple[Hashable, ...], list[FinishedRun]] = {}
    for run in runs:
        seeds.setdefault((run.settings, run.seed), []).append(run)
    kept, left_out = [], []
    for members in seeds.values():
        if missing := sorted(str(fold) for fold in folds - {run.fold for run in members}):
            name = _base_name(dict(members[0].record.params))
            which = f"folds {', '.join(missing)} are" if len(missing) > 1 else f"fold {missing[0]} is"
            left_out.append(f"{name}, seed {members[0].seed}, is left out: {which} missing.")
        else:
            kept += members
    return kept, left_out


def _test_set(runs: list[FinishedRun]) -> TestSet:
    groups: dict[str, Hashable] = {}
    for run in sorted(runs, key=lambda run: run.record.start_s):  # the newest run that knows an image's group decides
        pairs = zip(run.per_image["images"], run.per_image.get("groups") or (), strict=False)
        groups |= {image: group for image, group in pairs if group}
    models = tuple(sorted(_models(runs, groups), key=ModelGroup.sort_key))
    first = models[0]
    return TestSet(
        dataset=runs[0].record.params.get("dataset", "?"),
        digest=runs[0].per_image["dataset" if first.folds is None else "pool"],
        images=first.images,
        models=models,
        groups=first.groups,
        num_folds=len(set(first.folds or ())),
        num_images=next((sizes for run in runs if (sizes := run.per_image.get("num_images"))), {}),
        limit=next((limit for run in runs if (limit := run.record.tags.get(LIMIT))), ""),
        last_s=max(run.record.last_s for run in runs),
    )


def _models(runs: Sequence[FinishedRun], groups: Mapping[str, Hashable]) -> list[ModelGroup]:
    """Runs grouped by equal settings and named by the settings that vary."""
    together: dict[tuple[tuple[str, str], ...], list[FinishedRun]] = {}
    for run in runs:
        together.setdefault(run.settings, []).append(run)
    settings = [dict(key) for key in together]
    names = [_base_name(one) for one in settings]
    out = []
    for mine, name, members in zip(settings, names, together.values(), strict=True):
        trained = _has_head(mine)
        rivals = [one for one, other in zip(settings, names, strict=True) if other == name or (trained and _has_head(one))]
        # Options of a head are compared only within this head, because other heads do not have them.
        own = [one for one, other in zip(settings, names, strict=True) if other == name]
        varied = [
            key for key in (*RUN_KEYS, "precision") if key not in (*REPEATS, "ensemble") and len({one.get(key) for one in rivals}) > 1
        ]
        varied += sorted({key for one in own for key in one if "." in key and len({other.get(key) for other in own}) > 1})
        model = ModelGroup(
            name=" · ".join([name, *(f"{key} {mine.get(key, '?')}" for key in varied), *_ensemble_name(mine)]),
            backbone=mine["backbone"],
            head=mine["head"],
            baseline=not trained and ENSEMBLE not in mine,
            plain=len(own) == 1 and ENSEMBLE not in mine,
            runs=tuple(sorted(members, key=lambda run: (run.seed, run.fold or 0))),
        )
        if groups:
            model = replace(model, groups=unit_labels(model.images, [groups.get(image, "") for image in model.images]))
        out.append(model)
    return out


def _ensemble_name(params: dict[str, str]) -> list[str]:
    seeds = params.get("ensemble", "none")
    return [] if seeds == "none" else [f"ensemble of seeds {seeds}"]


def _has_head(params: Mapping[str, str]) -> bool:
    return params["baseline"] == "none" and EXTERNAL not in params and ENSEMBLE not in params


def _base_name(params: dict[str, str]) -> str:
    if name := params.get(EXTERNAL, params.get(ENSEMBLE)):
        return name
    for name in ("backbone", "head", "baseline"):
        params.setdefault(name, "none")
    return params["baseline"] if params["baseline"] != "none" else f"{params['backbone']} · {params['head']}"


def name_words(name: str) -> list[str]:
    """The words of a name, whatever separates them.

    >>> name_words("ViT-tiny · detail · seed 0") == name_words("vit-tiny/detail/seed 0")
    True
    """
    return re.split(r"[\s·/,|]+", to_nfc(name).casefold().removesuffix("(baseline)").removesuffix("(external)").strip())
