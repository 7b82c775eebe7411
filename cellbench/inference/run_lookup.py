"""Which run a person means, and the run itself from MLflow: a run id, a run's name, ``best``, or ``best:EXPERIMENT``."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from cellbench.config.experiment import Experiment, expand
from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.data.transforms.framing import Framing
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.errors import CellbenchError, unknown_name
from cellbench.files import to_nfc
from cellbench.inference.trained_run import TrainedRun
from cellbench.metrics.separation import CONNECTED, SeparationParams
from cellbench.reporting import verdict
from cellbench.reporting.collect import collect_runs
from cellbench.reporting.model_groups import describe_limit, describe_sizes
from cellbench.tracking import sqlite_store
from cellbench.tracking.schema import EVALUATION, LIMIT, SEEN, WEIGHTS, RunRecord
from cellbench.tracking.tracker import Tracker, all_experiments, experiment_of, newest_experiment


def find_run(asked: str) -> tuple[Tracker, RunRecord, str]:
    """The run that ``asked`` means, its experiment, and how it was chosen where several could be meant, in words.

    ``best`` is the report's best model of the experiment with the newest finished run, ``best:EXPERIMENT`` that of a named one: on the newest
    whole test set, and of the model's seeds and folds the one with the best validation Dice. Of several runs of one name the newest finished
    one is taken. Runs on a part of the data (``--limit``) come after those on the whole. Raises CellbenchError.
    """
    sqlite_store.require_store()
    if asked == "best" or asked.startswith("best:"):
        name = asked.removeprefix("best").removeprefix(":") or newest_experiment(whole=True)
        if not name:
            raise CellbenchError(
                "no experiment of MLflow's store here has a finished run, so there is no best. `cellbench grid` makes some."
            )
        tracker = Tracker(name, make=False)
        sets = collect_runs([tracker]).sets
        best = sets[0].best
        rule = verdict.describe_ranking_rule(sets[0]) or "the only model of its test set"
        said = [f"The best of '{name}', {rule}."]
        if len(best.runs) > 1:
            said.append(f"Of its {len(best.runs)} runs the one with the best validation Dice is used.")
        if ":" not in asked and (last := newest_experiment()) != name:
            said.append(f"Newer runs, of '{last}', are on a part of their data and are not considered.")
        return tracker, best.chosen.record, " ".join((*said, *verdict.describe_test_sets(sets)))
    if (name := experiment_of(asked)) is not None:
        tracker = Tracker(name, make=False)
        return tracker, next(run for run in tracker.stored() if run.run_id == asked), ""
    found, names = [], set()
    for name in all_experiments():
        tracker = Tracker(name, make=False)
        for run in tracker.stored():
            if run.fingerprint and not run.is_parent:
                names.add(run.name)
                if to_nfc(run.name) == to_nfc(asked):
                    found.append((run.status == "finished", LIMIT not in run.tags, run.start_s, tracker, run))
    if not found:
        raise unknown_name("run", asked, sorted(names)[:12])
    *_, tracker, run = max(found, key=lambda one: one[:3])
    whole = " on whole data" if any(LIMIT in one.tags for *_, one in found) and LIMIT not in run.tags else ""
    said = f"{len(found)} runs have this name; this is the newest finished one{whole}." if len(found) > 1 else ""
    return tracker, run, said


def open_run(tracker: Tracker, stored: RunRecord, registry: Registry, chosen: str = "") -> TrainedRun:
    """The run's record; ``chosen``: how it was chosen, as :func:`find_run` says.

    Raises CellbenchError for one that is not finished, is no model, or has lost what it left."""
    if stored.tags.get("cellbench.kind") == EVALUATION:
        raise CellbenchError(f"'{stored.name}' is an evaluation of '{stored.params.get('evaluated', 'a run')}'. Name that run.")
    if stored.is_parent:
        raise CellbenchError(f"'{stored.name}' is the parent of other runs, not a model. Name one of its runs, or best:{tracker.name}.")
    if stored.status != "finished":
        why = f" ({stored.reason[:200]})" if stored.reason else ""
        raise CellbenchError(
            f"'{stored.name}' is {stored.status or 'not a run of cellbench'}{why}, so it left no model. Name a finished run, or best."
        )
    config, told = _text(tracker, stored, "config.toml"), json.loads(_text(tracker, stored, "per_image.json"))
    run = _run_of(config, registry)
    prepared = tracker.artifact(stored, "preparation.json")
    if prepared is None and run.normalise != "none" and run.backbone is not None:
        raise CellbenchError(f"'{stored.name}' normalises stains, but has lost its preparation.json in MLflow. Run it again.")
    separation = tracker.artifact(stored, "separation.json")
    seen = tracker.artifact(stored, SEEN)
    data = tracker.artifact(stored, "head.safetensors")
    learns = run.baseline is None or registry.baseline(run.baseline).trained
    if data is None and learns:
        raise CellbenchError(f"'{stored.name}' has lost its head.safetensors in MLflow, and there is no model without it. Run it again.")
    return TrainedRun(
        name=stored.name,
        run=run,
        classes=tuple(told["classes"]),
        preparation=Preparation(framing=Framing.of(run)) if prepared is None else Preparation.of(json.loads(prepared)),
        weights=load_tensors(data, stored.name) if data is not None else {},
        separation=SeparationParams(**json.loads(separation)) if separation is not None else CONNECTED,
        fingerprint=stored.fingerprint,
        backbone_digest=stored.tags.get(WEIGHTS, ""),
        dataset_digest=str(told["dataset"]),
        seen=json.loads(seen) if seen is not None else None,
        run_id=stored.run_id,
        experiment=tracker.name,
        config=config,
        data=_data(stored, told),
        chosen=chosen,
    )


def _data(stored: RunRecord, told: dict[str, Any]) -> str:
    counted = describe_sizes(told.get("num_images", {})) or f"{len(told['images'])} test images"
    fold = f", fold {told['fold']} of {told['num_folds']}" if "fold" in told else ""
    return f"{stored.params.get('dataset', '?')}, {counted}{fold}{describe_limit(stored.tags.get(LIMIT, ''))}"


def load_tensors(data: bytes, name: str) -> dict[str, Any]:
    """The tensors of a safetensors file's bytes. Raises CellbenchError where it is damaged."""
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CellbenchError(f"'{name}': its head.safetensors is damaged ({error}). Run it again.") from None


def _text(tracker: Tracker, stored: RunRecord, name: str) -> str:
    data = tracker.artifact(stored, name)
    if data is None:
        raise CellbenchError(f"'{stored.name}' has lost its {name} in MLflow, so it cannot be used. Run it again.")
    return data.decode("utf-8")


def _run_of(config: str, registry: Registry) -> RunSpec:
    """The one run that a run's ``config.toml`` asks for."""
    runs = expand(Experiment.of(tomllib.loads(config), "config.toml"), "config.toml")
    return registry.complete(runs[0])
