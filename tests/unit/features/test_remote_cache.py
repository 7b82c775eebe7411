"""Features at a URL: one machine computes them, others fetch them and give the same numbers; a damaged, unavailable or full URL only costs time."""

from __future__ import annotations

import errno
import uuid
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from cohorts import dataset_of, fitted, run_of, same
from experiment_files import QUESTION, place
from fsspec.implementations.local import LocalFileSystem

from cellbench import startup
from cellbench.config.loading import read_experiment
from cellbench.config.registry import Registry
from cellbench.data.loading import open_folds
from cellbench.errors import CellbenchError
from cellbench.execution.planning import resolve_runs
from cellbench.execution.resources import Resources
from cellbench.execution.worker_job import CohortWorker, job_spec
from cellbench.features import sharded_cache
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.features.remote_cache import RemoteCache
from cellbench.hardware import detect_hardware
from cellbench.run import main
from cellbench.tracking.tracker import Tracker

RUNS = [run_of("bilinear", repeat_views_every=1), run_of("fpn", repeat_views_every=1)]
KEPT = {"disk_bytes": 2**28, "prefer_disk": True, "key": "k", "backbone": "vit"}


@pytest.fixture
def computed(monkeypatch):
    """The number of tiles of each call of a backbone."""
    calls: list[int] = []
    whole = FrozenBackbone.maps

    def maps(self, pixels):
        calls.append(len(pixels))
        return whole(self, pixels)

    monkeypatch.setattr(FrozenBackbone, "maps", maps)
    monkeypatch.setattr(sharded_cache, "ROWS", 16)
    return calls


@pytest.fixture
def learn(small_folder, tmp_path, monkeypatch):
    """Trains on a machine with a cache folder of its own."""

    def learn(name: str, url: str, runs=RUNS, said: list[str] | None = None):
        monkeypatch.setenv("CELLBENCH_CACHE", str(tmp_path / name))
        tell = (said if said is not None else []).append
        return fitted(dataset_of(small_folder), runs, **KEPT, shared=RemoteCache(url, tell), tell=tell)

    return learn


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    return f"file://{tmp_path / 'there'}" if request.param == "file" else f"memory://{uuid.uuid4().hex}"


@pytest.mark.slow
def test_what_one_machine_computed_the_next_one_fetches_and_gives_the_same_numbers_to_the_last_bit(small_folder, learn, computed, url):
    plain = fitted(dataset_of(small_folder), RUNS)
    said: list[str] = []
    computed.clear()
    first = learn("one", url)
    assert computed
    computed.clear()
    second = learn("two", url, said=said)
    assert computed == []
    assert any("0 here" in line and "0 computed" in line for line in said)
    assert all(same(a, b) and same(a, c) for a, b, c in zip(plain, first, second, strict=True))


@pytest.mark.slow
def test_a_shard_that_is_damaged_or_gone_there_is_computed_alone_and_put_there_again(learn, computed):
    url = f"memory://{uuid.uuid4().hex}"
    first = learn("one", url)
    fs, root = fsspec.core.url_to_fs(url)
    damaged, gone = sorted(fs.find(root))[:2]
    whole = fs.cat_file(damaged), fs.cat_file(gone)
    fs.pipe_file(damaged, whole[0][:-1] + bytes([whole[0][-1] ^ 1]))
    fs.rm_file(gone)
    computed.clear()
    second = learn("two", url)
    assert len(computed) == 1  # both are levels of one shard
    assert (fs.cat_file(damaged), fs.cat_file(gone)) == whole
    assert not [name for name in fs.find(root) if not name.endswith(".safetensors")]
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_a_run_that_reads_more_levels_computes_only_the_missing_ones(learn, computed, tmp_path):
    url = f"file://{tmp_path / 'there'}"
    fs, root = fsspec.core.url_to_fs(url)
    learn("one", url, RUNS[:1])
    few = {name: fs.cat_file(name) for name in fs.find(root)}
    learn("two", url, RUNS[1:])
    many = {name: fs.cat_file(name) for name in fs.find(root)}
    assert few.items() < many.items()
    computed.clear()
    learn("three", url)
    assert computed == []


