"""Several trained models of an experiment that predict images which none of them was trained on: for faults in masks, and for what to label next.

Runs keep their heads, not their predictions. Each member is a model with one seed; with folds, an image is predicted by the run of the fold that tested
it, and an image of another folder by the first. Untrained baselines predict every image.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellbench import startup
from cellbench.config.registry import Registry
from cellbench.data.audit import seen_images
from cellbench.data.dataset import Sample
from cellbench.errors import CellbenchError, one_line
from cellbench.hardware import Hardware
from cellbench.inference.run_lookup import open_run, read_seen, read_training_features
from cellbench.inference.segmenter import Prediction, Segmenter
from cellbench.metrics.training_features import TrainingFeatures
from cellbench.reporting.collect import collect_runs
from cellbench.reporting.model_groups import FinishedRun, ModelGroup, TestSet
from cellbench.tracking.tracker import Tracker

MOST = 5
"""Models that are asked: more cost more passes of a backbone, and agree ever more."""
NEAR_BEST = 0.05
"""Models whose Dice is lower than that of the best by more are not asked: they know less than the masks."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model of a committee."""

    name: str
    runs: tuple[FinishedRun, ...]
    """Of one seed: one, or one a fold."""


@dataclass(frozen=True, kw_only=True)
class NewImages:
    """Predictions of images without labels."""

    models: Sequence[str]
    """Of each run that predicts."""
    described_by: int | None
    """The place among the predictions of an image whose features are compared with ``training_features``; None: no model has a backbone."""
    training_features: Sequence[TrainingFeatures]
    """Of the training images of each fold."""
    predictions: Iterator[tuple[Sample, list[Prediction] | CellbenchError]]


def choose_members(here: TestSet, asked: Callable[[ModelGroup], bool] = lambda model: True) -> list[Member]:
    """The best models of a test set that may be ``asked``, up to ``MOST``; further seeds of theirs only where there are fewer models."""
    own = [model for model in here.models if not model.external and asked(model)]
    near = [model for model in own if model.scores().mean >= own[0].scores().mean - NEAR_BEST] or own[:1]
    seeds = itertools.zip_longest(*(model.by_seed for model in near))
    found = [(model, runs) for row in seeds for model, runs in zip(near, row, strict=True) if runs]
    return [Member(name=_name(model, runs), runs=tuple(runs)) for model, runs in found[:MOST]]


def _name(model: ModelGroup, runs: Sequence[FinishedRun]) -> str:
    return model.name if len(model.by_seed) == 1 else f"{model.name} · seed {runs[0].seed}"


