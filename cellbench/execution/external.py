"""Scores the masks of another tool on an experiment's own test images, as a finished run in MLflow that stands beside the experiment's runs.

The run has the kind ``external``: its per-image scores are those of any other run, so leaderboard, paired tests, figures and report need nothing else,
and it has no model, so ``best``, ``predict`` and ``export`` leave it out. With folds it is one run a fold: each image is a test image once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellbench.config.experiment import Experiment
from cellbench.config.registry import Registry
from cellbench.config.run import NUMERICS_VERSION
from cellbench.console import progress_bar
from cellbench.data.count_truth import CountTruth, match_classes
from cellbench.data.dataset import Dataset
from cellbench.data.external_masks import ExternalMasks, find_masks, named_classes
from cellbench.data.image_cache import ImageCache
from cellbench.data.loading import open_folds, pool_folds
from cellbench.errors import CellbenchError, quote_name
from cellbench.execution import artifacts
from cellbench.execution.artifacts import EvaluationResult
from cellbench.files import facts_digest
from cellbench.metrics import catalog
from cellbench.metrics.counting import CountRow
from cellbench.metrics.instances import MIN_AREA_PX, connected_instances, numbered_instances
from cellbench.reporting.collect import collect_runs
from cellbench.reporting.counts import count_metrics
from cellbench.reporting.model_groups import TestSet
from cellbench.temporary import TemporaryFolder
from cellbench.tracking.schema import EXTERNAL, LIMIT, NO_MODEL
from cellbench.tracking.tracker import Tracker
from cellbench.training.evaluator import CohortEvaluator
from cellbench.training.segmented_image import SegmentedImage

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TestImages:
    """The test images of an experiment."""

    __test__ = False  # not pytest's

    experiment: Experiment
    datasets: Sequence[Dataset]
    """One, or one per fold."""
    limit: str = ""

    @property
    def num_folds(self) -> int:
        return self.experiment.data.folds or 0


def open_test_images(tracker: Tracker, registry: Registry, data: Path | None) -> TestImages:
    """The test images that the runs of an experiment were tested on: of the first test set of its report whose data lies at ``data``.

    ``data``: by default where the data lay when the runs were made. Raises CellbenchError where none of its test sets are images of that folder.
    """
    sets = collect_runs([tracker]).sets
    found: CellbenchError | None = None
    for here in sets:
        try:
            return _of_set(tracker, here, registry, data)
        except CellbenchError as error:
            found = found or error
    assert found is not None  # there is a set
    raise found


def _of_set(tracker: Tracker, here: TestSet, registry: Registry, data: Path | None) -> TestImages:
    run = here.best_own.runs[0].record
    text = tracker.artifact(run, "config.toml")
    if text is None:
        raise CellbenchError(f"'{run.name}': its config.toml is missing in MLflow, so its test images are not known. Run it again.")
    experiment = Experiment.of_text(text, f"'{run.name}': its config.toml in MLflow")
    if data is None and not registry.dataset(experiment.dataset).draw:
        source = tracker.data_source(run)
        if not source or not Path(source).exists():
            raise CellbenchError(f"'{tracker.name}': its data{f', {source},' if source else ''} is not there any more. Give --data DIR.")
        data = Path(source)
    try:
        datasets = open_folds(experiment, registry, data)
    except CellbenchError as error:
        raise CellbenchError(
            f"--data {data}, as data of '{tracker.name}' ({here.description}): {error} --experiment names another."
        ) from None
    if pool_folds(datasets) != here.digest:
        raise CellbenchError(
            f"--data {data}: its images, masks or splits are not those that '{tracker.name}' was tested on ({here.description}). "
            "Models are compared on the same test images only: name that folder, or another experiment."
        )
    return TestImages(experiment=experiment, datasets=datasets, limit=run.tags.get(LIMIT, ""))


def score_masks(
    name: str, where: Path, tested: TestImages, tracker: Tracker, registry: Registry, say: Say
) -> tuple[list[str], list[CountRow]]:
    """Scores the masks at ``where`` and logs them as runs called ``name``; returns the ids of the runs, and all counts. Raises CellbenchError."""
    samples = [sample for dataset in tested.datasets for sample in dataset.test]
    masks = find_masks(where, tested.datasets[0], samples)
    for line in masks.notes:
        say(line)
    digest = masks.digest()
    results = [_scored(dataset, masks, registry) for dataset in tested.datasets]  # all folds before any is logged: one may fail
    ids = [_log(name, where, tested, fold, result, tracker, digest) for fold, result in enumerate(results)]
    return ids, [row for result in results for row in result.evaluation.cells]


def count_masks(name: str, where: Path, truth: CountTruth) -> tuple[list[CountRow], list[str], str]:
    """The cells in the masks at ``where`` beside true counts, notes, and the digest of the masks. Raises CellbenchError."""
    classes = ("background", *(named_classes(where) or ["cell"]))
    dataset = Dataset(name=truth.root.name, classes=classes, values=(), train=(), val=(), test=truth.samples, root=truth.root)
    masks = find_masks(where, dataset, truth.samples)
    counted = match_classes(truth, {k: label for k, label in enumerate(masks.classes) if k}, f"'{name}'")
    rows: list[CountRow] = []
    for sample in progress_bar(truth.samples, total=len(truth.samples), desc="counting", unit="image"):
        found, ids = masks.read(sample)
        cells = connected_instances(found) if ids is None else numbered_instances(ids, found)
        rows += counted.count(truth, sample, cells)
    least = [f"a cell is a connected region of {MIN_AREA_PX} px or more"] if masks.kind in ("binary", "classes") else []
    return rows, [*masks.notes, *least, counted.note], masks.digest()


def _scored(dataset: Dataset, masks: ExternalMasks, registry: Registry) -> EvaluationResult:
    with CohortEvaluator(dataset, 1, own_metrics=catalog.own_metrics(registry), count_cells=True) as evaluator:
        for index, sample in enumerate(progress_bar(dataset.test, total=len(dataset.test), desc="scoring", unit="image")):
            truth, (classes, ids) = dataset.read_mask(sample), masks.read(sample)
            classes[classes == 255] = 0  # the tool left these pixels open
            evaluator.add_image(index, truth, [SegmentedImage(classes=classes)], [ids])
    return EvaluationResult(evaluation=evaluator.evaluations[0], cost={})


def _log(name: str, where: Path, tested: TestImages, fold: int, result: EvaluationResult, tracker: Tracker, digest: str) -> str:
    dataset = tested.datasets[fold]
    key = facts_digest([EXTERNAL, name, dataset.digest, tested.num_folds, digest, NUMERICS_VERSION])
    title = f"{name} · fold {fold}" if tested.num_folds else name
    tags = {"cellbench.kind": EXTERNAL, "model": name, "dataset": dataset.name} | ({LIMIT: tested.limit} if tested.limit else {})
    known = tracker.known(key).get(key)
    with tracker.run(title, key, known=known, tags=tags) as run, TemporaryFolder() as temporary:
        if known is None:
            run.log({}, params={EXTERNAL: name, **NO_MODEL, "fold": fold, "dataset": dataset.name})
            run.log_input(dataset.name, dataset.digest, str(dataset.root), "testing")
        folder = Path(temporary)
        artifacts.write_scores(folder, fold, tested.num_folds, tested.datasets, result)
        (folder / "masks.json").write_text(json.dumps({"folder": str(where.absolute()), "digest": digest}), encoding="utf-8")
        artifacts.write_counts(folder, result.evaluation.cells)
        artifacts.draw_pictures(folder, title, dataset, ImageCache(dataset, "test", 2**28), result)
        run.log_artifacts(folder)
        metrics = artifacts.final_metrics(dataset, result) | count_metrics(result.evaluation.cells)
        run.log(metrics, tags=artifacts.run_tags(title, metrics, "", run.address("figures/worst.png")))
    return run.run_id


def check_name(name: str, tracker: Tracker | None = None) -> str:
    """The name of a tool, for tables. Raises CellbenchError for one that a model of the experiment has, or that names cannot be."""
    plain = name.strip()
    if (
        not plain
        or not plain.isprintable()
        or len(plain) > 60
        or plain.startswith("-")
        or plain.split(":")[0] in ("best", "best-by-validation")
    ):
        raise CellbenchError(f"{quote_name(name)} cannot be the name of a row. Name the tool in up to 60 characters, like cellpose.")
    if tracker is None:
        return plain
    models = {run.tags.get("model", run.name) for run in tracker.stored() if run.fingerprint and not run.is_parent and not run.is_external}
    if plain in models:
        raise CellbenchError(f"'{plain}' is a model of '{tracker.name}' already. Give the masks another name.")
    return plain
