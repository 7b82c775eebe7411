"""The study with given values instead of training: proposals depend on seed and number, and a killed worker loses nothing."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_data import ROOT

from cellbench.config.registry import Registry
from cellbench.config.search_space import Space
from cellbench.errors import CellbenchError
from cellbench.metrics.catalog import objectives
from cellbench.search.study import CompletedTrial, Study


def space_of(space: dict[str, Any] | None = None, **settings: Any) -> Space:
    varied = {
        "backbone": ["vit-tiny-random", "filter-bank"],
        "head": ["bilinear", "fpn"],
        "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "epochs": {"low": 2, "high": 9},
    }
    tree = {
        "experiment": "s",
        "dataset": "folder",
        "search": {"trials": 13, "batch": 4, "startup": 5, **settings},
        "space": {**varied, **(space or {})},
        "head": {"fpn": {"width": [32, 64, 128]}},
    }
    return Space.of(tree, "s.toml", Registry(), objectives())


def study_of(space: Space, url: str = "sqlite:///optuna.db", **more: str) -> Study:
    return Study(url, space, {**space.facts, **more}, 9)


def value(point: dict[str, Any]) -> float:
    return 0.9 - (math.log10(point["lr"]) + 2.3) ** 2 / 10 + 0.01 * (point["head"] == "fpn") + point.get("fpn.width", 0) / 1e5


def metrics(point: dict[str, Any]) -> dict[str, float]:
    return {"val/dice": value(point), "cost/latency_ms": 10.0 * point["epochs"]}


def finish(study: Study, most: int = 10**6) -> list[CompletedTrial]:
    """Runs all trials with ``value`` as their result; the worker dies after ``most`` results."""
    with study:
        while batch := study.ask():
            for pending in batch:
                if not most:
                    return study.trials()
                study.tell(pending, metrics(pending.point))
                most -= 1
    return study.trials()


def summary(trials: list[CompletedTrial]) -> list[tuple[int, str, dict[str, Any]]]:
    return [(t.number, t.state, dict(t.point)) for t in trials]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc", "nsga2"])
def test_a_search_killed_twice_equals_an_uninterrupted_one(sampler: str) -> None:
    space = space_of(sampler=sampler)
    whole = finish(study_of(space, "sqlite:///whole.db"))
    # Dead workers: owners with process ids that do not exist.
    for killed_after in (3, 4):
        dying = study_of(space)
        dying.owner = f"{dying.owner.split(':')[0]}:{999999990 + killed_after}:0"
        finish(dying, killed_after)
    resumed = finish(study_of(space))
    assert summary(resumed) == summary(whole)
    assert [t.state for t in whole] == ["complete"] * 13
    assert len({str(t.point) for t in whole}) > 10


def test_start_up_trials_cycle_through_pairs_of_backbone_and_head() -> None:
    trials = finish(study_of(space_of(startup=8, trials=8)))
    pairs = [(t.point["backbone"], t.point["head"]) for t in trials]
    assert [len(set(pairs[:4])), len(set(pairs[4:]))] == [4, 4]
    assert len({t.point["lr"] for t in trials}) == 8


@pytest.mark.slow
def test_a_process_killed_with_sigkill_leaves_its_trials_to_the_next(tmp_path: Path) -> None:
    code = """
import os, signal, test_study as t
study = t.study_of(t.space_of())
with study:
    batch = study.ask()
    study.tell(batch[0], t.metrics(batch[0].point))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}{os.pathsep}{Path(__file__).parent}"}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == -9
    trials = study_of(space_of()).trials()
    assert [t.state for t in trials] == ["complete", "running", "running", "running"]
    assert summary(finish(study_of(space_of()))) == summary(finish(study_of(space_of(), "sqlite:///whole.db")))


def test_trials_of_a_live_worker_are_not_taken_over() -> None:
    first, second = study_of(space_of()), study_of(space_of())
    second.owner = "elsewhere:1:0"
    with first, second:
        mine, other = first.ask(), second.ask()
    assert [p.number for p in mine + other] == list(range(8))
    assert len({str(p.point) for p in mine + other}) == 8  # start-up points are not repeated either


def test_a_journal_file_works_as_storage() -> None:
    assert len(finish(study_of(space_of(), "journal:study.log"))) == 13


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"space": {"lr": {"low": 1e-4, "high": 1.0, "log": True}}}, "space.lr was 0.0001 to 0.1, log and is 0.0001 to 1, log"),
        ({"space": {"batch_size": [4, 8]}}, "space.batch_size was not there and is 4, 8"),
        ({"sampler": "random"}, 'search.sampler was "tpe" and is "random"'),
    ],
)
def test_a_changed_space_is_refused_with_what_changed(changed: dict[str, Any], message: str) -> None:
    study_of(space_of())
    with pytest.raises(CellbenchError, match="start a new study") as error:
        study_of(space_of(**changed))
    assert message in str(error.value)