@pytest.mark.slow
def test_a_shard_that_is_damaged_here_is_fetched_again(learn, computed, tmp_path):
    url = f"file://{tmp_path / 'there'}"
    first = learn("one", url)
    path = sorted((tmp_path / "one" / "features").rglob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    computed.clear()
    assert same(first[0], learn("one", url)[0])
    assert computed == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("nosuch://lab:s3cret@cluster/features", "ValueError"),  # as with a protocol whose package is missing
        ("http://lab:s3cret@127.0.0.1:9/features", "Error"),
        ("file:///dev/null/features", "NotADirectoryError"),
    ],
)
def test_an_unavailable_url_prints_one_line_each_way_and_changes_no_number(small_folder, learn, url, why):
    said: list[str] = []
    away = learn("one", url, said=said)
    lines = [line for line in said if "the shared cache" in line]
    assert 1 <= len(lines) <= 2
    assert all(why in line and "\n" not in line for line in lines)
    assert "s3cret" not in "".join(said)
    assert all(same(a, b) for a, b in zip(away, fitted(dataset_of(small_folder), RUNS), strict=True))


class Full(LocalFileSystem):
    """A disk that takes only half of a file."""

    protocol = "full"

    def put_file(self, path1, path2, callback=None, **kwargs):
        Path(path2).write_bytes(Path(path1).read_bytes()[:10])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_url_keeps_no_partial_file_is_reported_once_and_still_read(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLBENCH_CACHE", str(tmp_path / "cache"))
    fsspec.register_implementation("full", Full, clobber=True)
    said: list[str] = []
    shared, there = RemoteCache(f"full://{tmp_path}/there", said.append), tmp_path / "there"
    for name in ("a", "b"):
        path = tmp_path / "cache" / "features" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        shared.send(path)
    assert [path for path in there.rglob("*") if path.is_file()] == []
    (line,) = said
    assert "No space left on device" in line
    (there / "features" / "c").write_text("c")
    assert shared.fetch(tmp_path / "cache" / "features" / "c", lambda path: path.read_text() == "c")
    with pytest.raises(CellbenchError, match="No space left"):
        shared.probe()


def test_a_url_that_failed_is_tried_again_later(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("cellbench.features.remote_cache.PAUSE_S", 0.0)
    path, said = tmp_path / "cache" / "a", []
    shared = RemoteCache(f"file://{tmp_path}/there/deeper", said.append)
    path.parent.mkdir()
    path.write_text("a")
    (tmp_path / "there").write_text("a file where a folder belongs")
    shared.send(path)
    (tmp_path / "there").unlink()
    shared._pauses = {key: until - 10 for key, until in shared._pauses.items()}
    shared.send(path)
    assert (tmp_path / "there" / "deeper" / "a").read_text() == "a"
    assert len(said) == 1


@pytest.mark.slow
def test_the_flag_reaches_processes_elsewhere_of_which_the_second_computes_nothing(tmp_path, monkeypatch):
    few = ["run.repeat_views_every=1", "run.epochs=1", "grid.seed=[0]", "baselines=[]", 'grid.backbone=["vit-tiny-random"]']
    monkeypatch.setenv("CELLBENCH_CACHE_URL", "")  # put back afterwards
    place(tmp_path, monkeypatch)
    assert (
        main(
            [*QUESTION, *[part for change in few for part in ("--set", change)], "--dry-run", "--cache-url", f"file://{tmp_path / 'there'}"]
        )
        == 0
    )
    experiment, data, registry = read_experiment("small.toml", few, data=Path("smears"))[0], Path("smears").absolute(), Registry()
    with Tracker(experiment.experiment).run("grid", "parent") as top:
        pass
    resources = Resources(registry=Registry(), machine=detect_hardware("cpu"), disk_bytes=2**28, prefer_disk=True)
    job = job_spec(experiment, top.run_id, resources, where="", data=data)
    folds, precision = open_folds(experiment, registry, data), job.machine.precision_name
    prints = [job.fingerprint for job in resolve_runs(experiment, registry, folds, None, "small.toml", precision=precision)]
    for name, num in (("one", 3), ("two", 0)):
        monkeypatch.delenv("CELLBENCH_CACHE_URL", raising=False)
        worker = CohortWorker(replace(job, cache=tmp_path / name), print)
        (passes,) = worker.passes([prints])
        assert {one.split for one in passes} == {"train", "val", "test"}
        assert worker.fill(prints, [], [(one, 0) for one in passes]) == num


def test_a_folder_without_a_protocol_is_refused_and_the_flag_that_takes_one_is_named():
    with pytest.raises(CellbenchError, match="--cache names a folder"):
        startup.set_cache(None, "/shared/cache")
