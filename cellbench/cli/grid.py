"""The verbs behind the command line: from arguments to printed answers."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import shutil
import sys
import tomllib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
from tqdm import tqdm

from cellbench.config.registry import Registry, shipped
from cellbench.config.run import DataSpec, Experiment, checked, cohorts, expand
from cellbench.data.audit import quick_check
from cellbench.data.dataset import SPLITS, Dataset
from cellbench.data.loading import open_dataset
from cellbench.errors import CellbenchError, unknown_name
from cellbench.execution import multiprocess as processes
from cellbench.execution import ray_cluster, ray_grid
from cellbench.execution.artifacts import pool_folds
from cellbench.execution.grid import Executor, parent_run, run_all, run_sequential
from cellbench.execution.planning import PlannedRun, open_folds, planned_runs
from cellbench.execution.runner import Runner
from cellbench.execution.worker_job import job_spec
from cellbench.features.extractor import CachePolicy
from cellbench.features.remote_cache import set_shared_url, shared_url
from cellbench.files import cache_dir, make_folder, write_atomic
from cellbench.hardware import Hardware, detect_hardware, is_size, parse_bytes
from cellbench.models.backbones.weights import weights_folder
from cellbench.reporting.report import CHANGED, log_request, write_report
from cellbench.system_load import SystemLoad
from cellbench.system_load import describe_load as load_words
from cellbench.tracking import relocate
from cellbench.tracking.system_metrics import log_system_metrics
from cellbench.tracking.tracker import Tracker
from cellbench.training.cost_estimate import estimate_cost, format_duration
from cellbench.training.memory_check import InsufficientMemoryError


def say(text: str) -> None:
    """Prints a line without tearing a progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def experiment_path(name: str) -> Path:
    """The file of that path, or the shipped one of that name. Raises CellbenchError."""
    path = Path(name)
    if path.is_file():
        return path
    inside = shipped("experiments") / f"{path.name.removesuffix('.toml')}.toml"
    if not inside.is_file() or path.parent != Path("."):
        raise unknown_name("experiment file", name, [p.stem for p in shipped("experiments").glob("*.toml")])
    return inside


def read_experiment(
    name: str, changes: Sequence[str] = (), data: Path | None = None, limit: int | None = None, registry: Registry | None = None
) -> Experiment:
    """The experiment of a file, or of a shipped file's name, with ``--set`` changes. Raises CellbenchError.

    A drawn dataset gives way to ``--data``: the same questions are then asked of the person's own folder.
    """
    return read_request(name, changes, data, limit, registry)[0]


def read_request(
    name: str, changes: Sequence[str] = (), data: Path | None = None, limit: int | None = None, registry: Registry | None = None
) -> tuple[Experiment, str]:
    """As :func:`read_experiment`, and the experiment as a file that asks the same without any change of the call. The file is read once."""
    asked = read_tree(name, changes, limit)
    path, tree = asked.path, asked.tree
    if "space" in tree:
        raise CellbenchError(f"{path}: asks for a search. `cellbench search {shlex.quote(str(name))}` runs it.")
    experiment = Experiment.of(tree, str(path))
    registry = registry or Registry()
    card = registry.dataset(experiment.dataset)
    # Names and options now, before any image is drawn or read. Tables of parts that do not run are not used, but must name something.
    for name in experiment.head:
        registry.head(name)
    for name in experiment.baseline:
        registry.baseline(name)
    for run in expand(experiment, str(path)):
        registry.complete(run)
    if data is not None and card.draw:
        asked = asked.on(data)
        experiment = Experiment.of(asked.tree, str(path))
    return experiment, asked.resolved


