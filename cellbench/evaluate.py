"""``evaluate``: a finished run tested on any labelled folder, logged as a run of its own under the run that it tests."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from cellbench import figures, results
from cellbench.data import seen_images
from cellbench.data.dataset import Dataset, proven
from cellbench.data.folders import listed, split
from cellbench.data.pixels import Pixels
from cellbench.errors import CellbenchError
from cellbench.exam import Case, Exams
from cellbench.logged import EVALUATED, EVALUATION, INDEPENDENT, NOTE, SEEN
from cellbench.metrics import confusion, image_scores
from cellbench.registry import Registry
from cellbench.results import Result
from cellbench.segmenter import Segmenter
from cellbench.spec import DataSpec, Experiment
from cellbench.track import Tracker
from cellbench.trained import Trained


def labelled(trained: Trained, experiment: Experiment, registry: Registry, folder: Path | None) -> tuple[Dataset, str]:
    """The images to test on, as a dataset whose ``test`` they are, and what they are in words.

    The run's own test images where the folder holds the very data that it learned from; else the folder's test images, or all of it where it
    is not divided. Raises CellbenchError, for classes other than the run's too.
    """
    card = registry.dataset(experiment.dataset)
    if folder is not None and card.draw:
        card = registry.dataset("folder")
    spec = experiment.data if card.draw or not experiment.data.draw else experiment.data.model_copy(update={"draw": {}})
    card, listing = listed(card, folder, spec)
    listing.refuse()
    if card.classes != trained.classes:
        raise CellbenchError(
            f"--data {folder}: its classes are {', '.join(card.classes)}; '{trained.name}' tells apart {', '.join(trained.classes)}. "
            "Name a folder with the same classes."
        )
    own, _ = split(card, listing, DataSpec(**{**spec.model_dump(), "fold": trained.run.fold if spec.folds else 0}))
    if spec.limit:
        own = replace(own, **{part: own.samples(part)[: spec.limit] for part in ("train", "val", "test")})
    own = proven(own)
    if own.digest == trained.dataset_digest:
        return replace(own, train=(), val=()), "the run's own test images"
    parts = listing.parts
    chosen = parts.get("test") or (*parts.get("train", ()), *parts.get("val", ()))
    what = "the folder's test images" if parts.get("test") else "all images of the folder"
    return proven(replace(own, train=(), val=(), test=tuple(chosen))), what


def examine(segmenter: Segmenter, dataset: Dataset, num_shown: int) -> tuple[Result, list[Case]]:
    """The test of a segmenter on a dataset's test images, and its ``num_shown`` worst answers, the worst first."""
    worst: list[Case] = []
    num, start = len(dataset.classes), time.perf_counter()
    answers = segmenter.predict_all(sample.image for sample in dataset.test)
    with Exams(dataset, 1, [segmenter.trained.separation]) as exams:
        for index, found in enumerate(tqdm(answers, total=len(dataset.test), desc="testing", unit="image", leave=False, disable=None)):
            truth = dataset.read_mask(dataset.test[index])
            counts = confusion(truth, found.classes, num)
            exams.take(index, truth, [counts], [(found.classes, found.probability, found.relief)])
            worst.append(Case.of(index, float(image_scores(counts[None])["dice"][0]), found.classes, found.probability))
            worst = sorted(worst, key=lambda case: case.dice)[:num_shown]
    cost = {"cost/images_per_s": len(dataset.test) / max(time.perf_counter() - start, 1e-9)}
    return Result(exam=exams.exams[0], cost=cost, preparation=segmenter.trained.preparation), worst


