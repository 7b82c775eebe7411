"""``explore``: pictures and statistics of a dataset, and of what backbones see in one of its images, in one framing beside another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cellbench.config.base import checked
from cellbench.config.experiment import DataSpec
from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.data.audit.image_statistics import measure_images, summarize
from cellbench.data.dataset import SPLITS, Dataset, Sample, interpret_masks
from cellbench.data.loading import scan_dataset, split_dataset
from cellbench.data.transforms.framing import Framing
from cellbench.errors import CellbenchError, WeightsUnavailable, one_line, unknown_name
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.features.token_maps import FeatureMaps, cosine_map, feature_maps, pca_rgb
from cellbench.files import make_folder, to_nfc
from cellbench.hardware import Hardware, detect_hardware
from cellbench.models.backbones.build import open_backbone
from cellbench.reporting.plots import dataset as dataset_plots
from cellbench.reporting.plots import style
from cellbench.reporting.plots.dataset import Panel
from cellbench.tracking.tracker import Tracker
from cellbench.training.memory_check import why_too_large

SURVEYED = 100
"""Images looked at for the statistics, as published."""
USUAL = ("dinobloom-s", "dinobloom-b", "dinobloom-l", "uni", "vit-tiny-in1k")
"""Backbones shown where none is named, as far as their weights are here."""
FRAMINGS = ("resize", "pad", "tile")


def explore(
    data: Path | None,
    *,
    dataset: str = "",
    features: bool = False,
    backbones: Sequence[str] = (),
    framings: Sequence[str] = (),
    image: str = "",
    point: str = "",
    tile_px: int = 224,
    num_samples: int = 4,
    seed: int = 0,
    out: Path | None = None,
    log: bool = False,
    weights: Path | None = None,
    device: str = "auto",
    extra: Path | None = None,
) -> int:
    """``cellbench explore``: prints figures and writes pictures; with ``log`` also an MLflow run. Exit code 0."""
    registry = Registry(extra)
    card, listing = scan_dataset(registry.dataset(dataset or ("folder" if data is not None else "smears")), data, DataSpec())
    listing.refuse()
    for line in listing.lines:
        print(line)
    here, _ = split_dataset(card, listing, DataSpec())
    pool = [sample for part in SPLITS for sample in here.samples(part)]
    here = interpret_masks(here, pool).dataset
    for note in here.notes:
        print(note)
    name = data.absolute().name if data is not None else here.name
    folder = make_folder(out or Path("explored") / name)
    tracker = Tracker(f"explore {name}") if log else None  # now, so that a store that cannot be had is told before the work
    if features:
        at = _point(point) if point else None
        facts = _features(here, _named(pool, image), registry, backbones, framings, at, tile_px, detect_hardware(device), weights, folder)
    else:
        facts = _statistics(here, pool, num_samples, seed, folder)
    print(f"pictures are in {folder}")
    if tracker is not None:
        key = hashlib.sha256(
            json.dumps([features, *map(str, (data, backbones, framings, image, point, tile_px, seed))]).encode()
        ).hexdigest()[:16]
        title = f"features of {_named(pool, image).name}" if features else f"{len(pool)} images"
        with tracker.run(title, key, known=tracker.known().get(key), tags={"cellbench.kind": "explore"}) as run:
            run.log({f"data/{fact}": value for fact, value in facts.items() if not np.isnan(value)})
            run.artifacts(folder)
        print(f"and in MLflow, experiment '{tracker.name}'")
    return 0


def _named(pool: Sequence[Sample], image: str) -> Sample:
    found = [sample for sample in pool if not image or to_nfc(image) in (to_nfc(sample.name), to_nfc(Path(sample.name).stem))]
    if not found:
        raise unknown_name("image", image, [sample.name for sample in pool])
    return found[0]


def _point(text: str) -> tuple[int, int]:
    x, comma, y = text.partition(",")
    if not comma or not x.strip().isdigit() or not y.strip().isdigit():
        raise CellbenchError(f"--point {text}: expected X,Y in pixels of the image, like 800,600.")
    return int(x), int(y)


# --- the data -------------------------------------------------------------------------------------------------------------------------


def _statistics(here: Dataset, pool: list[Sample], num_samples: int, seed: int, folder: Path) -> dict[str, float]:
    order = np.random.default_rng(seed).permutation(len(pool))
    drawn = [pool[k] for k in order[:SURVEYED]]
    with tqdm(total=len(drawn), desc="looking at images", unit="image", leave=False) as bar:
        found = measure_images(here, drawn, bar.update)
    facts = summarize(found)
    pairs = [(sample.name, *here.read(sample)) for sample in drawn[: max(1, min(num_samples, dataset_plots.MOST_SAMPLES))]]
    style.save_figure(dataset_plots.plot_samples(pairs, here.classes), folder / "samples.png")
    style.save_figure(dataset_plots.plot_statistics(found), folder / "statistics.png")
    (folder / "statistics.json").write_text(json.dumps({**facts, "seed": seed, "of": len(pool)}, indent=1), encoding="utf-8")
    shapes = "" if facts["sizes"] == 1 else f", and {facts['sizes'] - 1:.0f} other sizes"
    print(f"{here.name}: {len(pool)} images with masks, {len(found)} looked at (seed {seed})")
    print(f"  size               {facts['width_px']:.0f} x {facts['height_px']:.0f} px{shapes}")
    print(f"  cell pixels        {100 * facts['cell_share']:.1f} %")
    print(f"  cells an image     {facts['cells_per_image']:.1f}, deviation {facts['cells_per_image_sd']:.1f}")
    print(f"  diameter of cells  {facts['cell_diameter_px']:.0f} px in the median, those cut by the border left out")
    return facts


# --- features -------------------------------------------------------------------------------------------------------------------------


def _features(
    here: Dataset,
    sample: Sample,
    registry: Registry,
    backbones: Sequence[str],
    framings: Sequence[str],
    point: tuple[int, int] | None,
    tile_px: int,
    where: Hardware,
    weights: Path | None,
    folder: Path,
) -> dict[str, float]:
    image, classes = here.read(sample)
    height, width = classes.shape
    if point is not None and not (point[0] < width and point[1] < height):
        raise CellbenchError(f"--point {point[0]},{point[1]}: {sample.name} is {width} x {height} px. Name a point inside it.")
    ways = [_framing(text, tile_px) for text in framings or FRAMINGS]
    components: dict[str, list[Panel]] = {}
    alike: dict[str, list[Panel]] = {}
    facts: dict[str, float] = {}
    for name in _to_show(registry, backbones, weights):
        try:
            trunk = FrozenBackbone(open_backbone(registry.backbone(name), weights, download=bool(backbones)), where, [1])
        except WeightsUnavailable as error:
            print(f"skipped {name}: {one_line(error)}")
            continue
        views: list[tuple[str, FeatureMaps]] = []
        for title, way in tqdm(ways, desc=name, unit="framing", leave=False):
            if reason := why_too_large(trunk, way.tile_px([(height, width)])) or _unfit(trunk, way):
                print(f"skipped {name}, {title}: {reason}")
            else:
                views.append((title, feature_maps(trunk, way, image)))
        if not views:
            continue
        pictures = pca_rgb([view for _, view in views])
        components[name] = [
            Panel(title=f"{title}: {_places(view)}", picture=picture) for (title, view), picture in zip(views, pictures, strict=True)
        ]
        if point is None:
            continue
        alike[name] = []
        for title, view in views:
            cosine = cosine_map(view, point[1], point[0])
            near = cosine >= np.quantile(cosine, 0.95)
            share = float((classes[near] == classes[point[1], point[0]]).mean())
            facts[f"alike_{name}_{title}".replace(" ", "_")] = share
            alike[name].append(Panel(title=f"{title}: {share:.0%} of the likest 5 % in its class", picture=cosine, scale=(0.0, 1.0)))
    if not components:
        raise CellbenchError(
            "no backbone could be shown. `doctor` says what can be had here; vit-tiny-random and filter-bank need nothing."
        )
    what = f"{sample.name}, {width} x {height} px"
    told = f"{what}: three principal components of the last map, one colour scale for each backbone"
    style.save_figure(dataset_plots.plot_feature_maps(image, components, told, point), folder / "features.png")
    print(f"{what}: {', '.join(components)}, each as {', '.join(title for title, _ in ways)}")
    if alike:
        truth = here.classes[classes[point[1], point[0]]] if point is not None else ""
        told = f"{what}: likeness of every place to the one marked ({truth})"
        style.save_figure(dataset_plots.plot_feature_maps(image, alike, told, point), folder / "likeness.png")
        for name, panels in alike.items():
            for panel in panels:
                print(f"  {name}, {panel.title}")
    return facts


def _to_show(registry: Registry, backbones: Sequence[str], weights: Path | None) -> list[str]:
    if backbones:
        for name in backbones:
            registry.backbone(name)  # a wrong name is told before anything is computed
        return list(dict.fromkeys(backbones))
    found = []
    for name in USUAL:
        try:
            open_backbone(registry.backbone(name), weights, download=False)
        except WeightsUnavailable:
            continue
        found.append(name)
    if not found:
        print(f"none of {', '.join(USUAL)} has its weights here, so a random one is shown. `doctor` says how to get them.")
    return found or ["vit-tiny-random"]


def _framing(text: str, tile_px: int) -> tuple[str, Framing]:
    """``tile`` or ``tile:0.5``: the kind, and the scale."""
    kind, colon, scale = text.partition(":")
    try:
        number = float(scale) if colon else 1.0
    except ValueError:
        raise CellbenchError(f"--framing {text}: expected tile, pad or resize, with a scale if need be, like tile:0.5.") from None
    settings = {"backbone": "any", "head": "any", "framing": kind, "tile_px": tile_px, "tile_scale": number}
    return text.replace(":", " "), Framing.of(checked(RunSpec, settings, f"--framing {text}"))


def _unfit(trunk: FrozenBackbone, way: Framing) -> str:
    multiple = trunk.backbone.tile_multiple_px if trunk.backbone is not None else 1
    return f"frames of {way.side_px} px are no multiple of its {multiple} px. Set --tile-px." if way.side_px % multiple else ""


def _places(view: FeatureMaps) -> str:
    return f"{len(view.tokens):,} places"