@dataclass(frozen=True, kw_only=True)
class GridRequest:
    """What a call asks, read once when it starts: a file that is edited or deleted later changes nothing."""

    path: Path
    text: str
    """The file as it was read."""
    tree: dict[str, Any]
    """Its settings with the changes of the call."""
    changes: tuple[str, ...] = ()
    """Those changes, as they were given."""

    def on(self, data: Path) -> GridRequest:
        """The same question on a folder of one's own in place of drawn data."""
        settings = {name: value for name, value in self.tree.get("data", {}).items() if name != "draw"}
        tree = {**self.tree, "dataset": "folder", "experiment": f"{self.tree['experiment']} on {data.absolute().name}"}
        if "data" in tree:
            tree["data"] = settings
        return replace(self, tree=tree, changes=(*self.changes, f"--data {data}"))

    @property
    def resolved(self) -> str:
        """A file that asks the same without any change: the text itself, or its first comments, the changes, and the settings as they ran."""
        if not self.changes:
            return self.text
        lines = self.text.lstrip().splitlines()
        head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
        return "\n".join([*head, f"{CHANGED}{' '.join(' '.join(self.changes).split())}\n", tomli_w.dumps(self.tree)])


def read_tree(name: str, changes: Sequence[str] = (), limit: int | None = None) -> GridRequest:
    """What an experiment's or search's file asks, with ``--set`` changes. Raises CellbenchError."""
    path = experiment_path(name)
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CellbenchError(f"{path}: cannot be read as an experiment: {error}.") from None
    for change in changes:
        _change(tree, change)
    if limit is not None:
        _change(tree, f"data.limit={limit}")
    given = [*(f"--set {shlex.quote(change)}" for change in changes), *([f"--limit {limit}"] if limit is not None else [])]
    return GridRequest(path=path, text=text, tree=tree, changes=tuple(given))


