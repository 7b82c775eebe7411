"""What a finished run has stored, read back to test it on further images."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cellbench.errors import CellbenchError
from cellbench.execution.shift_tests import FinishedRunToTest
from cellbench.metrics.calibration import Calibration
from cellbench.metrics.separation import CONNECTED


@pytest.fixture
def run():
    return FinishedRunToTest(resolved=None, record=SimpleNamespace(name="a run"), lacks={})


@pytest.mark.parametrize("stored", [b"{", b"[1]", b'{"unknown": 1}', b"\xff"])
def test_a_damaged_record_is_named(run, stored):
    tracker = SimpleNamespace(artifact=lambda *_: stored)
    with pytest.raises(CellbenchError, match=r"'a run': its separation\.json is damaged"):
        run.separation(tracker)
    with pytest.raises(CellbenchError, match=r"'a run': its calibration\.json is damaged"):
        run.calibration(tracker)


def test_a_run_of_an_older_version_has_no_records(run):
    tracker = SimpleNamespace(artifact=lambda *_: None)
    assert run.separation(tracker) == CONNECTED
    assert run.calibration(tracker) == Calibration()
