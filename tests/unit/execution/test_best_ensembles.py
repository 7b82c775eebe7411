"""Errors of an ensemble of the best models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cellbench.errors import CellbenchError, SystemFault
from cellbench.execution import best_ensembles
from cellbench.execution.claims import Outcome


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
