"""``explore``: plots and statistics of a dataset, or feature maps of several backbones and framings for one of its images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cellbench import startup
from cellbench.config.base import checked
from cellbench.config.experiment import DataSpec
from cellbench.config.options import ExploreOptions
from cellbench.config.registry import Registry
from cellbench.config.run import RunSpec
from cellbench.console import progress_bar, say, say_lines
from cellbench.data.audit.image_statistics import measure_images, summarize
from cellbench.data.dataset import SPLITS, Dataset, Sample, interpret_masks
from cellbench.data.loading import dataset_of_card, scan_dataset, split_dataset
from cellbench.data.transforms.framing import Framing
from cellbench.errors import CellbenchError, WeightsUnavailable, one_line, unknown_name
from cellbench.features.frozen_backbone import FrozenBackbone
from cellbench.features.token_maps import FeatureMaps, cosine_map, feature_maps, pca_rgb
from cellbench.files import facts_digest, make_folder, to_nfc
from cellbench.hardware import detect_hardware
from cellbench.models.backbones.build import open_backbone
from cellbench.models.backbones.weights import weights_folder
from cellbench.reporting.plots import dataset as dataset_plots
from cellbench.reporting.plots import style
from cellbench.reporting.plots.dataset import Panel
from cellbench.tracking.tracker import Tracker
from cellbench.training.memory_check import why_too_large

MAX_SURVEYED = 100
"""Maximum number of images that the statistics are computed from."""
DEFAULT_BACKBONES = ("dinobloom-s", "dinobloom-b", "dinobloom-l", "uni", "vit-tiny-in1k", "efficientnet-lite0")
"""Default backbones, if their weights are on this machine."""
DEFAULT_FRAMINGS = ("resize", "pad", "tile")


def explore(options: ExploreOptions) -> int:
    """Prints statistics and writes figures; with ``--log`` also logs an MLflow run. Returns exit code 0."""
    registry = Registry(options.registry)
    _check(options, registry)
    card = registry.dataset(options.dataset or ("folder" if options.data is not None else "smears"))
    card, listing = scan_dataset(card, options.data, DataSpec(), unlabelled=True)
    listing.raise_first()
    say_lines(listing.lines)
    if listing.labelled:
        dataset, _ = split_dataset(card, listing, DataSpec())
        pool = [sample for part in SPLITS for sample in dataset.samples(part)]
        dataset = interpret_masks(dataset, pool).dataset
        say_lines(dataset.notes)
    else:
        pool = [*listing.parts["train"]]
        dataset = replace(dataset_of_card(card, listing.root), classes=(), reading=listing.reading)
    name = options.data.absolute().name if options.data is not None else dataset.name
    folder = make_folder(options.out or Path("explored") / name)
    tracker = Tracker(f"explore {name}") if options.log else None  # first, so that an unavailable store is reported at once
    if options.features:
        sample = _sample(pool, options.image)
        title, facts = f"features of {sample.name}", _features(dataset, sample, registry, options, folder)
    else:
        title, facts = f"{len(pool)} images", _statistics(dataset, pool, options, folder)
    say(f"pictures are in {folder}")
    if tracker is not None:
        choices = (options.data, list(options.backbone), list(options.framing), options.image, options.point, options.tile_px, options.seed)
        key = facts_digest([options.features, *map(str, choices)])
        with tracker.run(title, key, known=tracker.known(key).get(key), tags={"cellbench.kind": "explore"}) as run:
            run.log({f"data/{fact}": value for fact, value in facts.items() if not np.isnan(value)})
            run.log_artifacts(folder)
        say(f"and in MLflow, experiment '{tracker.name}'")
    return 0


def _check(options: ExploreOptions, registry: Registry) -> None:
    """Raises CellbenchError for a wrong option, before any image is read."""
    if options.seed < 0:
        raise CellbenchError(f"--seed {options.seed}: expected 0 or more.")
    for name in options.backbone:
        registry.backbone(name)
    for text in options.framing:
        _framing(text, options.tile_px)
    weights_folder(options.weights)
    if options.out is not None and options.out.exists():
        make_folder(options.out)


def _sample(pool: Sequence[Sample], image: str) -> Sample:
    found = [sample for sample in pool if not image or to_nfc(image) in (to_nfc(sample.name), to_nfc(Path(sample.name).stem))]
    if not found:
        raise unknown_name("image", image, [sample.name for sample in pool])
    return found[0]


# --- the data -------------------------------------------------------------------------------------------------------------------------


def _statistics(dataset: Dataset, pool: list[Sample], options: ExploreOptions, folder: Path) -> dict[str, float]:
    order = np.random.default_rng(options.seed).permutation(len(pool))
    chosen = [pool[k] for k in order[:MAX_SURVEYED]]
    with progress_bar(total=len(chosen), desc="looking at images", unit="image") as bar:
        found = measure_images(dataset, chosen, bar.update)
    facts = summarize(found)
    shown = chosen[: max(1, min(options.samples, dataset_plots.MOST_SAMPLES))]
    pairs = [(sample.name, *dataset.read(sample)) for sample in shown]
    style.save_figure(dataset_plots.plot_samples(pairs, dataset.classes), folder / "samples.png")
    if dataset.classes:
        style.save_figure(dataset_plots.plot_statistics(found), folder / "statistics.png")
    (folder / "statistics.json").write_text(json.dumps({**facts, "seed": options.seed, "of": len(pool)}, indent=1), encoding="utf-8")
    masks = "with masks" if dataset.classes else "without masks"
    sizes = "" if facts["sizes"] == 1 else f", and {facts['sizes'] - 1:.0f} other sizes"
    say(f"{dataset.name}: {len(pool)} images {masks}, {len(found)} looked at (seed {options.seed})")
    say(f"  size               {facts['width_px']:.0f} x {facts['height_px']:.0f} px{sizes}")
    if not dataset.classes:
        return {key: facts[key] for key in ("images", "height_px", "width_px", "sizes")}
    say(f"  cell pixels        {100 * facts['cell_share']:.1f} %")
    say(f"  cells an image     {facts['cells_per_image']:.1f}, deviation {facts['cells_per_image_sd']:.1f}")
    say(f"  diameter of cells  {facts['cell_diameter_px']:.0f} px in the median, those cut by the border left out")
    return facts


# --- features -------------------------------------------------------------------------------------------------------------------------


def _features(dataset: Dataset, sample: Sample, registry: Registry, options: ExploreOptions, folder: Path) -> dict[str, float]:
    """Plots principal components of each backbone's last map in each framing, and the similarity of every location to ``--point``."""
    image, classes = dataset.read(sample)
    height, width = classes.shape
    point = _point(options.point, sample, width, height) if options.point else None
    framings = [_framing(text, options.tile_px) for text in options.framing or DEFAULT_FRAMINGS]
    components: dict[str, list[Panel]] = {}
    similar: dict[str, list[Panel]] = {}
    facts: dict[str, float] = {}
    for name in _backbones(registry, options):
        views = _views(name, registry, options, framings, image)
        if not views:
            continue
        pictures = pca_rgb([view for _, view in views])
        components[name] = [
            Panel(title=f"{title}: {len(view.tokens):,} places", picture=picture)
            for (title, view), picture in zip(views, pictures, strict=True)
        ]
        if point is None:
            continue
        x, y = point
        similar[name] = []
        for title, view in views:
            cosine = cosine_map(view, y, x)
            near = cosine >= np.quantile(cosine, 0.95)
            caption = title
            if dataset.classes:
                share = float((classes[near] == classes[y, x]).mean())
                facts[f"alike_{name}_{title}".replace(" ", "_")] = share
                caption = f"{title}: {share:.0%} of the most similar 5 % in its class"
            similar[name].append(Panel(title=caption, picture=cosine, scale=(0.0, 1.0)))
    if not components:
        raise CellbenchError(
            "no backbone could be shown. `doctor` says which are available here; vit-tiny-random and filter-bank need no weights."
        )
    what = f"{sample.name}, {width} x {height} px"
    title = f"{what}: three principal components of the last map, one colour scale for each backbone"
    style.save_figure(dataset_plots.plot_feature_maps(image, components, title, point), folder / "features.png")
    say(f"{what}: {', '.join(components)}, each as {', '.join(title for title, _ in framings)}")
    if point is not None:
        there = f" ({dataset.classes[classes[point[1], point[0]]]})" if dataset.classes else ""
        title = f"{what}: similarity of every place to the marked one{there}"
        style.save_figure(dataset_plots.plot_feature_maps(image, similar, title, point), folder / "likeness.png")
        for name, panels in similar.items() if dataset.classes else ():
            for panel in panels:
                say(f"  {name}, {panel.title}")
    return facts


