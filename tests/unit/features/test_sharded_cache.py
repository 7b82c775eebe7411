"""A pass in shards: filled in any order, by any backbone that reads enough of it, and read as if it were computed now; a damaged one is not read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from experiment_files import QUESTION, finished_results, place

from cellbench.config.loading import read_experiment
from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.data.loading import open_folds
from cellbench.data.transforms.framing import Framing
from cellbench.execution import ray_cluster, ray_grid
from cellbench.execution.claims import Outcome
from cellbench.execution.planning import ResolvedRun, resolve_runs
from cellbench.execution.resources import Resources
from cellbench.execution.worker_job import CohortWorker, JobSpec, job_spec
from cellbench.features import sharded_cache
from cellbench.features.extractor import FeaturePass, Features
from cellbench.features.sharded_cache import ShardedCache, num_shards
from cellbench.hardware import Hardware, detect_hardware
from cellbench.run import main
from cellbench.tracking.tracker import Tracker

ONE = Hardware(device_name="cpu", precision_name="fp32", memory_bytes=2**30)
KEPT = [
    "--set",
    "run.repeat_views_every=2",
    "--set",
    "run.epochs=3",
    "--set",
    "grid.seed=[0]",
    "--set",
    "baselines=[]",
    "--set",
    "run.crops_per_image=9",
]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(sharded_cache, "ROWS", 16)


def test_rows_of_several_shards_come_back_as_they_were_put_and_a_damaged_or_absent_shard_does_not(tmp_path, small_shards):
    maps = torch.rand(40, 5, 3, 2).bfloat16()
    kept = ShardedCache(tmp_path, 40)
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
    assert ShardedCache(tmp_path, 40).get(np.array([39]), (11,)) is None


@pytest.mark.slow
def test_a_grid_reads_shards_that_others_filled_gives_the_same_numbers_and_computes_no_tile(tmp_path, monkeypatch, small_shards):
    place(tmp_path / "alone", monkeypatch)
    assert main([*QUESTION, *KEPT]) == 0
    alone = finished_results()
    folder = tmp_path / "sharded"
    place(folder, monkeypatch)
    experiment, data = read_experiment("small.toml", KEPT[1::2], data=Path("smears"))[0], Path("smears").absolute()
    with Tracker(experiment.experiment).run("grid", "parent") as top:
        pass
    resources = Resources(registry=Registry(), machine=detect_hardware("cpu"), disk_bytes=2**28, prefer_disk=True)
    job = job_spec(experiment, top.run_id, resources, where="", data=data)
    precision = job.machine.precision_name
    jobs = resolve_runs(experiment, Registry(), open_folds(experiment, Registry(), data), None, "small.toml", precision=precision)
    worker = CohortWorker(job, print)
    prints = [[job.fingerprint] for job in jobs]
    for mine, passes in zip(prints, worker.passes(prints), strict=True):
        work = [(one, k) for one in passes for k in reversed(range(num_shards(one.num)))]
        assert {one.split for one in passes} == {"train", "val", "test"}
        assert worker.fill(mine, [], work[1::2]) == len(work[1::2])
        assert worker.fill(mine, [], work) == len(work[::2])  # each once
    computed = []
    whole = Features._batch

    def batch(self, kept, rows, tiles):
        if kept is not None:  # else they describe the training images, for the distance of new ones
            computed.append(kept.get(rows, self.backbone.keys) is None)
        return whole(self, kept, rows, tiles)

    monkeypatch.setattr(Features, "_batch", batch)
    assert main([*QUESTION, *KEPT, "--cache", f"{folder / 'cache'}:256M"]) == 0
    assert finished_results() == alone
    assert computed
    assert not any(computed)


@pytest.mark.slow
def test_a_shard_holds_the_levels_of_all_cohorts(tmp_path, monkeypatch, small_shards):
    place(tmp_path, monkeypatch)
    changes = [*KEPT[1::2], 'grid.head=["bilinear", "fpn"]', 'grid.backbone=["vit-tiny-random"]']
    experiment, data = read_experiment("small.toml", changes, data=Path("smears"))[0], Path("smears").absolute()
    with Tracker(experiment.experiment).run("grid", "parent") as top:
        pass
    resources = Resources(registry=Registry(), machine=ONE, disk_bytes=2**28, prefer_disk=True)
    job = job_spec(experiment, top.run_id, resources, where="", data=data)
    precision = job.machine.precision_name
    jobs = resolve_runs(experiment, Registry(), open_folds(experiment, Registry(), data), None, "small.toml", precision=precision)
    worker = CohortWorker(job, print)
    (few,) = worker.passes([[jobs[0].fingerprint]])
    (many,) = worker.passes([[jobs[1].fingerprint]])
    assert few == many  # the cached files do not depend on the levels that a run reads
    assert worker.fill([jobs[0].fingerprint], [jobs[1].fingerprint], [(few[0], 0)]) == 1
    assert worker.fill([jobs[1].fingerprint], [], [(many[0], 0)]) == 0


@dataclass(eq=False)
class Asked:
    name: str
    given: tuple


class Pretended:
    """A fake Ray of two nodes with one core that executes calls at once, records them, and fails the first shards.
    ``apart``: its nodes have a cache folder each, and all shards come to the first one."""

    def __init__(self, passes: list[list[FeaturePass]], apart: bool = False) -> None:
        self.noted: list[tuple[str, object]] = []
        self._passes, self._lost, self._apart = passes, False, apart
        names = ("RayActorError", "OutOfMemoryError", "WorkerCrashedError", "NodeDiedError", "RayTaskError", "RayError")
        self.exceptions = SimpleNamespace(**{name: type(name, (Exception,), {}) for name in names})

    def nodes(self) -> list[dict[str, object]]:
        resources = {"CPU": 1.0, "memory": 8e9}
        return [{"Alive": True, "NodeManagerHostname": "here", "NodeID": str(k), "Resources": resources} for k in range(2)]

    def remote(self, _: type) -> SimpleNamespace:
        calls = {
            name: SimpleNamespace(remote=lambda *given, name=name: Asked(name, given)) for name in ("where", "passes", "fill", "cohort")
        }
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: SimpleNamespace(**calls)))

    def wait(self, refs: list[object], timeout: float) -> tuple[list[object], list[object]]:
        return refs[-1:], refs[:-1]  # the last task ends first, so that missing waits are detected

    def get(self, ref: Asked, timeout: float = 0) -> object:
        name, given = ref.name, ref.given
        if name == "where":
            return "here:1", "0"
        if name == "fill" and not self._lost:
            self._lost = True
            raise self.exceptions.RayActorError("its node is gone")
        self.noted += [("fill", shard) for shard in given[2]] if name == "fill" else [(name, given[0])]
        return "done", {"passes": self._passes, "cohort": Outcome(), "fill": not self._apart}[name], []

    def kill(self, _: object) -> None:
        pass


@pytest.mark.parametrize("apart", [False, True])
def test_a_shard_that_two_cohorts_want_is_computed_once_and_a_cohort_waits_for_its_own_near_them(tmp_path, monkeypatch, apart):
    val, *train = (FeaturePass(split=split, number=0, num=600, folder=split) for split in ("val", "train a", "train b"))
    ray, said, near = Pretended([[val, train[0]], [val, train[1]]], apart), [], {}
    start = ray_cluster.ActorPool.start

    def noted(self, job, request, title, method, *args, node="", **more):
        near[title] = node
        start(self, job, request, title, method, *args, **more)

    monkeypatch.setattr(ray_cluster.ActorPool, "start", noted)
    runs = [RunSpec(backbone="filter-bank", head="bilinear", tile_px=64, data_seed=seed) for seed in (0, 1)]
    card = Registry().head("bilinear")
    groups = [
        [ResolvedRun(run=run, name=f"run {k}", fingerprint=f"f{k}", precision="fp32", framing=Framing.of(run), card=card)]
        for k, run in enumerate(runs)
    ]
    experiment = SimpleNamespace(experiment="pretended")
    job = JobSpec(experiment=experiment, parent_id="", machine=ONE, cache=tmp_path, store="http://lab", prefer_disk=True)
    runner = SimpleNamespace(experiment=experiment, say=said.append, release=lambda *_: None, give_up=None)
    ray_grid.RayExecutor(ray, job).run(runner, groups, Outcome())
    kinds = [kind for kind, _ in ray.noted]
    assert kinds[0] == "passes"
    filled = [what for kind, what in ray.noted if kind == "fill"]
    assert len(filled) == len(set(filled)) == 3 * num_shards(600)
    for k, mine in enumerate(([val, train[0]], [val, train[1]])):
        begun = ray.noted.index(("cohort", [f"f{k}"]))
        assert {one for kind, (one, _) in ((kind, what) for kind, what in ray.noted[:begun] if kind == "fill")} >= set(mine)
    assert any("was lost (RayActorError)" in line for line in said)
    cohorts = {node for title, node in near.items() if title.startswith("cohort")}
    assert ("0" in cohorts) == apart  # in a folder that all share, any node is equally near
    assert "1" not in cohorts
    assert {node for title, node in near.items() if not title.startswith("cohort")} == {""}
