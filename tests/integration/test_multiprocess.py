"""The same grid in one process and in several: the same numbers to the last bit, and a worker's death costs nothing but time."""

from __future__ import annotations

import multiprocessing
import os
import signal

import lost_process
import mlflow
import pytest
import torch
from experiment_files import QUESTION, finished_results, place, process_killer

from cellbench.errors import CellbenchError
from cellbench.execution.multiprocess import assign_cores, check_num_workers
from cellbench.hardware import Hardware
from cellbench.models.backbones.base import Backbone
from cellbench.run import main

pytestmark = pytest.mark.usefixtures("undrawn_processes")
TWO = Hardware(device_name="cpu", precision_name="fp32", memory_bytes=1000, lanes=2)


@pytest.fixture
def two_cores(monkeypatch):
    """A machine of two cores for the driver, whatever this one has."""
    monkeypatch.setattr("cellbench.hardware.num_cores", lambda: 2)


def test_two_workers_of_which_one_is_killed_give_the_numbers_of_one_process_to_the_last_bit(tmp_path, monkeypatch, two_cores, capsys):
    place(tmp_path / "alone", monkeypatch)
    few = ["--set", "grid.seed=[0]"]
    assert main([*QUESTION, *few]) == 0
    alone = finished_results()
    place(tmp_path / "together", monkeypatch)
    with process_killer(kill) as killed:
        assert main([*QUESTION, *few, "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 workers, each cpu, 1 core" in printed
    assert killed
    assert "its worker was lost (killed by signal 9); another one resumes it" in printed
    assert len(alone) == 3
    assert finished_results() == alone
    assert not multiprocessing.active_children()


def kill(pid: int) -> bool:
    os.kill(pid, signal.SIGKILL)
    return True


def test_a_cohort_that_kills_every_worker_fails_with_a_reason_and_the_rest_runs(tmp_path, monkeypatch, two_cores):
    monkeypatch.setattr("cellbench.execution.multiprocess._work", lost_process.work)
    place(tmp_path, monkeypatch)
    assert main([*QUESTION, "--set", "baselines=[]", "--set", "grid.seed=[0]", "--workers", "1"]) == 1
    runs = {run.info.run_name: run.data.tags for run in mlflow.search_runs(experiment_names=["small"], output_format="list")}
    assert "lost 3 times (killed by signal 9)" in runs["vit-tiny-random · bilinear · seed 0"]["cellbench.reason"]
    assert runs["vit-tiny-random · bilinear · seed 0"]["cellbench.status"] == "failed"
    handed = (tmp_path / "handed.txt").read_text().splitlines()
    assert handed == ["cohort 1 of 2: 0", "cohort 1 of 2: 0", "cohort 1 of 2: 1", "cohort 2 of 2: 0"]  # in smaller chunks the last time


def test_shares_are_the_whole_machine_and_no_core_is_in_two(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    eight = Hardware(device_name="cpu", precision_name="fp32", memory_bytes=1000, lanes=4, threads=2)
    for num in range(1, 5):
        shares = eight.shares(num)
        assert sum(one.lanes for one in shares) == 4
        assert {one.threads for one in shares} == {2}  # or the last bit would change
        pinned = [core for cores in assign_cores(shares) for core in cores]
        assert sorted(pinned) == list(range(8))


@pytest.mark.parametrize(("num", "message"), [(0, "expected 1 or more"), (3, "at most 2 here")])
def test_more_workers_than_cores_are_refused(num, message):
    with pytest.raises(CellbenchError, match=message):
        check_num_workers(num, TWO)
    assert check_num_workers(2, TWO) == 2


def test_out_of_memory_retries_with_smaller_chunks_and_then_fails(tmp_path, monkeypatch, capsys):
    place(tmp_path, monkeypatch)
    whole = Backbone.forward

    def forward(self: Backbone, pixels_BCHW: torch.Tensor, indices: tuple[int, ...]) -> list[torch.Tensor]:
        most = 0 if "filter_bank" in type(self).__module__ else 4
        if len(pixels_BCHW) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, pixels_BCHW, indices)

    monkeypatch.setattr(Backbone, "forward", forward)
    assert main([*QUESTION, "--set", "run.epochs=1", "--set", "grid.seed=[0]"]) == 1
    printed = capsys.readouterr().out
    assert [f"again with {num} tiles at once" in printed for num in (8, 4, 2)] == [True, True, True]
    runs = {run.info.run_name: run.data.tags for run in mlflow.search_runs(experiment_names=["small"], output_format="list")}
    assert runs["vit-tiny-random · bilinear · seed 0"]["cellbench.status"] == "finished"
    assert runs["otsu · seed 0"]["cellbench.status"] == "finished"
    assert runs["filter-bank · bilinear · seed 0"]["cellbench.status"] == "failed"
    assert "out of memory: CUDA out of memory" in runs["filter-bank · bilinear · seed 0"]["cellbench.reason"]