def _views(
    name: str, registry: Registry, options: ExploreOptions, framings: Sequence[tuple[str, Framing]], image: np.ndarray
) -> list[tuple[str, FeatureMaps]]:
    """The last feature map of one backbone in each framing that it supports. Prints which framings are skipped, and why."""
    startup.configure_threads(options.device)
    try:
        backbone = open_backbone(registry.backbone(name), options.weights, download=bool(options.backbone))
    except WeightsUnavailable as error:
        say(f"skipped {name}: {one_line(error)}")
        return []
    frozen = FrozenBackbone(backbone, detect_hardware(options.device), [1])
    views = []
    for title, framing in progress_bar(framings, desc=name, unit="framing"):
        reason = why_too_large(frozen, framing.tile_px([image.shape[:2]]))
        if not reason and framing.side_px % backbone.tile_multiple_px:
            reason = f"tiles of {framing.side_px} px are no multiple of its {backbone.tile_multiple_px} px. Set --tile-px."
        if reason:
            say(f"skipped {name}, {title}: {reason}")
        else:
            views.append((title, feature_maps(frozen, framing, image)))
    return views


def _backbones(registry: Registry, options: ExploreOptions) -> list[str]:
    if options.backbone:
        return list(dict.fromkeys(options.backbone))
    found = []
    for name in DEFAULT_BACKBONES:
        try:
            open_backbone(registry.backbone(name), options.weights, download=False)
        except WeightsUnavailable:
            continue
        found.append(name)
    if not found:
        say(f"no weights of {', '.join(DEFAULT_BACKBONES)} are here, so a random backbone is shown. `doctor` says how to get them.")
    return found or ["vit-tiny-random"]


def _point(text: str, sample: Sample, width: int, height: int) -> tuple[int, int]:
    x, comma, y = text.partition(",")
    if not comma or not x.strip().isdigit() or not y.strip().isdigit():
        raise CellbenchError(f"--point {text}: expected X,Y in pixels of the image, like 800,600.")
    if not (int(x) < width and int(y) < height):
        raise CellbenchError(f"--point {text}: {sample.name} is {width} x {height} px. Name a point inside it.")
    return int(x), int(y)


def _framing(text: str, tile_px: int) -> tuple[str, Framing]:
    """Title and framing of ``--framing``, such as ``tile`` or ``tile:0.5``."""
    kind, colon, scale = text.partition(":")
    try:
        number = float(scale) if colon else 1.0
    except ValueError:
        raise CellbenchError(f"--framing {text}: expected tile, pad or resize, with a scale if need be, like tile:0.5.") from None
    settings = {"backbone": "any", "head": "any", "framing": kind, "tile_px": tile_px, "tile_scale": number}
    return text.replace(":", " "), Framing.of(checked(RunSpec, settings, f"--framing {text}"))
