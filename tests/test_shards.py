"""A pass in shards: filled in any order, by any trunk that reads enough of it, and read as if it were computed now; a damaged one is not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from questions import QUESTION, answers, place

from cellbench import shards
from cellbench.commands import read_experiment
from cellbench.features import Features
from cellbench.jobs import jobs_of, open_folds
from cellbench.lanes import Lanes
from cellbench.machine import Machine
from cellbench.orders import Hand, order
from cellbench.registry import Registry
from cellbench.run import main
from cellbench.shards import Shards, num_shards
from cellbench.track import Tracker

ONE = Machine(device=torch.device("cpu"), precision=torch.float32, memory_bytes=2**30)
KEPT = ["--set", "run.views=2", "--set", "run.epochs=3", "--set", "grid.seed=[0]", "--set", "baselines=[]", "--set", "run.crops_per_image=9"]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "ROWS", 16)


def test_rows_of_several_shards_come_back_as_they_were_put_and_a_damaged_or_absent_shard_does_not(tmp_path, small_shards):
    maps = torch.rand(40, 5, 3, 2).bfloat16()
    kept = Shards(tmp_path, 40)
    assert num_shards(40) == 3
    for k in (2, 0):
        kept.write(k, {11: maps[kept.rows(k)]}, {"what": "val"})
    assert kept.missing([11]) == [1]
    assert kept.missing([11, 3]) == [0, 1, 2]
    rows = np.array([39, 0, 7, 33])
    found = kept.get(rows, (11,))[11]
    assert torch.equal(found, maps[torch.from_numpy(rows)])
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert kept.get(np.array([20]), (11,)) is None
    path = tmp_path / "level-11.shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert Shards(tmp_path, 40).get(np.array([39]), (11,)) is None


def test_a_grid_reads_shards_that_others_filled_gives_the_same_numbers_and_computes_no_tile(tmp_path, monkeypatch, small_shards):
    place(tmp_path / "alone", monkeypatch)
    assert main([*QUESTION, *KEPT]) == 0
    alone = answers()
    folder = tmp_path / "sharded"
    place(folder, monkeypatch)
    experiment, data = read_experiment("small.toml", KEPT[1::2], data=Path("smears")), Path("smears").absolute()
    with Tracker(experiment.experiment).run("grid", "parent") as top:
        pass
    from cellbench.machine import machine

    told = order(
        experiment, top.run_id, machine("cpu"), where="", data=data, weights=None, extra=None, disk_bytes=2**28, prefer_disk=True
    )  # fmt: skip
    jobs = jobs_of(experiment, Registry(), open_folds(experiment, Registry(), data), None, "small.toml")
    hand = Hand(told, print)
    prints = [[job.fingerprint] for job in jobs]
    for mine, passes in zip(prints, hand.passes(prints), strict=True):
        work = [(one, k) for one in passes for k in reversed(range(num_shards(one.num)))]
        assert {one.split for one in passes} == {"train", "val", "test"}
        assert hand.fill(mine, [], work[1::2]) == len(work[1::2])
        assert hand.fill(mine, [], work) == len(work[::2])  # each once
    computed = []
    whole = Features._batch

    def batch(self, split, kept, one, pixels):
        computed.append(kept.get(one.rows, self.trunk.keys) is None)
        return whole(self, split, kept, one, pixels)

    monkeypatch.setattr(Features, "_batch", batch)
    assert main([*QUESTION, *KEPT, "--cache", f"{folder / 'cache'}:256M"]) == 0
    assert answers() == alone
    assert computed
    assert not any(computed)


def test_a_shard_holds_the_levels_of_all_who_want_it(tmp_path, monkeypatch, small_shards):
    place(tmp_path, monkeypatch)
    changes = [*KEPT[1::2], 'grid.head=["bilinear", "fpn"]', 'grid.backbone=["vit-tiny-random"]']
    experiment, data = read_experiment("small.toml", changes, data=Path("smears")), Path("smears").absolute()
    with Tracker(experiment.experiment).run("grid", "parent") as top:
        pass
    told = order(experiment, top.run_id, ONE, where="", data=data, weights=None, extra=None, disk_bytes=2**28, prefer_disk=True)
    jobs = jobs_of(experiment, Registry(), open_folds(experiment, Registry(), data), None, "small.toml")
    hand = Hand(told, print)
    (few,) = hand.passes([[jobs[0].fingerprint]])
    (many,) = hand.passes([[jobs[1].fingerprint]])
    assert few == many  # what is kept does not hang on who reads how much of it
    with Lanes(1):
        hand.fill([jobs[0].fingerprint], [jobs[1].fingerprint], [(few[0], 0)])
    assert hand.fill([jobs[1].fingerprint], [], [(many[0], 0)]) == 0