def evaluate(
    asked: str,
    *,
    data: Path | None = None,
    visualize: int = 0,
    weights: Path | None = None,
    extra: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    say: Callable[[str], None] = print,
) -> int:
    """``cellbench evaluate``. Exit code 0."""
    if visualize < 0:
        raise CellbenchError(f"--visualize {visualize}: a number of images is expected, 0 or more.")
    segmenter = Segmenter.load(asked, weights=weights, registry=extra, device=device, precision=precision)
    trained = segmenter.trained
    experiment = Experiment.of(tomllib.loads(trained.config), "config.toml")
    dataset, what = labelled(trained, experiment, Registry(extra), data)
    say(f"{trained.name}: {len(dataset.test)} images of {dataset.root} ({what}), on {segmenter.machine.name}.")
    seen = seen_images.found_again(trained.seen, dataset.test) if trained.seen is not None else None
    if seen is None:
        warning = f"'{trained.name}' keeps no record of its training images (an older version), so these were not compared with them."
    else:
        warning = seen_images.told(seen)
    if warning:
        say(f"Warning: {warning}")
    result, worst = examine(segmenter, dataset, visualize)
    metrics = results.metrics(dataset, result)
    name = f"evaluate: {trained.name} on {dataset.root.name}"
    tracker = Tracker(trained.experiment or "evaluations")
    key = hashlib.sha256(json.dumps([EVALUATION, trained.fingerprint, dataset.digest]).encode()).hexdigest()[:16]
    tags = {"cellbench.kind": EVALUATION, EVALUATED: trained.run_id or trained.name, "model": trained.run.model, "dataset": dataset.name}
    known = next((run for run in tracker.stored() if run.fingerprint == key), None)
    with tracker.run(name, key, parent=trained.run_id, known=known, tags=tags) as run:
        if known is None:
            run.log({}, params={"evaluated": trained.name, "dataset": dataset.name, "images": len(dataset.test)})
            if seen is not None:
                run.log({}, params={f"images_{word}": seen.count(part) for part, word in (("train", "trained_on"), ("val", "validated_on"))})
            run.data(dataset.name, dataset.digest, str(dataset.root), "testing")
        with tempfile.TemporaryDirectory(prefix="cellbench-") as place:
            folder, pixels = Path(place), Pixels(dataset, "test", 2**28)
            plain = experiment.model_copy(update={"data": DataSpec()})
            results.write(folder, name, trained.run.model_copy(update={"fold": 0}), plain, [dataset], pixels, result)
            if seen is not None:
                listed_images = {part: [s.name for s, one in zip(dataset.test, seen, strict=True) if one == part] for part in seen_images.PARTS}
                (folder / SEEN).write_text(json.dumps(listed_images), encoding="utf-8")
            (folder / "config.toml").write_text(trained.config, encoding="utf-8")
            for rank, case in enumerate(worst, 1):
                picture, truth = pixels[case.image]
                file = dataset.test[case.image].name
                title = f"{rank}. worst of {len(dataset.test)}: {file}, Dice {case.dice:.4f}"
                stem = re.sub(r"[^\w.-]+", "-", Path(file).stem)[:60]
                figures.save(figures.case(picture, truth, case.classes, case.cell, title), folder / "figures" / f"worst-{rank:03d}-{stem}.png")
            run.artifacts(folder)
        told = results.tags(name, metrics, segmenter.machine.name, run.address("figures/worst.png"))
        independent = "unknown" if seen is None else "no" if any(seen) else "yes"
        told |= {INDEPENDENT: independent, NOTE: f"**Warning:** {warning}\n\n{told[NOTE]}" if warning else told[NOTE]}
        run.log(metrics, tags=told)
    mean = f"{metrics['test_image/dice']:.4f}"
    if "test_image/dice_low" in metrics:
        mean += f" (95 % {metrics['test_image/dice_low']:.4f} to {metrics['test_image/dice_high']:.4f})"
    say(f"Dice {metrics['test/dice']:.4f} over all pixels, {mean} in the mean of the images; IoU {metrics['test/iou']:.4f}.")
    if seen is not None and any(seen) and (new := [k for k, part in enumerate(seen) if not part]):
        dice = image_scores(result.exam.counts[new])["dice"].mean()
        say(f"Dice {dice:.4f} in the mean of the {len(new)} images that the run has not seen.")
    say(f"logged as '{name}' in the experiment '{tracker.name}', under the run that it tests: metrics, figures and error maps.")
    return 0