def _change(tree: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise CellbenchError(f"--set {change}: expected KEY=VALUE, like run.epochs=3.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # the shell ate the quotes of a string
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise CellbenchError(f"--set {change}: '{part}' is not a table.")
    tree[parts[-1]] = value


def data_spec(changes: Sequence[str]) -> DataSpec:
    """The settings of ``[data]`` by ``--set data.KEY=VALUE`` alone. Raises CellbenchError."""
    tree: dict[str, Any] = {}
    for change in changes:
        _change(tree, change)
    for key in tree:
        if key != "data":
            raise unknown_name("table", key, ["data"], where="--set")
    return checked(DataSpec, tree.get("data", {}), "[data]")


def cache_budget(text: str | None, url: str | None = None) -> tuple[int, bool]:
    """What ``--cache`` says: the cache folder, how many bytes of features may lie there, and whether to prefer it to memory.

    ``DIR``, ``SIZE`` or ``DIR:SIZE``. With a size, features are kept there for later calls. Without one they go there only where memory
    is too small, into at most a fifth of what is free. With ``--cache-url``, which names what machines share, they are kept for those too.
    Sets ``CELLBENCH_CACHE`` and ``CELLBENCH_CACHE_URL`` for this process.
    """
    if url is not None:
        set_shared_url(url)
    folder, size = None, None
    if text is not None:
        head, colon, tail = text.rpartition(":")
        if is_size(text):
            size = text
        elif colon and is_size(tail) and head:
            folder, size = head, tail
        else:
            folder = text
    if folder is not None:
        os.environ["CELLBENCH_CACHE"] = str(make_folder(Path(folder).absolute()))
    if size is not None:
        return parse_bytes(size, "--cache"), True
    there = cache_dir()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free // 5, bool(shared_url())


def grid(
    file: str,
    *,
    changes: Sequence[str] = (),
    data: Path | None = None,
    weights: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    memory: str = "auto",
    cache: str | None = None,
    cache_url: str | None = None,
    extra: Path | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    workers: int | None = None,
    on: str | None = None,
    gpu_share: float = 1.0,
) -> int:
    """``cellbench grid``: runs an experiment and prints its leaderboard. Exit code 0, or 1 where a run failed."""
    disk, prefer_disk = cache_budget(cache, cache_url)
    registry = Registry(extra)
    experiment, text = read_request(file, changes, data, limit, registry)
    weights = weights_folder(weights)
    if workers is not None and on is not None:
        raise CellbenchError("--workers and --on: either processes of this machine or a cluster. Give one of them.")
    if on is not None:
        ray_cluster.check_address(on, gpu_share)
    here = detect_hardware(device, precision, memory, elsewhere=on is not None and not dry_run)
    if workers is not None:
        processes.check_num_workers(workers, here)
    datasets = open_folds(experiment, registry, data)
    for line in dict.fromkeys(line for dataset in datasets for line in dataset.notes):
        say(line)
    for line in quick_check.severe_findings(registry.dataset(experiment.dataset), datasets[0]):
        say(line)
    jobs = planned_runs(experiment, registry, datasets, weights, file, precision=here.precision_name, download=not dry_run)
    dataset = datasets[0]
    sizes = f"{len(dataset.train)} training, {len(dataset.val)} validation and {len(dataset.test)} test images"
    folds = f" in each of {len(datasets)} folds, or one more or less" if len(datasets) > 1 else ""
    say(f"{experiment.experiment}: {len(jobs)} runs on {dataset.name} ({sizes}{folds}), on {here.name}.")
    if dry_run:
        keeping = CachePolicy(memory_bytes=here.memory_bytes * 2 // 3, disk_bytes=disk, prefer_disk=prefer_disk, key="estimate")
        return _dry(jobs, registry, datasets, here, weights, keeping)
    for line in relocate.fix_artifact_paths():
        say(line)
    tracker = Tracker(experiment.experiment)
    key = hashlib.sha256(
        json.dumps([experiment.model_dump(mode="json"), pool_folds(datasets), here.precision_name], sort_keys=True).encode()
    ).hexdigest()[:16]
    asked = {f"grid.{name}": ", ".join(map(str, values)) for name, values in experiment.grid.items()}
    asked |= {"baselines": ", ".join(experiment.baselines) or "none", "dataset": dataset.name, "precision": here.precision_name}
    with (
        ray_cluster.connect(on, here) if on is not None else nullcontext() as ray,
        parent_run(tracker, f"grid: {Path(file).stem}", key, asked, pool_folds(datasets)) as top,
    ):
        runner = Runner(
            experiment=experiment,
            registry=registry,
            datasets=datasets,
            machine=here,
            weights=weights,
            tracker=tracker,
            parent_id=top.run_id,
            disk_bytes=disk,
            prefer_disk=prefer_disk,
            say=say,
        )
        top.log({"grid/runs": len(jobs)})
        known = log_request(top, text, dataset, here.name)
        with log_system_metrics(tracker, [top.run_id]):
            told = job_spec(
                experiment,
                top.run_id,
                here,
                where=file,
                data=data,
                weights=weights,
                extra=extra,
                disk_bytes=disk,
                prefer_disk=prefer_disk,
            )
            crew: Executor = run_sequential
            if workers is not None:
                crew = processes.ProcessExecutor(workers, told)
            elif ray is not None:
                crew = ray_grid.RayExecutor(ray, told, gpu_share)
            outcome = run_all(runner, jobs, crew)
        ids = {logged.run_id for logged in outcome.finished.values()}
        splits = {
            f"fold {fold}: {split}" if len(datasets) > 1 else split: [sample.name for sample in one.samples(split)]
            for fold, one in enumerate(datasets)
            for split in SPLITS
        }
        write_report(tracker, top, ids, known, splits, outcome.skipped, outcome.failed, say)
        top.log({f"grid/{name}": len(runs) for name, runs in (("finished", ids), ("skipped", outcome.skipped), ("failed", outcome.failed))})
        if outcome.skipped or outcome.failed or outcome.busy:
            say(
                f"without a result: {len(outcome.skipped)} skipped, {len(outcome.failed)} failed, {len(outcome.busy)} with another process."
            )
        say(
            f"everything is in MLflow: `cellbench ui` or `mlflow ui` here, experiment '{experiment.experiment}'; its parent run has report.html."
        )
        if outcome.failed:
            top.end("failed", f"{len(outcome.failed)} runs failed")
    return 1 if outcome.failed else 0


def _dry(
    jobs: list[PlannedRun], registry: Registry, datasets: Sequence[Dataset], here: Hardware, weights: Path | None, keeping: CachePolicy
) -> int:
    for job in jobs:
        say(f"  {job.name}" + (f"  skipped: {job.unavailable}" if job.unavailable else ""))
    wall, memory, disk, busy = 0.0, 0.0, 0.0, SystemLoad()
    known = {id(job.run): job for job in jobs}
    for number, group in enumerate(cohorts(job.run for job in jobs), 1):
        first = group[0]
        title = f"cohort {number}: {first.backbone or first.baseline}, {len(group)} run{'s' if len(group) > 1 else ''}"
        if known[id(first)].unavailable:
            say(f"{title}: skipped")
            continue
        if first.baseline and not registry.baseline(first.baseline).trained:
            say(f"{title}: nothing to train")
            continue
        try:
            one = estimate_cost(group, registry, datasets[first.fold], here, weights, keeping)
        except InsufficientMemoryError as error:
            say(f"{title}: would be skipped: {error}")
            continue
        speed = f", backbone {one.trunk_tiles_per_s:.0f} tiles/s" if first.backbone else ""
        say(
            f"{title}: {one.train_tiles} training tiles an epoch, {one.val_tiles} validation and {one.test_tiles} test tiles{speed}; "
            f"about {format_duration(one.wall_s)}, {one.memory_mib / 1024:.1f} GiB of memory; {one.source}"
        )
        wall, memory, disk = wall + one.wall_s, max(memory, one.memory_mib), disk + one.disk_mib
    busy_words = load_words(busy.others_pct())
    say(
        f"in all about {format_duration(wall)}, up to {memory / 1024:.1f} GiB of memory and {disk:.0f} MiB of disk for results "
        f"(from a few tiles timed now{', ' if busy_words else ''}{busy_words})"
    )
    return 0


def bench(
    *,
    backbone: str = "",
    data: Path | None = None,
    weights: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    out: Path | None = None,
    quick: bool = False,
    scale: bool = False,
) -> int:
    """``cellbench bench``: measures, prints, and writes JSON and a plot to ``out``. Exit code 1 where a check failed."""
    from cellbench.diagnostics import scaling
    from cellbench.diagnostics.speed import BenchmarkSetup, as_json, measure, table

    registry = Registry()
    if out is not None:
        make_folder(out)
    if not backbone:
        there = weights is not None and any(weights.glob("vit*tiny*"))
        backbone = "vit-tiny-in1k" if there else "vit-tiny-random"
    spec = DataSpec(limit=3 if quick else None, draw={} if data else {"num_train": 8, "num_test": 2})
    dataset = open_dataset(registry.dataset("folder" if data else "smears"), data, spec)
    world = BenchmarkSetup(
        registry=registry,
        dataset=dataset,
        machine=detect_hardware(device, precision),
        backbone=backbone,
        weights=weights,
        epochs=2 if quick else 3,
        crops=8 if quick else 16,
        quick=quick,
        say=say,
    )
    if scale:
        found = scaling.measure(world, say)
        say("")
        say(scaling.table(found))
        if out is not None:
            write_atomic(out / "scale.json", scaling.as_json(found))
            say(f"written to {out}/scale.json")
        return 0
    result = measure(world)
    say("")
    say(table(result))
    if out is not None:
        from cellbench.reporting.plots import comparison as comparison_plots
        from cellbench.reporting.plots import run as run_plots

        write_atomic(out / "bench.json", as_json(result))
        run_plots.save_figure(comparison_plots.plot_speeds(result.facts), out / "bench.png")
        say(f"written to {out}/bench.json and bench.png")
    return 0 if all(result.checks.values()) else 1
