"""Finds a run in MLflow by a run id, the name of a run or model, ``best`` or ``best:EXPERIMENT``, and reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.numpy
import safetensors.torch
from safetensors import SafetensorError

from cellbench.config.base import read_json
from cellbench.config.experiment import Experiment, expand
from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.data.transforms.framing import Framing
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.errors import CellbenchError, first_names, unknown_name
from cellbench.inference.records import (
    CalibrationRecord,
    PreparationRecord,
    ScoresRecord,
    SeenRecord,
    SeparationRecord,
    StoredRecord,
    training_features_of_arrays,
)
from cellbench.inference.trained_run import TrainedRun
from cellbench.metrics.calibration import Calibration
from cellbench.metrics.separation import CONNECTED
from cellbench.metrics.training_features import TrainingFeatures
from cellbench.reporting import verdict
from cellbench.reporting.collect import collect_runs
from cellbench.reporting.grouping import name_words
from cellbench.reporting.model_groups import describe_limit, describe_sizes
from cellbench.tracking import store_address
from cellbench.tracking.schema import CALIBRATION, EVALUATION, LIMIT, MEMBERS, SEEN, TRAINING_FEATURES, WEIGHTS, RunRecord
from cellbench.tracking.store import all_experiments, experiment_of, newest_experiment
from cellbench.tracking.tracker import Tracker

R = TypeVar("R", bound=StoredRecord)

BEST, BEST_BY_VALIDATION = "best", "best-by-validation"


def find_run(asked: str) -> tuple[Tracker, RunRecord, str]:
    """The run that ``asked`` names, its experiment, and how it was chosen among several, in words.

    ``best`` is the best model in the report of the experiment with the newest finished run, ``best:EXPERIMENT`` that of a named one: on the
    newest complete test set, and of the model's seeds and folds the one with the best validation Dice. A model of a leaderboard is named as there,
    or by some of its words where no other model has them; a run by its own name. Separators do not matter: ``uni · fpn``, ``uni fpn`` and
    ``uni/fpn`` are one name. Of several runs of one name, the newest finished one is used. Runs on a part of the data (``--limit``) rank after
    those on all data. ``best-by-validation`` is chosen without the test images. Raises CellbenchError.
    """
    if asked.startswith(("/", "./", "../", "~")):
        raise CellbenchError(
            f"{asked}: there is no such folder. Expected one that `cellbench export` wrote, the name of a model or run, or best."
        )
    store_address.require_store()
    rule, _, name = asked.partition(":")
    if rule in (BEST, BEST_BY_VALIDATION):
        name = name or newest_experiment(whole=True) or ""
        if not name:
            raise CellbenchError(
                "no experiment in MLflow's store has a finished run, so there is no best one. `cellbench grid` trains some."
            )
        tracker = Tracker(name, make=False)
        sets = collect_runs([tracker]).sets
        best = sets[0].best_own if rule == BEST else sets[0].best_by_validation
        if best is None or best.external:
            lacks = "no model that was validated" if best is None else "masks of other tools only, so it has no model"
            raise CellbenchError(f"'{name}' holds {lacks}. `cellbench grid` trains some.")
        how = verdict.describe_ranking_rule(sets[0]) if rule == BEST else "chosen by its validation Dice, without the test images"
        notes = [f"The best of '{name}', {how or 'the only model of its test set'}."]
        if len(best.runs) > 1:
            notes.append(f"Of its {len(best.runs)} runs the one with the best validation Dice is used.")
        if ":" not in asked and (last := newest_experiment()) != name:
            notes.append(f"Newer runs, of '{last}', are on a part of their data and are not considered.")
        return tracker, best.chosen.record, " ".join((*notes, *verdict.describe_test_sets(sets)))
    if (experiment := experiment_of(asked)) is not None:
        tracker = Tracker(experiment, make=False)
        return tracker, next(run for run in tracker.stored() if run.run_id == asked), ""
    found: list[tuple[bool, bool, float, Tracker, RunRecord]] = []
    names: set[str] = set()
    trackers: list[Tracker] = []
    for name in all_experiments():
        tracker = Tracker(name, make=False)
        runs = [run for run in tracker.stored() if run.fingerprint and not run.is_parent]
        names.update(run.tags.get("model", run.name) for run in runs if run.status == "finished")
        found += [
            (run.status == "finished", LIMIT not in run.tags, run.start_s, tracker, run)
            for run in runs
            if name_words(run.name) == name_words(asked)
        ]
        if any(run.status == "finished" for run in runs):
            trackers.append(tracker)
    if not found and (model := _find_model(asked, trackers)) is not None:
        return model
    if not found:
        if asked in all_experiments():
            raise CellbenchError(f"'{asked}' is an experiment. Its best model is best:{asked}.")
        raise unknown_name("model or run", asked, {"best", *names}, all_with="cellbench ui")
    *_, tracker, run = max(found, key=lambda one: one[:3])
    whole = " on all data" if any(LIMIT in one.tags for *_, one in found) and LIMIT not in run.tags else ""
    return tracker, run, f"{len(found)} runs have this name; this is the newest finished one{whole}." if len(found) > 1 else ""


def _find_model(asked: str, trackers: Sequence[Tracker]) -> tuple[Tracker, RunRecord, str] | None:
    """The best run of the model that ``asked`` names in a leaderboard, newest whole test set first; None where there is none.

    Raises CellbenchError where several models have these words.
    """
    wanted = name_words(asked)
    exact, partial = [], []
    for tracker in trackers:
        for here in collect_runs([tracker]).sets:
            for model in here.models:
                one, own = (not here.limit, here.last_s, tracker, model), name_words(model.name)
                if own == wanted:
                    exact.append(one)
                elif set(wanted) <= set(own):
                    partial.append(one)
    found = exact or partial
    names = sorted({model.name for *_, model in found})
    if not found:
        return None
    if len(names) > 1:
        raise CellbenchError(f"'{asked}' may be {first_names(names, 8)}. Name one of these {len(names)}.")
    *_, tracker, model = max(found, key=lambda one: one[:2])
    notes = [f"'{names[0]}' is in {len(found)} leaderboards; this is the newest one."] if len(found) > 1 else []
    if len(model.runs) > 1:
        notes.append(f"Of its {len(model.runs)} runs the one with the best validation Dice is used.")
    return tracker, model.chosen.record, " ".join(notes)


def open_run(tracker: Tracker, stored: RunRecord, registry: Registry, chosen: str = "") -> TrainedRun:
    """The run with its weights; ``chosen``: how :func:`find_run` chose it.

    Raises CellbenchError for one that is not finished, is no model, or has lost its files.
    """
    if stored.tags.get("cellbench.kind") == EVALUATION:
        raise CellbenchError(f"'{stored.name}' is an evaluation of '{stored.params.get('evaluated', 'a run')}'. Name that run.")
    if members := stored.tags.get(MEMBERS):
        raise CellbenchError(
            f"'{stored.name}' is the mean of several models, and only one model can be used at a time. Name one of them: {members}."
        )
    if stored.is_external:
        raise CellbenchError(
            f"'{stored.name}' stands for masks of another tool, so there is no model. Name a model, or best:{tracker.name}."
        )
    if stored.is_parent:
        raise CellbenchError(f"'{stored.name}' is the parent of other runs, not a model. Name one of its runs, or best:{tracker.name}.")
    if stored.status != "finished":
        why = f" ({stored.reason[:200]})" if stored.reason else ""
        raise CellbenchError(
            f"'{stored.name}' is {stored.status or 'not a run of cellbench'}{why}, so it left no model. Name a finished run, or best."
        )
    config = _text(tracker, stored, "config.toml")
    if (results := _read(ScoresRecord, tracker, stored, "per_image.json")) is None:
        raise _missing(stored, "per_image.json")
    run = _run_of(config, registry)
    prepared = _read(PreparationRecord, tracker, stored, "preparation.json")
    if prepared is None and run.normalise != "none" and run.backbone is not None:
        raise CellbenchError(f"'{stored.name}' normalises stains, but its preparation.json is missing in MLflow. Run it again.")
    separation = _read(SeparationRecord, tracker, stored, "separation.json")
    calibration = _read(CalibrationRecord, tracker, stored, CALIBRATION)
    data = tracker.artifact(stored, "head.safetensors")
    learns = run.baseline is None or registry.baseline(run.baseline).trained
    if data is None and learns:
        raise CellbenchError(f"'{stored.name}': its head.safetensors is missing in MLflow, and there is no model without it. Run it again.")
    source = tracker.data_source(stored)
    return TrainedRun(
        name=stored.name,
        run=run,
        classes=results.classes,
        preparation=prepared.preparation() if prepared is not None else Preparation(framing=Framing.of(run)),
        weights=load_tensors(data, stored.name) if data is not None else {},
        separation=separation.separation() if separation is not None else CONNECTED,
        calibration=calibration.calibration() if calibration is not None else Calibration(),
        training_features=read_training_features(tracker, stored),
        fingerprint=stored.fingerprint,
        backbone_digest=stored.tags.get(WEIGHTS, ""),
        dataset_digest=results.dataset,
        seen=read_seen(tracker, stored),
        run_id=stored.run_id,
        experiment=tracker.name,
        config=config,
        data=_data(stored, results, source),
        data_folder=source,
        chosen=chosen,
    )


def read_seen(tracker: Tracker, stored: RunRecord) -> dict[str, Any] | None:
    """The record of a run's training and validation images; None for a run of an older version. Raises CellbenchError where it is damaged."""
    seen = _read(SeenRecord, tracker, stored, SEEN)
    return seen.model_dump() if seen is not None else None


