"""Runs that another process executes are waited for; those that it leaves behind are executed here."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

from cellbench.execution import grid
from cellbench.execution.claims import Outcome
from cellbench.tracking.schema import RunState


def state(name: str, status: str, owner: str = "", heartbeat_s: float = 0.0) -> RunState:
    return RunState(run_id=name, name=name, status=status, owner=owner, heartbeat_s=heartbeat_s, reason="why")


class Runner:
    """Stands for the runner: the store's answers, one a question, and what was executed."""

    def __init__(self, answers: list[dict[str, RunState]]) -> None:
        self.tracker = SimpleNamespace(known=lambda *_: answers.pop(0) if len(answers) > 1 else answers[0], lock=nullcontext)
        self.said: list[str] = []
        self.say = self.said.append
        self.executed: list[str] = []

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_runs_of_other_processes_are_awaited_and_those_left_behind_are_executed(monkeypatch):
    monkeypatch.setattr(grid, "POLL_S", 0.0)
    monkeypatch.setattr(grid, "group_cohorts", lambda runs: [runs])
    monkeypatch.setattr(RunState, "alive", property(lambda one: one.status == "running" and one.owner == "live"))
    first = {name: state(name, "running", "live") for name in "abcd"}
    later = {"a": state("a", "finished"), "b": state("b", "running", "dead"), "c": state("c", "failed"), "d": state("d", "running", "live")}
    last = {**later, "d": state("d", "interrupted")}
    runner = Runner([first, later, last])
    runs = [SimpleNamespace(name=name, fingerprint=name) for name in "abcde"]

    class Executor:
        def run(self, runner, cohorts, out):
            for one in cohorts[0]:
                runner.executed.append(one.name)
                out.finished[one.name] = state(one.name, "finished")

    out = Outcome(busy=list("abcd"), finished={"e": state("e", "finished")})
    grid._await_others(runner, runs, Executor(), out)
    assert runner.executed == ["b", "d"]
    assert set(out.finished) == {"a", "b", "d", "e"}
    assert out.failed == {"c": "in another process: why"}
    assert out.busy == []
    assert len(runner.said) == 1