@pytest.mark.slow
def test_more_trials_continue_the_same_study() -> None:
    first = finish(study_of(space_of(trials=8)))
    more = finish(study_of(space_of(trials=12)))
    assert summary(more)[:8] == summary(first)
    assert len(more) == 12


@pytest.mark.slow
def test_the_best_trial_satisfies_the_bounds() -> None:
    space = space_of(max={"cost/latency_ms": 40})
    trials = finish(study_of(space))
    (best,) = study_of(space).best()
    kept = [t for t in trials if t.metrics["cost/latency_ms"] <= 40]
    assert best.values[0] == max(t.values[0] for t in kept)
    assert 0 < len(kept) < len(trials)


@pytest.mark.slow
def test_several_objectives_give_the_pareto_front() -> None:
    space = space_of(objective=["val/dice", "cost/latency_ms"], trials=20)
    trials = finish(study_of(space))
    front = study_of(space).best()
    for t in trials:
        beaten = any(o.values[0] >= t.values[0] and o.values[1] <= t.values[1] and o.values != t.values for o in trials)
        assert beaten != (t.number in {f.number for f in front})
    assert len(front) > 1


@pytest.mark.slow
def test_a_pruner_decides_the_same_when_an_epoch_is_reported_again() -> None:
    study = study_of(space_of(pruner="median", trials=12))
    answers = {}
    with study:
        for k in range(3):
            for pending in study.ask():
                rising = 0.9 if k < 2 else 0.1
                go_on = [study.should_continue(pending, epoch, rising) for epoch in range(6)]
                answers[pending.number] = go_on
                assert [study.should_continue(pending, epoch, rising) for epoch in range(6)].count(False) <= 1
                study.tell(pending, metrics(pending.point)) if all(go_on) else study.tell_pruned(pending, {}, "")
    assert all(all(go_on) for number, go_on in answers.items() if number < 8)
    assert all(not all(go_on) for number, go_on in answers.items() if number >= 8)


@pytest.mark.parametrize("url", ["sqlite:///file/o.db", "nonsense", "postgresql://me:secret@127.0.0.1:1/x", "wrong://x"])
def test_an_unavailable_storage_is_a_one_line_error_without_the_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellbench.tracking.availability.DATABASE_PATIENCE_S", 0.0)
    Path("file").touch()
    with pytest.raises(CellbenchError) as error:
        study_of(space_of(), url)
    assert "storage" in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_of_the_code_is_not_taken_for_one_of_the_storage() -> None:
    study = study_of(space_of())

    def wrong() -> None:
        raise RuntimeError("the size of tensor a must match")

    with pytest.raises(RuntimeError, match="the size of tensor a"):
        study._patiently(wrong)


def test_a_storage_that_is_away_for_a_while_costs_no_trial(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sqlalchemy.exc

    monkeypatch.setattr("cellbench.search.study.RETRY_S", 0.0)
    expected = [t.values for t in finish(study_of(space_of()))]
    study = study_of(space_of(), "sqlite:///away.db")
    study.url, study.lock = "postgresql://lab:s3cret@db/optuna", contextlib.nullcontext  # type: ignore[method-assign]
    calls, storage = 0, study._storage

    def sometimes_away(name: str) -> Any:
        real = getattr(type(storage), name)

        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 23 in (7, 8):
                raise sqlalchemy.exc.OperationalError("SELECT", {}, Exception("server closed the connection unexpectedly"))
            return real(storage, *arguments, **named)

        return call

    for name in ("get_all_trials", "create_new_trial", "set_trial_user_attr", "set_trial_param", "set_trial_state_values", "get_trial"):
        monkeypatch.setattr(storage, name, sometimes_away(name))
    with study:
        while batch := study.ask():
            for pending in batch:
                study.tell(pending, metrics(pending.point))
    trials = study.trials()
    assert [t.number for t in trials] == list(range(13))
    assert {t.state for t in trials} == {"complete"}
    assert [t.values for t in trials][:5] == expected[:5]
    said = capsys.readouterr().err
    assert "does not answer. It is asked again for 10 minutes." in said
    assert "answers again" in said
    assert "s3cret" not in said
