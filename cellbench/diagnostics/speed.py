"""``bench``: the speed of each part on this machine, in one process, as ratios that hold on a slower or busier machine too.

It also checks that a cohort's runs equal the same runs alone, that cached features equal streamed ones, and that the naive protocol reaches
the same Dice.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cellbench.console import Column, format_table
from cellbench.data.transforms.tiling import Stitcher
from cellbench.diagnostics import naive_reference
from cellbench.diagnostics.benchmark_setup import BenchmarkSetup, seconds, store_in
from cellbench.diagnostics.script_comparison import ProcessCost, cost_of_grid, cost_of_script, settings_of
from cellbench.diagnostics.search_throughput import measure_throughput
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.hardware import Hardware
from cellbench.parallel import WorkerPool
from cellbench.startup import torch_threads
from cellbench.tracking.schema import NOTE, run_params
from cellbench.tracking.tracker import Tracker
from cellbench.training import checkpoints
from cellbench.training.model import build_model, num_levels
from cellbench.training.tiled_inference import segment_images
from cellbench.training.trainer import HeadTrainer

CHUNKS = 12
"""Batches that the feature pass is measured on, at least."""


@dataclass
class BenchmarkResult:
    """The measurements: ``rows`` for display (name, value, unit, ratio as text), ``facts`` for JSON."""

    machine: str
    backbone: str
    rows: list[tuple[str, float, str, str]] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    def add(self, fact: str, name: str, value: float, unit: str, ratio: str = "") -> None:
        self.facts[fact] = value
        self.rows.append((name, value, unit, ratio))


def measure(setup: BenchmarkSetup) -> BenchmarkResult:
    """All measurements, in an order in which each part warms up the next. Prints each part when it is measured."""
    out = BenchmarkResult(machine=setup.machine.name, backbone=setup.backbone)
    setup.say(f"{out.backbone} on {out.machine}")
    if setup.card:
        settings = settings_of(setup)
        with measuring("a plain script, and the whole of grid beside it", setup, out):
            script, grid = cost_of_script(settings), cost_of_grid(settings, setup)
            whole_processes(setup, out, script, grid)
        if setup.peer:
            with measuring(setup.peer, setup, out):
                peer = cost_of_script(settings, f"{setup.peer}_reference")
                faster = f"grid is {peer.wall_s / grid.wall_s:.2f} x as fast; Dice {peer.dice:.4f} over tiles"
                out.add("peer_s", f"{setup.peer}: the same runs, maps written to disk once, fp32", peer.wall_s, "s", faster)
                out.add("peer_cpu_s", "the same in processor time", peer.cpu_s, "s")
    with measuring("the feature pass", setup, out):
        feature_pass(setup, out)
    with measuring("heads", setup, out):
        heads(setup, out)
    with measuring("a cohort of runs, and the same runs one by one", setup, out):
        cohort = _cohorts(setup, out)
    with measuring("trials of a search", setup, out):
        _trials(setup, out)
    with measuring("the naive protocol", setup, out):
        _naive(setup, out, cohort)
    with measuring("testing", setup, out):
        _testing(setup, out, cohort)
    with measuring("MLflow", setup, out):
        _mlflow(setup, out)
    return out


@contextlib.contextmanager
def measuring(what: str, setup: BenchmarkSetup, out: BenchmarkResult) -> Iterator[None]:
    """Says what is measured inside ``with``, and afterwards the rows that this added."""
    setup.say(f"measuring {what} …")
    before = len(out.rows)
    yield
    for line in rows_as_text(out.rows[before:]):
        setup.say(line)


def whole_processes(setup: BenchmarkSetup, out: BenchmarkResult, script: ProcessCost, grid: ProcessCost) -> None:
    """Adds what the script and the whole of ``grid`` cost."""
    num = len(setup.runs)
    out.add("script_s", f"script: {num} runs one after another, features cached, fp32", script.wall_s, "s", f"Dice {script.dice:.4f}")
    faster = f"{script.wall_s / grid.wall_s:.2f} x the script's speed; Dice {grid.dice:.4f}"
    out.add("grid_s", "grid: the same runs, with MLflow, instance scores, report", grid.wall_s, "s", faster)
    for name, cost in (("script", script), ("grid", grid)):
        out.facts |= {f"{name}_cpu_s": cost.cpu_s, f"{name}_peak_mib": cost.peak_mib, f"{name}_dice": cost.dice}
    out.add("grid_cpu_s", "the same in processor time", grid.cpu_s, "s", f"script {script.cpu_s:.1f} s")
    out.add("grid_peak_mib", "peak memory of grid", grid.peak_mib, "MiB", f"script {script.peak_mib:,.0f} MiB")
    if not math.isnan(grid.gpu_busy_pct):
        out.add(
            "grid_gpu_busy_pct",
            "the GPU is busy during grid, its start included",
            grid.gpu_busy_pct,
            "%",
            f"script {script.gpu_busy_pct:.0f} %",
        )


def feature_pass(setup: BenchmarkSetup, out: BenchmarkResult, name: str = "") -> None:
    """The feature pass of the setup's backbone from images, beside the bare network. ``name``: of another than the setup's own."""
    fact, of = (f"_{name}", f"{name}: ") if name else ("", "")
    chunk = setup.machine.chunk
    # Whole chunks, and enough of them to keep all lanes busy to the end.
    crops = chunk * -(-CHUNKS // len(setup.pixels["train"]))
    features = setup.features([run.model_copy(update={"crops_per_image": crops, "epochs": 4}) for run in setup.runs], memory_bytes=0)
    indices = features.backbone.indices
    random = torch.rand(4 * chunk, 3, 224, 224, device=setup.machine.device)
    net = getattr(setup.frozen, "net", None)

    def bare(num: int = chunk) -> None:
        with _all_cores(setup.machine), torch.inference_mode(), setup.machine.autocast():
            if net is not None:
                net.forward_intermediates(random[:num], indices=list(indices), norm=True, stop_early=True, intermediates_only=True)
            else:
                setup.frozen(random[:num], indices)
        setup.machine.wait()

    def one_pass(epoch: int) -> None:
        with WorkerPool(setup.machine.lanes) as pool:
            for _ in features.train(epoch, pool):
                pass
        setup.machine.wait()

    one_pass(0)  # decodes every image once
    num_tiles = features.plan.num_views
    # In turn, so that a machine that slows down slows both.
    speeds = [
        (statistics.median(chunk / seconds(bare) for _ in range(max(1, num_tiles // chunk))), num_tiles / seconds(lambda: one_pass(epoch)))  # noqa: B023  called at once
        for epoch in (1, 2, 3)
    ]
    bare_speed, pass_speed = (statistics.median(column) for column in zip(*speeds, strict=True))
    ratio = out.facts[f"pass_over_bare{fact}"] = statistics.median(whole / alone for alone, whole in speeds)
    out.add(f"bare_tiles_per_s{fact}", f"{of}bare timm forward, tensors in memory", bare_speed, "tiles/s")
    out.add(f"pass_tiles_per_s{fact}", f"{of}feature pass from images", pass_speed, "tiles/s", f"{ratio:.0%} of the bare forward")
    if not setup.quick and not name:
        # The batch size is part of the numbers (kernels depend on the shape and round differently), so each kind of device has a fixed one.
        # These rows show what that costs here.
        for num in (chunk // 4, chunk // 2, 2 * chunk, 4 * chunk):
            speed = num / min(seconds(lambda: bare(num)) for _ in range(4))  # noqa: B023  called at once
            name = f"bare timm forward, batches of {num} instead of {chunk}"
            out.add(f"bare_{num}_tiles_per_s", name, speed, "tiles/s", f"{speed / bare_speed:.0%}")


def heads(setup: BenchmarkSetup, out: BenchmarkResult) -> None:
    """Training steps of each head alone."""
    runs = [setup.run(head, 1e-3) for head in dict.fromkeys((*setup.heads, "detail"))]  # `doctor HEAD` times any
    features = setup.features(runs)
    with WorkerPool(1) as pool:
        batch = next(iter(features.train(0, pool)))
    for run in runs:

        def tiles_per_s(trainer: HeadTrainer) -> float:
            def steps() -> None:
                trainer.start_epoch()
                trainer.train_on(batch)
                setup.machine.wait()

            return batch.num / min(seconds(steps) for _ in range(4))

        captured = tiles_per_s(setup.trainer(run, features, batch.num))
        eager = ""
        if setup.machine.device.type == "cuda":
            speed = out.facts[f"head_{run.head}_eager_tiles_per_s"] = tiles_per_s(setup.trainer(run, features, batch.num, capture=False))
            eager = f"{captured / speed:.1f} x the speed without a CUDA graph"
        out.add(f"head_{run.head}_tiles_per_s", f"head alone: {run.head}", captured, "tiles/s", eager)


def _cohorts(setup: BenchmarkSetup, out: BenchmarkResult) -> list[HeadTrainer]:
    num = len(setup.runs)
    cohort_s, cohort = setup.fitted(setup.runs)
    places = range(1, num, len(setup.rates)) if setup.quick else range(num)  # one of each head, or all
    alone = {k: setup.fitted([setup.runs[k]]) for k in places}
    alone_s = sum(wall_s for wall_s, _ in alone.values()) * num / len(places)
    out.checks["a run is the same alone and in a cohort"] = all(_same(setup, cohort[k], found[0]) for k, (_, found) in alone.items())
    repeated = [run.model_copy(update={"repeat_views_every": 1}) for run in setup.runs]
    cached_s, cached = setup.fitted(repeated)
    _, streamed = setup.fitted(repeated[:1], memory_bytes=0)
    out.checks["cached features equal streamed ones"] = _same(setup, cached[0], streamed[0])
    faster = f"{cohort_s / cached_s:.1f} x faster than fresh views"
    out.add("cohort_s", f"{num} runs as one cohort", cohort_s, "s")
    out.add("cohort_kept_s", "the same, repeat_views_every = 1, features cached", cached_s, "s", faster)
    out.add("alone_s", "the same runs one by one", alone_s, "s", f"the cohort is {alone_s / cohort_s:.1f} x faster")
    return cohort


def _trials(setup: BenchmarkSetup, out: BenchmarkResult) -> None:
    speed = measure_throughput(
        setup.registry,
        setup.backbone,
        setup.heads,
        {**setup.run_settings, "repeat_views_every": 1},
        setup.fitted,
        num=4 if setup.quick else 8,
        tolerance=setup.tolerance,
    )
    out.checks["a trial is the same alone and in its batch"] = speed.same
    faster = f"{speed.together / speed.alone:.1f} x one at a time"
    if script_s := out.facts.get("script_s"):
        faster += f"; {speed.together * script_s / 60 / len(setup.runs):.1f} x the script's runs"
    out.add("trials_per_minute", f"search, {speed.num} trials in a batch", speed.together, "trials/min", faster)
    out.add("trials_per_minute_alone", "search, one trial at a time", speed.alone, "trials/min")


def _naive(setup: BenchmarkSetup, out: BenchmarkResult, cohort: list[HeadTrainer]) -> None:
    """One run of each head in fp32, scaled to all rates; ``quick`` and ``reopen`` train one epoch and scale to all."""
    fp32 = replace(setup.machine, precision_name="fp32")
    wall_s, gaps = {"held": 0.0, "reopen": 0.0}, []
    for k, head in enumerate(setup.heads):
        run, twin = setup.run(head, setup.rates[1]), cohort[k * len(setup.rates) + 1]
        frozen = FrozenBackbone(setup.frozen, fp32, [num_levels(setup.registry.part(run))])
        for how in ("held", "reopen"):
            model: torch.nn.Module = build_model(run, setup.registry.part(run), frozen, len(setup.dataset.classes)).head
            if head == "transposed-conv" and how == "reopen":  # the published head; with images held ours, whose Dice is compared
                model = naive_reference.PublishedHead(setup.frozen.levels[-1].dim, len(setup.dataset.classes))
            model = model.to(fp32.device).to(memory_format=torch.contiguous_format)
            epochs = setup.epochs if how == "held" and not setup.quick else 1
            start = time.perf_counter()
            with _all_cores(setup.machine):
                dice = naive_reference.train(
                    run, model, setup.frozen, frozen.indices, setup.dataset, epochs, rate=twin.lr, reopen=how == "reopen"
                )
            wall_s[how] += (time.perf_counter() - start) * setup.epochs / epochs
            if how == "held":
                gaps.append(abs(dice - twin.history[epochs - 1]["val/dice"]))
    for how, description in (("held", "decoded images held in memory"), ("reopen", "images opened for each crop, published head")):
        naive_s = wall_s[how] * len(setup.rates)
        fresh, cached = (naive_s / out.facts[fact] for fact in ("cohort_s", "cohort_kept_s"))
        faster = f"naive: the cohort is {fresh:.1f} x faster, with repeat_views_every = 1 {cached:.1f} x"
        out.add(f"naive_{how}_s", f"naive: {len(setup.runs)} runs, {description}", naive_s, "s", faster)
    out.facts["naive_dice_gap"] = max(gaps)
    out.checks[f"the naive protocol's validation Dice agrees (largest gap {max(gaps):.4f})"] = max(gaps) < 0.01


def _testing(setup: BenchmarkSetup, out: BenchmarkResult, cohort: list[HeadTrainer]) -> None:
    features = setup.features(setup.runs)
    models = [trainer.model for trainer in cohort]
    num = len(setup.pixels["test"])
    each_s = seconds(lambda: list(segment_images(models, features, "test"))) / num
    trunk_s = features.backbone.seconds / num
    grid = features.grid("test", 0)
    scores = torch.rand(setup.machine.chunk, 1, 224, 224, device=setup.machine.device)

    def blend() -> None:
        stitcher = Stitcher(grid, 1, setup.machine.device)
        for start in range(0, len(grid), len(scores)):
            stitcher.add(scores[: len(grid) - start])
        setup.machine.wait()

    blend_s = min(seconds(blend) for _ in range(3))
    out.facts["blend_over_forward"] = blend_s / trunk_s
    share = f"{trunk_s / each_s:.0%} of it the backbone, once for all"
    out.add("test_s_per_image", f"testing, {len(models)} runs at once", each_s, "s an image", share)
    out.add("blend_s", "blending one run's image", blend_s, "s", f"{blend_s / trunk_s:.1%} of the backbone's forward")


def _mlflow(setup: BenchmarkSetup, out: BenchmarkResult) -> None:
    with tempfile.TemporaryDirectory(prefix="cellbench-bench-") as folder, store_in(Path(folder)), contextlib.chdir(folder):
        tracker = Tracker("bench")
        num = min(setup.epochs, 2 + int(out.facts["cohort_s"] / checkpoints.EVERY_S))
        run_s = statistics.median(seconds(lambda: _log_run(tracker, setup, num)) for _ in range(7))
    share = out.facts["mlflow_share"] = run_s * len(setup.runs) / out.facts["cohort_s"]
    ratio = f"{share:.1%} of the cohort's wall time; under 1 % where a run takes {100 * run_s:.1f} s or more"
    out.add("mlflow_run_s", "MLflow, all that a run logs", run_s, "s", ratio)


def _log_run(tracker: Tracker, setup: BenchmarkSetup, num_epochs: int) -> None:
    """Logs what a run of the cohort logs: parameters, epochs and results, without figures."""
    row = {"train/loss": 1.0, "val/loss": 1.0, "val/dice": 0.5, "val/iou": 0.5, "lr": 1e-3}
    with tracker.run("bench", "bench") as run, tempfile.TemporaryDirectory(prefix="cellbench-bench-") as folder:
        run.log({}, params=run_params(setup.runs[0], setup.dataset.name, setup.machine.precision_name))
        run.log_input(setup.dataset.name, setup.dataset.digest, str(setup.dataset.root), "training")
        for epoch in range(num_epochs):
            run.buffer(epoch, row)
            run.log({})
        (Path(folder) / "per_image.json").write_text("{}", encoding="utf-8")
        run.log_artifacts(Path(folder))
        run.end("finished", metrics={f"test/{k}": 0.5 for k in range(60)}, tags={NOTE: "."})


def _same(setup: BenchmarkSetup, a: HeadTrainer, b: HeadTrainer) -> bool:
    """Whether two runs are equal, bit by bit on a CPU. On a GPU rounding differs and training amplifies it, so only the first epoch's loss is compared."""
    if setup.tolerance:
        return math.isclose(a.history[0]["train/loss"], b.history[0]["train/loss"], rel_tol=setup.tolerance)
    mine, other = a.model.state_dict(), b.model.state_dict()
    return a.history == b.history and all(torch.equal(x, other[name]) for name, x in mine.items())


def _all_cores(machine: Hardware) -> contextlib.AbstractContextManager[None]:
    """Runs each operation on all cores, which is torch's default."""
    return torch_threads(machine.lanes * machine.threads)


def checks_as_text(result: BenchmarkResult) -> str:
    """Whether the faster ways gave the numbers of the slower ones."""
    return "\n".join(f"{'yes' if good else 'NO '}  {name}" for name, good in result.checks.items())


def rows_as_text(rows: Sequence[tuple[str, float, str, str]]) -> list[str]:
    """Rows of measurements as lines, each ratio below what it is of."""
    columns = [Column("name", cut=True), Column("value", right=True), Column("unit")]
    values = format_table(columns, [(name, _number(value), unit) for name, value, unit, _ in rows], headings=False)
    return [line for text, (*_, ratio) in zip(values, rows, strict=True) for line in (text, *([f"    {ratio}"] if ratio else []))]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.4f}"
