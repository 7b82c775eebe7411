"""Groups images by how they look, so that a split can leave out one appearance in turn: another stain, light, focus or crowding.

An image is described without its mask by the colours of background and foreground, its sharpness, and the share of it that is foreground. Each of
the four counts the same. Ward's clustering makes the groups: it needs no random start, so equal images always give equal groups.

Letters: N images, U units that stay together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from cellbench.data.audit.image_statistics import LOOK_PX, find_foreground
from cellbench.data.dataset import Sample
from cellbench.data.io import images
from cellbench.data.io.intensity import IntensityScaling
from cellbench.data.progress import map_files
from cellbench.data.splits import unit_of
from cellbench.errors import CellbenchError, quantity
from cellbench.file_cache import FileFactCache
from cellbench.files import text_digest

NUM_GROUPS = 5
"""Without folds; with them, each fold tests one group."""
MOST_CLUSTERED = 2000
"""Units in the clustering itself, whose memory grows with the square of their number; others join the nearest group."""
FEATURES = (("background", 3, 8.0), ("cells", 3, 8.0), ("sharpness", 1, 0.15), ("density", 1, 0.05))
"""Each property, its number of values, and the smallest deviation that counts as different: below it, differences are noise."""


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """How one image looks."""

    background_rgb: tuple[float, float, float]
    """Median, 0..255."""
    foreground_rgb: tuple[float, float, float]
    """Mean, 0..255."""
    sharpness: float
    """Logarithm of the deviation of the Laplacian as a share of that of the grey image; higher is sharper, or noisier."""
    density: float
    """Share of the image that is foreground, 0..1."""

    @property
    def values(self) -> list[float]:
        return [*self.background_rgb, *self.foreground_rgb, self.sharpness, self.density]


def measure_appearance(image: np.ndarray) -> Appearance:
    """The appearance of an image (H, W, 3) uint8 RGB."""
    step = -(-max(image.shape[:2]) // LOOK_PX)
    small = image[::step, ::step].astype(np.float32)
    foreground = find_foreground(small).mask
    background = np.median(small[~foreground], axis=0) if not foreground.all() else small.mean((0, 1))
    cells = small[foreground].mean(0) if foreground.any() else background
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY).astype(np.float32)
    edges = cv2.Laplacian(grey, cv2.CV_32F)
    return Appearance(
        background_rgb=(float(background[0]), float(background[1]), float(background[2])),
        foreground_rgb=(float(cells[0]), float(cells[1]), float(cells[2])),
        sharpness=float(np.log(max(edges.std(), 1e-3) / max(grey.std(), 1e-3))),
        density=float(foreground.mean()),
    )


def measure_all(paths: Sequence[Path], reading: IntensityScaling) -> list[Appearance | None]:
    """The appearance of each file, about 0.1 s of a core for two megapixels, cached until it changes; None for an unreadable one."""

    def learn(path: Path) -> list[float] | None:
        try:
            return measure_appearance(images.read_image(path, reading)).values
        except (CellbenchError, OSError):
            return None  # opening the dataset raises the error

    with FileFactCache(f"appearance-{text_digest(json.dumps(reading.to_dict()), 8)}", learn) as known:
        map_files(known.__getitem__, [path for path in paths if path.is_file() and not known.knows(path)], "measuring appearance once")
        found = [known[path] if path.is_file() else None for path in paths]
    return [
        Appearance(background_rgb=(v[0], v[1], v[2]), foreground_rgb=(v[3], v[4], v[5]), sharpness=v[6], density=v[7]) if v else None
        for v in found
    ]


def group_by_appearance(
    samples: tuple[Sample, ...], num_folds: int, reading: IntensityScaling, grouped: Callable[[tuple[Sample, ...]], tuple[Sample, ...]]
) -> tuple[Sample, ...]:
    """The samples, each with its appearance. Images of one group (patient, slide; else what ``grouped`` finds) have the same one.

    There is one appearance for each fold, so that each is left out once. With two folds there are four, else nothing would be left to validate on.
    """
    samples = samples if any(sample.group for sample in samples) else grouped(samples)
    units: dict[str, list[int]] = {}
    for k, sample in enumerate(samples):
        units.setdefault(unit_of(sample), []).append(k)
    found = measure_all([sample.image for sample in samples], reading)
    known = np.array([one.values for one in found if one is not None])
    middle = np.median(known, axis=0) if len(known) else np.zeros(sum(num for _, num, _ in FEATURES))
    values_N = np.array([middle if one is None else one.values for one in found])
    values_U = np.array([values_N[members].mean(0) for members in units.values()])
    sizes_U = np.array([len(members) for members in units.values()])
    wanted = {0: NUM_GROUPS, 2: 4}.get(num_folds, num_folds)
    name_of: dict[int, str] = {}
    for group, members in zip(cluster(_scaled(values_U), sizes_U, min(wanted, len(units))).tolist(), units.values(), strict=True):
        name_of |= dict.fromkeys(members, f"appearance {group + 1}")
    return tuple(replace(sample, appearance=name_of[k]) for k, sample in enumerate(samples))


def _scaled(values_U: np.ndarray) -> np.ndarray:
    """Divided by the deviation over all, so that each property counts the same however many values it has."""
    floors = np.concatenate([np.full(num, floor) for _, num, floor in FEATURES])
    weights = np.concatenate([np.full(num, num**-0.5) for _, num, _ in FEATURES])
    return values_U / np.maximum(values_U.std(0), floors) * weights


def cluster(points_U: np.ndarray, sizes_U: np.ndarray, num: int) -> np.ndarray:
    """The group (U,) int, 0 to ``num`` - 1, of each point (U, D); ``sizes_U``: number of images of each.

    A group has at least a third of an even share where that is possible: smaller clusters, such as a single odd image, join the nearest group.
    """
    if num <= 1 or len(points_U) <= num:
        return np.arange(len(points_U)) if len(points_U) <= num else np.zeros(len(points_U), int)
    some = np.unique(np.linspace(0, len(points_U) - 1, min(len(points_U), MOST_CLUSTERED)).round().astype(int))
    from scipy.cluster.hierarchy import fcluster, linkage

    tree = linkage(points_U[some], "ward")
    least = max(2 if len(some) >= 2 * num else 1, round(sizes_U[some].sum() / (3 * num)))
    while True:
        for cut in range(num, min(len(some), 20 * num) + 1):
            label = fcluster(tree, cut, "maxclust")
            weight = np.bincount(label, sizes_U[some])
            large = np.flatnonzero(weight >= least)
            if len(large) >= num:
                large = large[np.argsort(-weight[large], kind="stable")][:num]
                centres = np.stack([points_U[some[label == one]].mean(0) for one in large])
                out_U = ((points_U[:, None] - centres) ** 2).sum(2).argmin(1)
                for group, one in enumerate(large):  # some of its members may lie nearer to another centre
                    out_U[some[label == one]] = group
                return out_U
        least -= 1  # at 1 every cluster is large enough, so the first cut is taken


def describe_appearances(samples: Sequence[Sample], reading: IntensityScaling) -> list[str]:
    """A sentence for each appearance of the samples: its number of images, and what they look like; empty without appearances."""
    groups: dict[str, list[Appearance]] = {}
    some = [sample for sample in samples if sample.appearance]
    for sample, one in zip(some, measure_all([sample.image for sample in some], reading) if some else [], strict=True):
        groups.setdefault(sample.appearance, []).extend([one] if one is not None else [])
    out = []
    for name, mine in sorted(groups.items(), key=lambda item: int(item[0].rpartition(" ")[2])):
        background, foreground = (np.mean([getattr(one, key) for one in mine], axis=0) for key in ("background_rgb", "foreground_rgb"))
        out.append(
            f"{name}: {quantity(len(mine), 'image')}, background {_colour(background)}, foreground {_colour(foreground)} on "
            f"{np.mean([one.density for one in mine]):.0%} of the area, sharpness {np.exp(np.mean([one.sharpness for one in mine])):.2f}"
        )
    return out


def _colour(rgb: np.ndarray) -> str:
    return "#" + "".join(f"{round(float(value)):02x}" for value in rgb)