class Committee:
    """The members of an experiment's newest test set; ``trained``: only models that learn, however well a threshold does."""

    def __init__(
        self,
        tracker: Tracker,
        registry: Registry,
        machine: Hardware,
        weights: Path | None,
        say: Callable[[str], None],
        *,
        trained: bool = False,
    ) -> None:
        self._tracker, self._registry, self._machine, self._weights, self._say = tracker, registry, machine, weights, say
        self.name = tracker.name
        here = collect_runs([tracker]).sets[0]
        self.members = choose_members(here, lambda model: not trained or self._is_trained(model.runs[0]))
        if not self.members and any(not model.external for model in here.models):
            raise CellbenchError(f"'{self.name}' has no trained model, so labels would teach nothing. `cellbench grid` trains some.")
        if not self.members:
            raise CellbenchError(f"'{tracker.name}' holds masks of other tools only, so it has no model. `cellbench grid` trains some.")
        self.classes = tuple(self.members[0].runs[0].per_image["classes"])
        self._compared: dict[str, list[bool]] = {}

    def predict(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, list[Prediction] | CellbenchError]]:
        """Each sample that a member was not trained on, with the predictions of such members; or why the image cannot be read."""
        groups: dict[tuple[str, ...], list[Sample]] = {}
        runs: dict[str, FinishedRun] = {}
        allowed = [self._unseen(member, samples) for member in self.members]
        for sample, some in zip(samples, zip(*allowed, strict=True), strict=True):
            fit = [run for run in some if run is not None]
            runs |= {run.record.run_id: run for run in fit}
            if fit:
                groups.setdefault(tuple(run.record.run_id for run in fit), []).append(sample)
        for ids, together in groups.items():
            yield from self._predictions(self._open([runs[run_id] for run_id in ids]), together)

    def _predictions(
        self, segmenters: Sequence[Segmenter], samples: Sequence[Sample]
    ) -> Iterator[tuple[Sample, list[Prediction] | CellbenchError]]:
        with startup.torch_threads(self._machine.threads):
            streams = [one.predict_each(sample.image for sample in samples) for one in segmenters]
            for sample, found in zip(samples, zip(*streams, strict=True), strict=True):
                failed = next((one for one in found if isinstance(one, CellbenchError)), None)
                yield sample, failed or [one for one in found if isinstance(one, Prediction)]

    def predict_new(self, samples: Sequence[Sample]) -> NewImages:
        """Samples that no member was trained on, predicted by one run of each; where there are fewer than ``MOST`` members, by more of their folds."""
        turned = [member.runs[k % len(member.runs) :] + member.runs[: k % len(member.runs)] for k, member in enumerate(self.members)]
        runs = [run for row in itertools.zip_longest(*turned) for run in row if run is not None]
        segmenters = self._open(runs[:MOST])
        home = {run.record.run_id: member for member in self.members for run in member.runs}
        first = next((k for k, one in enumerate(segmenters) if one.trained.training_features is not None), None)
        of_first = () if first is None else home[segmenters[first].trained.run_id].runs
        training_features = [read_training_features(self._tracker, run.record) for run in of_first]
        return NewImages(
            models=[home[one.trained.run_id].name for one in segmenters],
            described_by=first,
            training_features=[one for one in training_features if one is not None],
            predictions=self._predictions(segmenters, samples),
        )

    def find_new(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that no run of any member was trained or validated on, and those that cannot be read."""
        records = [read_seen(self._tracker, run.record) for member in self.members for run in member.runs if self._is_trained(run)]
        parts = {part: {row[2]: row for one in records if one is not None for row in one[part]} for part in seen_images.PARTS}
        readable = [sample for sample, fit in zip(samples, seen_images.find_readable(samples), strict=True) if fit]
        found = seen_images.match_seen_images({part: [*rows.values()] for part, rows in parts.items()}, readable)
        used = {sample.image for sample, part in zip(readable, found, strict=True) if part}
        return [sample for sample in samples if sample.image not in used]

    def _is_trained(self, run: FinishedRun) -> bool:
        baseline = run.record.params.get("baseline", "none")
        return baseline == "none" or self._registry.baseline(baseline).trained

    def _unseen(self, member: Member, samples: Sequence[Sample]) -> list[FinishedRun | None]:
        """For each sample the first run of a member that was neither trained nor validated on it."""
        out: list[FinishedRun | None] = [None] * len(samples)
        for run in member.runs:
            open_ = [k for k, found in enumerate(out) if found is None]
            for k, fit in zip(open_, self._is_unseen(run, [samples[k] for k in open_]), strict=True):
                out[k] = run if fit else None
        return out

    def _is_unseen(self, run: FinishedRun, samples: Sequence[Sample]) -> list[bool]:
        if not self._is_trained(run):
            return [True] * len(samples)
        tested = run.per_image["images"]
        record = read_seen(self._tracker, run.record)
        if record is None:  # a run of an older version
            return [sample.name in tested for sample in samples]
        key = json.dumps([record, tested, [str(sample.image) for sample in samples]], sort_keys=True)
        if key not in self._compared:  # the runs of a fold have seen the same images
            self._compared[key] = seen_images.find_unseen(record, samples, tested)
        return self._compared[key]

    def _open(self, runs: Sequence[FinishedRun]) -> list[Segmenter]:
        """The runs that can be used here; the model of another one is no member any more, which is said. Raises CellbenchError if there is none."""
        out = []
        for run in runs:
            if not any(run in member.runs for member in self.members):
                continue
            try:
                trained = open_run(self._tracker, run.record, self._registry)
                out.append(Segmenter(trained, self._registry, self._machine, self._weights))
            except CellbenchError as error:
                self.members = [member for member in self.members if run not in member.runs]
                self._say(f"'{run.record.name}' is not asked: {one_line(error)}")
        if not out:
            raise CellbenchError(f"no model of '{self.name}' can be used here. The lines above say why.")
        return out