def _data(stored: RunRecord, results: ScoresRecord, source: str) -> str:
    name = stored.params.get("dataset", "?")
    name = f"'{Path(source).name}'" if name == "folder" and source else name
    counted = describe_sizes(results.num_images.model_dump() if results.num_images else {}) or f"{len(results.images)} test images"
    fold = f", fold {results.fold} of {results.num_folds}" if results.fold is not None else ""
    return f"{name}, {counted}{fold}{describe_limit(stored.tags.get(LIMIT, ''))}"


def read_training_features(tracker: Tracker, stored: RunRecord) -> TrainingFeatures | None:
    """How a run's training images look; None for one without a backbone, or of an older version. Raises CellbenchError where it is damaged."""
    data = tracker.artifact(stored, TRAINING_FEATURES)
    if data is None:
        return None
    where = f"'{stored.name}': its {TRAINING_FEATURES} in MLflow"
    try:
        return training_features_of_arrays(safetensors.numpy.load(data), where)
    except SafetensorError as error:
        raise CellbenchError(f"{where}: is damaged ({error}). Run it again.") from None


def load_tensors(data: bytes, name: str) -> dict[str, Any]:
    """The tensors of a safetensors file's bytes. Raises CellbenchError where it is damaged."""
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CellbenchError(f"'{name}': its head.safetensors is damaged ({error}). Run it again.") from None


def _text(tracker: Tracker, stored: RunRecord, name: str) -> str:
    if (data := tracker.artifact(stored, name)) is None:
        raise _missing(stored, name)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise CellbenchError(f"'{stored.name}': its {name} is damaged. Run it again.") from None


def _missing(stored: RunRecord, name: str) -> CellbenchError:
    return CellbenchError(f"'{stored.name}': its {name} is missing in MLflow, so it cannot be used. Run it again.")


def _read(record: type[R], tracker: Tracker, stored: RunRecord, name: str) -> R | None:
    """The record in a run's artifact; None without the artifact. Raises CellbenchError where it is damaged."""
    data = tracker.artifact(stored, name)
    return None if data is None else read_json(record, data, f"'{stored.name}': its {name} in MLflow")


def _run_of(config: str, registry: Registry) -> RunSpec:
    """The run of a run's ``config.toml``."""
    runs = expand(Experiment.of_text(config, "config.toml of this run in MLflow"), "config.toml")
    return registry.complete(runs[0])
