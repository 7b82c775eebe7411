"""How runs end that have no result, and what becomes of their checkpoints."""

from __future__ import annotations

import contextlib
import os
import time
from types import SimpleNamespace

import pytest

from cellbench.errors import SystemFault, WeightsUnavailable
from cellbench.execution.claims import ActiveRun, Outcome, RunClaims
from cellbench.execution.shift_tests import try_tests
from cellbench.training import checkpoints

EXPERIMENT = "claims"


@pytest.mark.parametrize(("anew", "kept"), [(False, True), (True, False)])
def test_a_failed_run_keeps_its_checkpoint_unless_that_would_fail_again(anew, kept):
    ended: list[str] = []
    run = SimpleNamespace(ended="", key="store run", require_ownership=lambda: None, end=lambda status, reason: ended.append(status))
    one = ActiveRun(resolved=SimpleNamespace(name="a", fingerprint="f" * 16), run=run)
    checkpoints.write_checkpoint(one.checkpoint, {"progress": {"epoch": 1, "ended": ""}})
    claims = RunClaims(tracker=None, parent_id="", datasets=[], limit=None, say=lambda _: None)
    out = Outcome()
    claims.fail(one, "out of memory", out, anew=anew)
    assert ended == ["failed"]
    assert out.failed == {"a": "out of memory"}
    assert one.checkpoint.exists() == kept


def test_the_checkpoint_of_a_run_that_has_ended_is_removed_by_the_next_command(tracker):
    """Its process was killed between the two."""
    with tracker.run("a", "f" * 16) as run:
        run.end("validated")
    one = ActiveRun(resolved=SimpleNamespace(name="a", fingerprint="f" * 16, same_training=[]), run=run)
    other = checkpoints.checkpoint_path("f" * 16, "another store")
    for place in (one.checkpoint, other):
        checkpoints.write_checkpoint(place, {"progress": {"epoch": 1, "ended": ""}})
    claims, out = RunClaims(tracker=tracker, parent_id="", datasets=[], limit=None, say=print), Outcome()
    with contextlib.ExitStack() as stack:
        active, _ = claims.claim([one.resolved], stack, out, watch=SimpleNamespace())
    assert (active, list(out.validated)) == ([], ["a"])
    assert not one.checkpoint.exists()
    assert other.exists()


def test_checkpoints_that_nobody_resumes_are_removed():
    folder = checkpoints.checkpoint_path("f" * 16, "x").parent
    ages = {"old.pt": 31, "new.pt": 29, ".x.pt.ab12cd_3": 2, ".x.pt.zz12cd_3": 0.5, "../.images.json.ab12cd_3": 2, "../images.json": 400}
    folder.mkdir(parents=True, exist_ok=True)
    for name, days in ages.items():
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (0, time.time() - days * 86400))
    assert checkpoints.remove_old() == 3
    assert {name for name in ages if (folder / name).exists()} == {"new.pt", ".x.pt.zz12cd_3", "../images.json"}


class RunnerOfTests:
    """Stands for the runner: which runs cannot be tested, and which calls were made."""

    def __init__(self, faults: dict[str, Exception]) -> None:
        self.faults, self.calls, self.said = faults, [], []

    def try_tests(self, runs, out):
        try_tests(runs, self.run_tests, out, self.said.append)

    def run_tests(self, runs):
        self.calls.append([one.record.name for one in runs])
        for one in runs:
            if one.record.name in self.faults:
                raise self.faults[one.record.name]


def runs_to_test():
    return [SimpleNamespace(record=SimpleNamespace(name=name)) for name in "abc"]


def test_a_run_that_cannot_be_tested_further_stops_no_other():
    runner, out = RunnerOfTests({"b": RuntimeError("its head.safetensors is damaged")}), Outcome()
    runner.try_tests(runs_to_test(), out)
    assert runner.calls == [["a", "b", "c"], ["a"], ["b"], ["c"]]
    assert list(out.untested) == ["b"]
    assert "is damaged" in out.untested["b"]
    assert len(runner.said) == 1


def test_weights_that_all_lack_are_said_once_and_a_full_disk_stops():
    runner, out = RunnerOfTests({"a": WeightsUnavailable("no weights.")}), Outcome()
    runner.try_tests(runs_to_test(), out)
    assert runner.calls == [["a", "b", "c"]]
    assert set(out.untested) == set("abc")
    with pytest.raises(SystemFault, match="no space"):
        RunnerOfTests({"a": SystemFault("no space")}).try_tests(runs_to_test(), Outcome())
