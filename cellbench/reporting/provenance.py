"""What a report says of itself: the data, the runs that are not in it, what its words mean, and how it was made."""

from __future__ import annotations

from typing import Any

from cellbench.reporting import html, leaderboard
from cellbench.reporting.collect import ExperimentResults
from cellbench.statistics.bootstrap import FEWEST, ROUGH_BELOW
from cellbench.tracking.client import command_line
from cellbench.tracking.schema import WEIGHTS


def describe_data(evidence: ExperimentResults, known: dict[str, Any]) -> str:
    """Of the first test set, which the verdict is about."""
    told = known.get("dataset", {})
    first = evidence.sets[0]
    return html.render_facts(
        [
            ("data", first.data),
            ("classes", ", ".join(first.models[0].runs[0].told.get("classes", []))),
            ("digest", first.digest),
            ("folds", f"{first.num_folds}; each image is tested once" if first.num_folds else ""),
            ("groups", f"{len(set(first.groups))} for {len(first.images)} test images" if first.groups is not None else ""),
            ("read from", told.get("root", "")),
            ("notes", " ".join(told.get("notes", []))),
        ]
    )


def describe_missing_runs(evidence: ExperimentResults) -> str:
    lines = [
        [name, kind, reason] for kind, runs in (("skipped", evidence.skipped), ("failed", evidence.failed)) for name, reason in runs.items()
    ]
    return (
        html.render_table(("run", "what", "because"), lines[: html.MOST_LINES], text=(2,))
        + html.rows_not_shown(len(lines))
        + html.render_paragraphs(evidence.left_out)
    )


def glossary(evidence: ExperimentResults) -> list[str]:
    first = evidence.sets[0]
    told_by = first.models[0].runs[0].told
    unit = "images" if first.groups is None else "groups of images"
    correction = "Holm" if len(first.models) <= leaderboard.ALL_PAIRS else "Bonferroni"
    out = [
        "Dice is pooled over all pixels of all test images; Dice/image is the mean of each image's own Dice, and what intervals and tests are "
        f"about. Intervals are 95 % BCa bootstrap intervals over {unit}; fewer than {FEWEST} {unit} give none, fewer than {ROUGH_BELOW} a rough "
        f"one, likely too narrow (≈ in tables, dashed in pictures). Differences are paired by image and tested by Wilcoxon's signed-rank "
        f"test over {unit}; p is adjusted for every pair of models ({correction}), because the best was picked by these same scores. The "
        "interval of a difference is of that pair alone. 'For certain' and 'better' mean: adjusted p below 0.05, the interval excludes 0, and "
        "mean and ranks point the same way. The effect is the rank-biserial correlation, from -1 to 1. Seeds are averaged per image first: "
        "they are repeats, not images. All of this speaks of images like these and of these training runs: another laboratory's stain, or "
        "another seed where only one was run, may answer otherwise.",
    ]
    if first.num_folds:
        out.append(
            f"The data was cut into {told_by['num_folds']} folds, of which {first.num_folds} were tested: each of their images once, by the run "
            "that had not learned from it, and the folds of one seed make one row of scores. The folds' training images overlap, so that p is "
            "optimistic; 'p over folds' is the corrected resampled t-test (Nadeau and Bengio 2003), which allows for that."
        )
    if first.groups is not None:
        out.append(
            f"Images come in groups ({len(set(first.groups))} of them): a group is resampled and ranked as one, since its images are alike."
        )
    if "nsd" in told_by:
        numbered = any(told_by.get("cells_numbered", []))
        cells = "the mask's own numbers" if numbered else "connected regions (neighbours beside, not diagonal)"
        area = min(told_by["min_area_px"])
        saddle_ratios = sorted({f"{saddle_ratio:g}" for model in first.models for run in model.runs if (saddle_ratio := run.told.get("separation_saddle_ratio"))})
        parted = (
            f", and predicted cells that touch are parted by a watershed tuned on validation images (saddle_ratios {', '.join(saddle_ratios)})"
            if saddle_ratios
            else ""
        )
        out.append(
            f"NSD: the share of both outlines' pixels within {told_by['tolerance_px']:g} px of the other outline. Single cells are {cells} of at "
            f"least {area} px{parted}; two match where they share more than half of their union. AP50 is TP / (TP + FP + FN) at that threshold, PQ "
            "panoptic quality. Found: matched so. Merged: not found, and mostly inside a predicted cell that holds another true cell too. Split: not "
            "found, and two or more predicted cells lie mostly inside it. Missed: the other true cells. Extra: predicted cells without a match."
        )
    out.append(
        "A class in neither truth nor prediction of an image has no score there, and an image without any is left out of means: finding nothing "
        "where nothing is would otherwise count as 1. In a difference, an image without a cell counts where at least one of the two models found "
        "something: 0 for that one, 1 for the other. The older rule, 1 for nothing in both, is in MLflow under names that end in _empty1."
    )
    return out


def describe_environment(evidence: ExperimentResults, known: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())
    runs = [run.stored for here in evidence.sets for model in here.models for run in model.runs]
    tags = max(runs, key=lambda run: run.start_s).tags
    machines = sorted({run.tags.get("cellbench.machine", "") for run in runs} - {""})
    weights = {run.params.get("backbone", ""): told for run in runs if (told := run.tags.get(WEIGHTS))}
    out = html.render_facts(
        [
            ("command", known.get("command", "not recorded")),
            ("machine", known.get("machine", "") or ", ".join(machines)),
            ("versions", versions or "not recorded"),
            ("weights", ", ".join(f"{name} {told}" for name, told in sorted(weights.items()))),
            ("code", tags.get("mlflow.source.git.commit", "")),
            ("page made by", command_line()),
        ]
    )
    out += html.render_code(known.get("experiment", ""))
    lines = [
        [m.name, str(run.seed), run.stored.run_id, run.stored.fingerprint]
        for here in evidence.sets
        for m in here.models
        for run in m.runs
    ]  # fmt: skip
    return (
        out + html.render_table(("model", "seed", "MLflow run", "fingerprint"), lines[: html.MOST_LINES]) + html.rows_not_shown(len(lines))
    )
