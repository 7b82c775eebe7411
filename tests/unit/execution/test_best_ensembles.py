"""Errors of an ensemble of the best models."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from cellbench.config.run import NUMERICS_VERSION
from cellbench.errors import CellbenchError, SystemFault
from cellbench.execution import best_ensembles
from cellbench.execution.claims import Outcome
from cellbench.files import facts_digest
from cellbench.tracking.schema import ENSEMBLE
from cellbench.training.segmented_image import SegmentedImage


@pytest.fixture
def said(monkeypatch):
    """Evaluates the ensemble of one fold, of which nothing can be tested for the error that is given; returns the messages."""

    def evaluate(error: Exception) -> list[str]:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(best_ensembles._Ensemble, "test", fail)
        monkeypatch.setattr(best_ensembles, "choose_members", lambda runs, num: [object()] * num)
        lines: list[str] = []
        experiment = SimpleNamespace(ensemble_best=2, data=SimpleNamespace(folds=0))
        runner = SimpleNamespace(experiment=experiment, tracker=SimpleNamespace(known=lambda *_: {}), say=lines.append)
        best_ensembles.evaluate_best_models(runner, [SimpleNamespace(run=SimpleNamespace(fold=0), fingerprint="f")], Outcome())
        return lines

    return evaluate


@pytest.mark.parametrize("error", [CellbenchError("its head is damaged"), MemoryError("too large")])
def test_an_ensemble_that_cannot_be_tested_is_named(said, error):
    assert said(error) == [f"ensemble of the best 2 models: not tested: {error}"]


def test_a_full_disk_ends_the_grid(said):
    with pytest.raises(SystemFault, match="No space left"):
        said(SystemFault("No space left on device"))


@pytest.fixture
def blended(monkeypatch):
    """The mean prediction of two members with the given targets, for one image of 2 x 3 px, and theirs."""

    def blend(*targets: str) -> tuple[SegmentedImage, list[SegmentedImage]]:
        rng = np.random.default_rng(0)
        found = [
            SegmentedImage(
                classes=np.zeros((2, 3), np.uint8),
                fields=None if target == "cell" else rng.integers(0, 256, (2, 2, 3), np.uint8),
                foreground=rng.integers(0, 256, (1, 2, 3), np.uint8),
            )
            for target in targets
        ]
        members = [(SimpleNamespace(run=SimpleNamespace(targets=target), fingerprint=str(k)), None) for k, target in enumerate(targets)]
        ensemble = best_ensembles._Ensemble(SimpleNamespace(), members, "name", "title", 0)
        vars(ensemble)["_opened"] = [(None, one) for one in found]
        monkeypatch.setattr(best_ensembles, "segment_images", lambda models, *_, **__: iter([(0, models)]))
        ((_, one),) = ensemble._blended("test")
        return one, found

    return blend


def test_the_flows_of_members_that_all_learned_flows_are_averaged(blended):
    one, (first, second) = blended("flows", "flows")
    assert np.abs(one.fields - (first.fields.astype(float) + second.fields) / 2).max() <= 0.5


@pytest.mark.parametrize("targets", [("flows", "hv"), ("flows", "cell"), ("cell", "cell")])
def test_maps_for_cells_of_different_targets_have_no_mean(blended, targets):
    assert blended(*targets)[0].fields is None


@pytest.mark.parametrize(("targets", "is_new"), [("flows", True), ("cell", False)])
def test_an_ensemble_of_an_earlier_version_is_tested_again_where_maps_for_cells_are_averaged_now(targets, is_new):
    members = [(SimpleNamespace(run=SimpleNamespace(targets=targets), fingerprint="f"), None)]
    earlier = facts_digest([ENSEMBLE, NUMERICS_VERSION, ["f"]])
    assert (best_ensembles._Ensemble(SimpleNamespace(), members, "name", "title", 0).fingerprint != earlier) == is_new
