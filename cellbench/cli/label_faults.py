"""``check --with EXPERIMENT``: which masks are likely wrong, by models that were not trained on their images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from cellbench import startup
from cellbench.cli.check import Judge
from cellbench.config.options import CheckOptions
from cellbench.config.registry import Registry
from cellbench.console import progress_bar, say
from cellbench.data.audit.image_statistics import SampleFacts
from cellbench.data.audit.label_faults import LabelFault, LabelFaults, find_label_faults, rank_faults, usual_area
from cellbench.data.dataset import Dataset, Sample
from cellbench.errors import CellbenchError
from cellbench.hardware import detect_hardware
from cellbench.inference.committee import Committee
from cellbench.inference.segmenter import Prediction
from cellbench.metrics.instances import merge_parts_into_objects, reference_instances
from cellbench.models.backbones.weights import weights_folder
from cellbench.tracking.tracker import open_experiment


def open_judge(options: CheckOptions) -> Judge:
    """The models of an experiment as judges of masks. Raises CellbenchError where there are none."""
    startup.configure_threads(options.device)
    tracker = open_experiment(options.experiment)
    machine = detect_hardware(options.device, options.precision)
    return partial(_judge, Committee(tracker, Registry(options.registry), machine, weights_folder(options.weights), say))


def _judge(committee: Committee, dataset: Dataset, facts: Sequence[SampleFacts]) -> LabelFaults:
    if dataset.classes != committee.classes and not len(dataset.classes) == len(committee.classes) == 2:
        raise CellbenchError(
            f"--with {committee.name}: its models know the classes {', '.join(committee.classes)}; the masks have {', '.join(dataset.classes)}. "
            "Name an experiment with the same classes."
        )
    fit = {sample: f for sample, f in zip(dataset.train, facts, strict=True) if not f.error and f.size_px == f.mask_px}
    usual_px = usual_area([area for f in fit.values() for area in f.areas_px], fallback=dataset.min_cell_px or 1)
    found: list[tuple[Sample, LabelFault]] = []
    outlines: list[np.ndarray] = []
    num_cells = 0
    for sample, predictions in progress_bar(committee.predict([*fit]), total=len(fit), desc="comparing masks", unit="image"):
        if isinstance(predictions, CellbenchError):
            raise predictions
        faults, scores = _faults(dataset, sample, predictions, usual_area(fit[sample].areas_px, usual_px))
        found += [(sample, fault) for fault in faults]
        outlines.append(scores)
        num_cells += len(fit[sample].areas_px)
    if not outlines:
        raise CellbenchError(
            f"--with {committee.name}: its models were trained or validated on all of these images, so they cannot judge the masks. Run the experiment "
            "by folds (--set data.folds=5), or name other images."
        )
    return LabelFaults(
        found=rank_faults(found, np.concatenate(outlines)),
        classes=dataset.classes,
        experiment=committee.name,
        models=[member.name for member in committee.members],
        num_judged=len(outlines),
        num_images=len(fit),
        num_cells=num_cells,
    )


def _faults(dataset: Dataset, sample: Sample, predictions: Sequence[Prediction], usual_px: float) -> tuple[list[LabelFault], np.ndarray]:
    classes = dataset.read_mask(sample)
    truth, _ = reference_instances(classes, dataset.read_instances(sample), dataset.min_cell_px, owners=dataset.owners)
    votes = [one.mask.view(np.uint8) * 255 if one.probability is None else one.probability for one in predictions]
    found_classes = [merge_parts_into_objects(one.classes, dataset.owners) for one in predictions]
    return find_label_faults(sample.name, truth, classes > 0, votes, found_classes, usual_px)
