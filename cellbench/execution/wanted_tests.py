"""Which further test sets and perturbed images an experiment asks for, and which of them a finished run lacks. Needs no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping

from cellbench.config.experiment import DataSpec
from cellbench.data.dataset import Dataset
from cellbench.data.transforms import perturbations
from cellbench.tracking.schema import TESTED, RunRecord


def wanted_tests(spec: DataSpec, dataset: Dataset) -> dict[str, str]:
    """The tests that an experiment asks for beside the main one, each with what identifies it. Empty where there are none."""
    sets = {one.name: one.digest for one in dataset.further}
    return sets | {one.name: f"v{perturbations.VERSION}" for one in perturbations.perturbations(spec.perturbations)}


def describe_tests(spec: DataSpec, dataset: Dataset) -> str:
    """What :func:`wanted_tests` holds, in words."""
    sets = [f"{one.name} ({len(one.test)} images)" for one in dataset.further]
    return " and ".join([*sets, *([f"images perturbed by {', '.join(spec.perturbations)}"] if spec.perturb else [])])


def missing_tests(run: RunRecord, wanted: Mapping[str, str]) -> dict[str, str]:
    """Those that a run lacks, or has of other images."""
    known = tested(run)
    return {name: identity for name, identity in wanted.items() if known.get(name) != identity}


def tested(run: RunRecord) -> dict[str, str]:
    """The tests that a run's tag names; none where somebody edited it."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(run.tags.get(TESTED, "{}"))
        return found if isinstance(found, dict) else {}
    return {}
