"""The sections of a report on the data, the runs without a result, the glossary and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cellbench.metrics import catalog
from cellbench.reporting.collect import ExperimentResults
from cellbench.reporting.model_groups import MAX_MODELS_ALL_PAIRS
from cellbench.reporting.report_data import Block, Code, Facts, Table, Text
from cellbench.statistics.bootstrap import FEWEST, ROUGH_BELOW
from cellbench.tracking.client import command_line
from cellbench.tracking.schema import MACHINE, WEIGHTS


def data_facts(results: ExperimentResults) -> Facts:
    """The data of the first test set, which the verdict refers to."""
    first, dataset = results.sets[0], results.request.dataset
    return Facts(
        [
            ("data", first.description),
            ("classes", ", ".join(first.models[0].classes)),
            ("digest", first.digest),
            ("folds", f"{first.num_folds}; each image is tested once" if first.num_folds else ""),
            ("groups", f"{len(set(first.groups))} for {len(first.images)} test images" if first.groups is not None else ""),
            ("read from", dataset.root),
            ("notes", "; ".join(dataset.notes)),
        ]
    )


def missing_runs(results: ExperimentResults) -> list[Block]:
    rows = [[name, "skipped", reason] for name, reason in results.skipped.items()]
    rows += [[name, "failed", reason] for name, reason in results.failed.items()]
    blocks: list[Block] = [Table(headings=("run", "status", "reason"), rows=rows, sentence_columns=(2,))] if rows else []
    return blocks + ([Text(results.left_out)] if results.left_out else [])


def glossary(results: ExperimentResults) -> list[Block]:
    """How models are compared, and what the metrics mean."""
    first = results.sets[0]
    record = first.models[0].runs[0].per_image
    unit = "images" if first.groups is None else "groups of images"
    correction = "Holm" if len(first.models) <= MAX_MODELS_ALL_PAIRS else "Bonferroni"
    out = [
        "Dice is pooled over all pixels of all test images. Dice/image is the mean of each image's own Dice; intervals and tests are about it. "
        f"Intervals are 95 % BCa bootstrap intervals over {unit}. Fewer than {FEWEST} {unit} give no interval, fewer than {ROUGH_BELOW} a rough "
        "one, likely too narrow (≈ in tables, dashed in figures).",
        f"Differences are paired by image and tested by Wilcoxon's signed-rank test over {unit}. p is adjusted for every pair of models "
        f"({correction}), because the best was picked by these same scores. The interval of a difference is of that pair alone. A difference is "
        "called significant where the adjusted p is below 0.05, the interval excludes 0, and mean and ranks have the same sign. The effect is "
        "the rank-biserial correlation, from -1 to 1. Seeds are averaged per image first: they are repeats, not images. The conclusions hold for "
        "images like these and for these training runs: another laboratory's stain, or another seed where only one was run, may give another result.",
    ]
    if first.num_folds:
        out.append(
            f"The data was cut into {record['num_folds']} folds, of which {first.num_folds} were tested. Each of their images was tested once, by "
            "the run that was not trained on it, and the folds of one seed make one row of scores. The training images of the folds overlap, so p "
            "is optimistic; 'p over folds' is the corrected resampled t-test (Nadeau and Bengio 2003), which allows for that."
        )
    if first.groups is not None:
        out.append(
            f"Images come in {len(set(first.groups))} groups. A group is resampled and ranked as one unit, since its images are alike."
        )
    if "nsd" in record:
        numbered = any(record.get("cells_numbered", []))
        cells = "the mask's own numbers" if numbered else "connected regions (4-neighbours)"
        if cut_px := record.get("cut_px"):
            cells = f"the mask's regions, lines of up to {cut_px} px between them included,"
        ways = sorted({way for model in first.models for run in model.runs if (way := _separation(run.per_image)) != "connected regions"})
        separated = f" Predicted cells that touch are separated as tuned on validation images: {'; '.join(ways)}." if ways else ""
        out.append(
            f"The tolerance of NSD is {record['tolerance_px']:g} px. Single cells are {cells} of at least {min(record['min_area_px'])} px."
            f"{separated} A true and a predicted cell match where their IoU is above 0.5. Found, merged, split and missed cells exclude each other."
        )
    out.append(
        "A class in neither truth nor prediction of an image has no score there, and an image without any score is left out of means: otherwise "
        "predicting nothing where nothing is would count as 1. In a difference, an image without a cell counts where at least one of the two models "
        "predicts a cell: 0 for that one, 1 for the other. The older rule, 1 where both have nothing, is in MLflow under names that end in _empty1."
    )
    own = first.own_metrics
    keys = {metric.key: metric for metric in (*catalog.leaderboard(own), *first.compared_metrics(), *catalog.counts())}
    return [Text(out), Facts([(metric.label, metric.meaning) for metric in keys.values()])]


def _separation(record: Mapping[str, Any]) -> str:
    """How a run's cells were found; runs before other methods stored the watershed's ratio alone."""
    ratio = record.get("separation_saddle_ratio")
    return str(record.get("separation") or (f"watershed, saddle_ratio {ratio:g}" if ratio else "connected regions"))


def environment(results: ExperimentResults) -> list[Block]:
    """Command, machine, versions, the experiment file and every run."""
    request = results.request
    models = [model for here in results.sets for model in here.models]
    runs = [run.record for model in models for run in model.runs]
    newest = max(runs, key=lambda run: run.start_s)
    machines = sorted({run.tags.get(MACHINE, "") for run in runs} - {""})
    weights = {run.params.get("backbone", ""): digest for run in runs if (digest := run.tags.get(WEIGHTS))}
    facts = Facts(
        [
            ("command", request.command or "not recorded"),
            ("machine", request.machine or ", ".join(machines)),
            ("versions", ", ".join(f"{name} {version}" for name, version in request.versions.items()) or "not recorded"),
            ("weights", ", ".join(f"{name} {digest}" for name, digest in sorted(weights.items()))),
            ("code", newest.tags.get("mlflow.source.git.commit", "")),
            ("page made by", command_line()),
        ]
    )
    rows = [[model.name, str(run.seed), run.record.run_id, run.record.fingerprint] for model in models for run in model.runs]
    experiment = [Code(request.experiment)] if request.experiment else []
    return [facts, *experiment, Table(headings=("model", "seed", "MLflow run", "fingerprint"), rows=rows)]
