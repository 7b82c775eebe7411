"""``bench``: how fast this machine is at each part, in one process and one run, as ratios that survive a slower or busier machine.

While it measures it checks: a cohort's runs equal the same runs alone, kept features equal streamed ones, and the naive protocol reaches the
same Dice.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.data.dataset import Dataset
from cellbench.data.image_cache import ImageCache
from cellbench.data.transforms.sampling import SamplingPlan
from cellbench.data.transforms.tiling import Stitcher
from cellbench.diagnostics import naive_reference
from cellbench.diagnostics.search_throughput import measure_throughput
from cellbench.features.extractor import Batch, CachePolicy, Features
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.hardware import Hardware
from cellbench.models.backbones.build import open_backbone
from cellbench.parallel import WorkerPool
from cellbench.tracking.schema import NOTE, run_params
from cellbench.tracking.tracker import Tracker
from cellbench.training import checkpoints
from cellbench.training.fit import fit
from cellbench.training.model import build_model, num_levels
from cellbench.training.stacked_heads import StackedHeads
from cellbench.training.tiled_inference import segment_images
from cellbench.training.trainer import HeadTrainer

HEADS = ("bilinear", "transposed-conv", "fpn")
RATES = (5e-4, 1e-3, 2e-3)
CHUNKS = 12
"""That the feature pass is measured on, at least."""


@dataclass
class BenchmarkResult:
    """What was measured. ``rows`` are (name, value, unit, ratio in words)."""

    machine: str
    backbone: str
    rows: list[tuple[str, float, str, str]] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str, ratio: str = "") -> None:
        self.rows.append((name, value, unit, ratio))


@dataclass(kw_only=True)
class BenchmarkSetup:
    """What all measurements share. After :meth:`fitted`, ``trunk_s`` is what its backbone took."""

    registry: Registry
    dataset: Dataset
    machine: Hardware
    backbone: str
    weights: Path | None
    epochs: int
    crops: int
    quick: bool = False
    """Fewer runs and epochs of what is the same over and over, multiplied out."""
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.frozen = open_backbone(self.registry.backbone(self.backbone), self.weights)
        self.pixels = {split: ImageCache(self.dataset, split, 2**31) for split in ("train", "val", "test")}
        self.runs = [self.run(head, rate) for head in HEADS for rate in RATES]

    @property
    def tolerance(self) -> float:
        """How far what should be the same may differ, as a share: nothing on a processor."""
        return 0.0 if self.machine.device.type == "cpu" else 0.02

    def run(self, head: str, rate: float, **more: Any) -> RunSpec:
        settings = {"epochs": self.epochs, "crops_per_image": self.crops, "patience": 0, "overlap": 0.25, **more}
        return self.registry.complete(RunSpec(backbone=self.backbone, head=head, lr=rate, **settings))

    def features(self, runs: list[RunSpec], memory_bytes: int = 2**33) -> Features:
        trunk = FrozenBackbone(self.frozen, self.machine, [num_levels(run, self.registry) for run in runs])
        return Features(trunk, SamplingPlan(self.pixels["train"].sizes_px, runs[0]), self.pixels, CachePolicy(memory_bytes=memory_bytes))

    def learner(self, run: RunSpec, features: Features, num_views: int) -> HeadTrainer:
        made = build_model(run, self.registry, features.trunk, len(self.dataset.classes))
        return HeadTrainer(run=run, model=made, recorder=_Nobody(), num_views=num_views).on(features)

    def fitted(self, runs: list[RunSpec], memory_bytes: int = 2**33) -> tuple[float, list[HeadTrainer]]:
        """Seconds of a whole ``fit``, and the learners."""
        features = self.features(runs, memory_bytes)
        learners = [self.learner(run, features, features.plan.num_views) for run in runs]
        start = time.perf_counter()
        fit(learners, features)
        wall_s, self.trunk_s = time.perf_counter() - start, features.trunk.seconds
        return wall_s, learners


class _Nobody:
    def epoch(self, epoch: int, metrics: dict[str, float]) -> bool:
        return True

    def checkpoint(self, state: dict[str, Any]) -> None:
        pass


def measure(world: BenchmarkSetup) -> BenchmarkResult:
    """Everything, in an order in which each part warms up the next."""
    out = BenchmarkResult(machine=world.machine.name, backbone=world.backbone)
    for title, part in (
        ("the frozen pass", _passes),
        ("heads", _heads),
        ("a cohort of nine runs, and the same one by one", _cohorts),
        ("trials of a search", _trials),
        ("the naive protocol", _naive),
        ("testing", _testing),
        ("MLflow", _mlflow),
    ):
        world.say(f"measuring {title} …")
        part(world, out)
    return out


def _passes(world: BenchmarkSetup, out: BenchmarkResult) -> None:
    chunk = world.machine.chunk
    # Whole chunks, and enough of them that all lanes are busy to the end.
    crops = chunk * -(-CHUNKS // len(world.pixels["train"]))
    features = world.features([run.model_copy(update={"crops_per_image": crops}) for run in world.runs], memory_bytes=0)
    trunk = features.trunk
    random = torch.rand(4 * chunk, 3, 224, 224, device=world.machine.device)
    net = getattr(world.frozen, "net", None)

    def bare(pixels: torch.Tensor = random[:chunk]) -> None:
        with _as_usual(world.machine), torch.inference_mode(), world.machine.autocast():
            if net is not None:
                net.forward_intermediates(pixels, indices=list(trunk.indices), norm=True, stop_early=True, intermediates_only=True)
            else:
                world.frozen(pixels, trunk.indices)
        world.machine.wait()

    def one_pass() -> None:
        with WorkerPool(world.machine.lanes) as lanes:
            for _ in features.train(0, lanes):
                pass
        world.machine.wait()

    one_pass()  # decodes every image once
    num = features.plan.num_views
    speeds = {"bare": [], "pass": []}
    for _ in range(3):  # in turn, so that a machine that slows down slows both
        speeds["bare"].append(statistics.median(chunk / _seconds(bare) for _ in range(max(1, num // chunk))))
        speeds["pass"].append(num / _seconds(one_pass))
    bare_speed, pass_speed = statistics.median(speeds["bare"]), statistics.median(speeds["pass"])
    ratio = statistics.median(p / b for p, b in zip(speeds["pass"], speeds["bare"], strict=True))
    out.facts |= {"bare_tiles_per_s": bare_speed, "pass_tiles_per_s": pass_speed, "pass_over_bare": ratio}
    out.add("bare timm forward, tensors in memory", bare_speed, "tiles/s")
    out.add("feature pass from images", pass_speed, "tiles/s", f"{ratio:.0%} of the bare forward")
    if not world.quick:
        # How many go through at once is part of the numbers (kernels are chosen by the shape, and round differently), so it is fixed for a kind
        # of device and not measured at each start. This says what that costs here.
        for num in (chunk // 4, chunk // 2, 2 * chunk, 4 * chunk):
            speed = num / min(_seconds(lambda num=num: bare(random[:num])) for _ in range(4))
            out.facts[f"bare_{num}_tiles_per_s"] = speed
            out.add(f"bare timm forward, {num} at once in place of {chunk}", speed, "tiles/s", f"{speed / bare_speed:.0%}")


def _heads(world: BenchmarkSetup, out: BenchmarkResult) -> None:
    runs = [world.run(head, 1e-3) for head in world.registry.names("heads")]
    features = world.features(runs)
    with WorkerPool(1) as lanes:
        batch = next(iter(features.train(0, lanes)))
    for run in runs:
        learner = world.learner(run, features, batch.num)

        def steps(learner: HeadTrainer = learner) -> None:
            learner.begin()
            learner.take(batch)
            world.machine.wait()

        speed = batch.num / min(_seconds(steps) for _ in range(4))
        out.facts[f"head_{run.head}_tiles_per_s"] = speed
        out.add(f"head alone: {run.head}", speed, "tiles/s")
    _as_one(world, features, batch, out)


def _as_one(world: BenchmarkSetup, features: Features, batch: Batch, out: BenchmarkResult) -> None:
    """Steps of heads of one kind as a team (`cellbench.training.stacked_heads`), which a GPU wants and a processor does not, against the same one by one."""
    runs = [world.run("fpn", rate, batch_size=8) for rate in RATES]
    team, alone = ([world.learner(run, features, num_views=4 * 8) for run in runs] for _ in range(2))
    parties = {"one by one": alone, "as one": [StackedHeads(team)]}
    for party in (*alone, *parties["as one"]):
        party.begin()

    def step(how: str) -> None:
        for party in parties[how]:
            party.take(batch[:8])
        world.machine.wait()

    # In turn; the first of each warms up.
    times = [{how: _seconds(lambda how=how: step(how)) for how in parties} for _ in range(4)][1:]
    best = {how: min(each[how] for each in times) for how in parties}
    ratio = best["one by one"] / best["as one"]
    parties["as one"][0].end()
    out.checks["heads that learn as one learn what each does alone"] = all(
        math.isclose(float(a.loss_sum), float(b.loss_sum), rel_tol=0.02) for a, b in zip(team, alone, strict=True)
    )
    out.facts["as_one_speedup"] = ratio
    faster = f"{ratio:.1f} x faster than one by one" if ratio >= 1 else f"{1 / ratio:.1f} x slower than one by one"
    out.add(f"{len(runs)} heads of one kind (fpn), a step of all as one", best["as one"], "s", f"{faster}, on {world.machine.name}")


def _cohorts(world: BenchmarkSetup, out: BenchmarkResult) -> None:
    together_s, cohort = world.fitted(world.runs)
    places = range(1, len(world.runs), len(RATES)) if world.quick else range(len(world.runs))  # one of each head, or all
    alone = {k: world.fitted([world.runs[k]]) for k in places}
    alone_s = sum(seconds for seconds, _ in alone.values()) * len(world.runs) / len(places)
    out.checks["a run is the same alone and in a cohort"] = all(_same(world, cohort[k], found[0]) for k, (_, found) in alone.items())
    repeated = [run.model_copy(update={"repeat_views_every": 1}) for run in world.runs]
    kept_s, kept = world.fitted(repeated)
    _, streamed = world.fitted(repeated[:1], memory_bytes=0)
    out.checks["kept features equal streamed ones"] = _same(world, kept[0], streamed[0])
    out.facts |= {"cohort_s": together_s, "alone_s": alone_s, "cohort_kept_s": kept_s}
    out.add("nine runs as one cohort", together_s, "s")
    out.add("the same with repeat_views_every = 1, features kept", kept_s, "s", f"{together_s / kept_s:.1f} x faster than fresh views")
    out.add("the same runs one by one", alone_s, "s", f"the cohort is {alone_s / together_s:.1f} x faster")
    world.cohort = cohort


def _trials(world: BenchmarkSetup, out: BenchmarkResult) -> None:
    settings = {"epochs": world.epochs, "crops_per_image": world.crops, "patience": 0, "overlap": 0.25, "repeat_views_every": 1}
    speed = measure_throughput(
        world.registry, world.backbone, HEADS, settings, world.fitted, num=4 if world.quick else 8, tolerance=world.tolerance
    )
    out.facts |= {"trials_per_minute": speed.together, "trials_per_minute_alone": speed.alone}
    out.checks["a trial is the same alone and in its batch"] = speed.same
    out.add(f"search, {speed.num} trials in a batch", speed.together, "trials/min", f"{speed.together / speed.alone:.1f} x one at a time")
    out.add("search, one trial at a time", speed.alone, "trials/min")


def _naive(world: BenchmarkSetup, out: BenchmarkResult) -> None:
    """Each head for one run, fp32; nine runs are three times the three. Fewer epochs where they are all alike, multiplied out."""
    fp32 = Hardware(device=torch.device("cpu"), precision=torch.float32, memory_bytes=0)
    threes, gaps = {"reopen": 0.0, "held": 0.0}, []
    for k, head in enumerate(HEADS):
        run = world.run(head, RATES[1])
        trunk = FrozenBackbone(world.frozen.to("cpu"), fp32, [num_levels(run, world.registry)])
        for how in ("held", "reopen"):
            made: torch.nn.Module = (
                build_model(run, world.registry, trunk, len(world.dataset.classes)).to(memory_format=torch.contiguous_format).head
            )
            if head == "transposed-conv" and how == "reopen":  # as published, weights and all; the held one shows that the Dice is the same
                made = naive_reference.PublishedHead(trunk.backbone.levels[-1].dim, len(world.dataset.classes))
            epochs = world.epochs if how == "held" and not world.quick else 1
            start = time.perf_counter()
            rate = world.cohort[k * len(RATES) + 1].lr
            with _as_usual(world.machine):
                _, dice = naive_reference.train(
                    run, made, world.frozen, trunk.indices, world.dataset, epochs, rate=rate, reopen=how == "reopen"
                )
            threes[how] += (time.perf_counter() - start) * world.epochs / epochs
            if how == "held":
                gaps.append(abs(dice - world.cohort[k * len(RATES) + 1].history[epochs - 1]["val/dice"]))
    world.frozen.to(world.machine.device)
    cohort_s = out.facts["cohort_s"]
    for how, words in (("held", "decoded images held"), ("reopen", "images opened for each crop, the published head")):
        naive_s = threes[how] * len(RATES)
        out.facts[f"naive_{how}_s"] = naive_s
        faster = f"{naive_s / cohort_s:.1f} x faster, with repeat_views_every = 1 {naive_s / out.facts['cohort_kept_s']:.1f} x"
        out.add(f"naive: nine runs, {words}", naive_s, "s", f"naive: the cohort is {faster}")
    out.facts["naive_dice_gap"] = max(gaps)
    out.checks[f"the naive protocol's validation Dice agrees (largest gap {max(gaps):.4f})"] = max(gaps) < 0.01


def _testing(world: BenchmarkSetup, out: BenchmarkResult) -> None:
    features = world.features(world.runs)
    made = [learner.model for learner in world.cohort]
    start = time.perf_counter()
    num = sum(1 for _ in segment_images(made, features, "test"))
    each = (time.perf_counter() - start) / num
    trunk_share = features.trunk.seconds / num
    grid = features.grid("test", 0)
    scores = torch.rand(world.machine.chunk, 1, 224, 224, device=world.machine.device)

    def blend() -> None:
        stitcher = Stitcher(grid, 1, world.machine.device)
        for start in range(0, len(grid), len(scores)):
            stitcher.add(scores[: len(grid) - start])
        world.machine.wait()

    blend_s = min(_seconds(blend) for _ in range(3))
    out.facts |= {"test_s_per_image": each, "blend_over_forward": blend_s / trunk_share}
    out.add(f"testing, {len(made)} runs at once", each, "s an image", f"{trunk_share / each:.0%} of it the backbone, once for all")
    out.add("blending one run's image", blend_s, "s", f"{blend_s / trunk_share:.1%} of the backbone's forward")


def _mlflow(world: BenchmarkSetup, out: BenchmarkResult) -> None:
    import os

    before = os.environ.get("MLFLOW_TRACKING_URI")
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="cellbench-bench-") as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.chdir(folder)
        try:
            tracker = Tracker("bench")
            num = min(world.epochs, 2 + int(out.facts["cohort_s"] / checkpoints.EVERY_S))
            run_s = statistics.median(_seconds(lambda: _told(tracker, world, num)) for _ in range(7))
        finally:
            os.chdir(here)
            os.environ.pop("MLFLOW_TRACKING_URI") if before is None else os.environ.update(MLFLOW_TRACKING_URI=before)
    share = run_s * len(world.runs) / out.facts["cohort_s"]
    out.facts |= {"mlflow_run_s": run_s, "mlflow_share": share}
    out.add(
        "MLflow, all that a run tells it",
        run_s,
        "s",
        f"{share:.1%} of the cohort's wall time; under 1 % where a run takes {100 * run_s:.1f} s or more",
    )


def _told(tracker: Tracker, world: BenchmarkSetup, num: int) -> None:
    """All that a run of the cohort tells MLflow: its params, its epochs ``num`` times, and what a finished one leaves, pictures aside."""
    row = {"train/loss": 1.0, "val/loss": 1.0, "val/dice": 0.5, "val/iou": 0.5, "lr": 1e-3}
    with tracker.run("bench", "bench") as run, tempfile.TemporaryDirectory(prefix="cellbench-bench-") as folder:
        run.log({}, params=run_params(world.runs[0], world.dataset.name, world.machine.precision_name))
        run.data(world.dataset.name, world.dataset.digest, str(world.dataset.root), "training")
        for told in range(num):
            run.keep(told, row)
            run.log({})
        (Path(folder) / "per_image.json").write_text("{}", encoding="utf-8")
        run.artifacts(Path(folder))
        run.end("finished", metrics={f"test/{k}": 0.5 for k in range(60)}, tags={NOTE: "."})


def _same(world: BenchmarkSetup, a: HeadTrainer, b: HeadTrainer) -> bool:
    """To the last bit on a processor. On a GPU numbers agree to rounding, which learning enlarges: the first epoch's loss tells."""
    if world.tolerance:
        return math.isclose(a.history[0]["train/loss"], b.history[0]["train/loss"], rel_tol=world.tolerance)
    mine, other = a.model.state_dict(), b.model.state_dict()
    return a.history == b.history and all(torch.equal(x, other[name]) for name, x in mine.items())


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextlib.contextmanager
def _as_usual(machine: Hardware) -> Iterator[None]:
    """Each operation on all cores, as torch does by itself: how others would run it."""
    torch.set_num_threads(machine.lanes * machine.threads)
    try:
        yield
    finally:
        torch.set_num_threads(machine.threads)


def table(result: BenchmarkResult) -> str:
    """The measurements as text."""
    wide = max(len(name) for name, *_ in result.rows)
    lines = [f"{result.backbone} on {result.machine}", ""]
    lines += [f"{name.ljust(wide)}  {_number(value):>9} {unit.ljust(10)}  {ratio}".rstrip() for name, value, unit, ratio in result.rows]
    lines += ["", *(f"{'yes' if good else 'NO '}  {name}" for name, good in result.checks.items())]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.4f}"


def as_json(result: BenchmarkResult) -> str:
    """The measurements for a machine."""
    return json.dumps(asdict(result), indent=1)
