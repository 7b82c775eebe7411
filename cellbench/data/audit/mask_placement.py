"""Checks whether the masks of a set fit their images; if not, finds how they are rotated or shifted, or to which image they belong.

Each image is described by maps without training (colours, contrast, Otsu's threshold), pooled to 64 x 64. The fit of a mask is its multiple
correlation with these maps, 0..1, so it does not matter whether cells are darker or brighter, nor does a plane of light. Images with low contrast
fit any mask badly, so a mask is only wrong if another placement fits much better, or if the masks of a set fit their own images no better than
other images although these have contrast.

Legend: N images, F maps, T the side of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np

from cellbench.data.audit.perceptual_hash import eight_orientations, mean_pool

T = TypeVar("T")

SIDE = 64
MARGIN = 0.15
"""Minimum gain of another placement over the mask's own. Correct masks of three real sets and many drawn ones stay below."""
LEAST_FIT = 0.4
"""Minimum fit of that placement: a mask of another image has 0.1 to 0.3 by chance."""
FEWEST = 5
"""Minimum number of images with cells for a judgement of the set."""
MOST = 400
"""Images compared with one another, in runs of neighbours."""
WAYS = (
    "as it is",
    "turned by 90 degrees to the left",
    "turned by 180 degrees",
    "turned by 90 degrees to the right",
    "mirrored at the diagonal",
    "mirrored upside down",
    "mirrored at the other diagonal",
    "mirrored left to right",
)
"""In the order of ``perceptual_hash.eight_orientations``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementFeatures:
    """One image and its mask, pooled."""

    basis: np.ndarray
    """(F, T * T) float32, orthonormal, each of mean 0: the span of the image's maps."""
    mask: np.ndarray
    """(T, T) float32: the marked share of each field."""
    square: bool
    """Whether it can be turned by 90 degrees."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The misplacement of the masks of a set."""

    message: str
    """A clause on the better placement; empty if nothing is wrong."""
    wrong: tuple[int, ...]
    """Positions of the images with wrong masks."""
    most: bool
    """Whether these are more than half of the images with cells."""


def describe(image_HW3: np.ndarray, cell_HW: np.ndarray, seen_HW: np.ndarray) -> PlacementFeatures:
    """Features of an image 0..255, its cells bool, and the pixels selected by a threshold, bool; all of one size, a thinned image will do."""
    colours = image_HW3.astype(np.float32)
    plain = colours[..., 0] + colours[..., 1]
    plain += colours[..., 2]
    plain /= 3  # as the mean over channels, in a tenth of its time
    mean, squares = (cv2.blur(one, (5, 5), borderType=cv2.BORDER_REFLECT) for one in (plain, plain * plain))
    contrast = np.sqrt(np.maximum(squares - mean * mean, 0))
    maps = [*np.moveaxis(colours, 2, 0), contrast, seen_HW]
    rows = np.stack([mean_pool(one, SIDE).ravel() for one in maps]).astype(np.float64)
    places = np.indices((SIDE, SIDE)).reshape(2, -1)
    plane = _orthonormal(np.stack([np.ones(SIDE * SIDE), *places]))
    rows -= rows @ plane.T @ plane
    height, width = cell_HW.shape
    return PlacementFeatures(basis=_orthonormal(rows).astype(np.float32), mask=mean_pool(cell_HW, SIDE), square=abs(height - width) <= 1)


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the span of the rows, without negligible directions."""
    _, strength, basis = np.linalg.svd(rows, full_matrices=False)
    return basis[strength > max(1e-3 * strength[0], 1e-6)]


def _unit(mask_TT: np.ndarray) -> np.ndarray:
    flat = mask_TT.ravel() - mask_TT.mean()
    return flat / max(float(np.linalg.norm(flat)), 1e-6)


def check_placement(features: Sequence[PlacementFeatures], contrasts: Sequence[float]) -> Placement:
    """Finds misplaced masks. ``contrasts``: ``SampleFacts.seen_contrast`` of each image.

    Only images with some cells, and not full of them, count.
    """
    usable = runs_of_neighbours([k for k, one in enumerate(features) if 0.002 < float(one.mask.mean()) < 0.98 and len(one.basis)], MOST)
    num = len(usable)
    if num < FEWEST:
        return Placement(message="", wrong=(), most=False)
    kept = [features[k] for k in usable]
    masks = np.stack([_unit(one.mask) for one in kept]).astype(np.float32)
    fit = np.stack([np.linalg.norm(one.basis @ masks.T, axis=0) for one in kept])  # fit[i, j]: mask j on image i
    own = fit.diagonal().copy()
    # One placement for all: a single image may fit rotated by chance, a set does not.
    places = {f"fit when {WAYS[way]}": np.array([_turned_fit(one, way) for one in kept]) for way in range(1, 8)}
    moved, by = _shifted(kept)
    places[f"fit when moved by {by}"] = moved
    # Mask i - 1 on image i: it fits the next one.
    for words, elsewhere in (("next one", np.roll(fit, 1, axis=1).diagonal()), ("one before", np.roll(fit, -1, axis=1).diagonal())):
        if _better(elsewhere, own).mean() > 0.5:
            places[f"fit another image, each the {words}"] = elsewhere
    wrong, clauses = np.zeros(num, bool), []
    words, elsewhere = max(places.items(), key=lambda item: (int(_better(item[1], own).sum()), float(item[1].mean())))
    if (votes := _better(elsewhere, own)).sum() >= max(2, 0.1 * num):
        wrong |= votes
        clauses.append(f"{_num(int(votes.sum()), num)} {words}")
    # Another image's mask counts only if both choose each other: among many masks, one always fits a little.
    others = fit - 2 * np.eye(num)
    theirs, whose = others.max(1), others.argmax(1)
    anothers = ~wrong & _much_better(theirs, own) & (others.argmax(0)[whose] == np.arange(num))
    if anothers.sum() >= 2:
        wrong |= anothers
        if clauses and "another image" in clauses[0]:
            clauses = [f"{_num(int(wrong.sum()), num)} fit another image, most of them {words.rpartition('each ')[2]}"]
        else:
            clauses.append(f"{_num(int(anothers.sum()), num)} fit another image")
    gain = own - (fit.sum(1) - own) / (num - 1)
    unrelated = gain.mean() < min(0.1, 2 * gain.std(ddof=1) / np.sqrt(num))
    if unrelated and wrong.mean() <= 0.5 and np.median([contrasts[k] for k in usable]) > 0.7:  # of noise alone it is 2 / pi
        wrong[:] = True
        clauses = ["they fit their own images no better than others, and neither turned, moved nor exchanged"]
    return Placement(
        message=" and ".join(clauses), wrong=tuple(k for k, one in zip(usable, wrong, strict=True) if one), most=bool(wrong.mean() > 0.5)
    )


def _much_better(fits: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The images whose mask fits better elsewhere than by chance."""
    halved = (1 - fits**2 < 0.6 * (1 - own**2)) & (fits > 0.6)
    return ((fits > own + MARGIN) & (fits > LEAST_FIT)) | halved


def _better(fits: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The same for one place for all images; where nine of ten in a dozen fit better there, a small gain is enough."""
    better = fits > own
    if len(own) >= 12 and better.mean() >= 0.9 and np.median(fits - own) > 0.02:
        return better
    return _much_better(fits, own)


def _shifted(kept: Sequence[PlacementFeatures]) -> tuple[np.ndarray, str]:
    """The fit of each mask when all are moved by the shift that is best for all, and the shift in words."""
    found = np.zeros((len(kept), SIDE, SIDE), np.float32)
    for k, one in enumerate(kept):
        mask = np.fft.rfft2(_unit(one.mask).reshape(SIDE, SIDE))
        maps = np.fft.rfft2(one.basis.reshape(-1, SIDE, SIDE))
        found[k] = np.sqrt((np.fft.irfft2(maps * mask.conj(), s=(SIDE, SIDE)) ** 2).sum(0))
    down, across = np.unravel_index(found.mean(0).argmax(), (SIDE, SIDE))
    parts = []
    for steps, words, side in ((int(down), ("down", "up"), "height"), (int(across), ("to the right", "to the left"), "width")):
        steps = steps - SIDE if steps > SIDE // 2 else steps
        if steps:
            parts.append(f"{abs(steps) / SIDE:.0%} of the {side} {words[steps < 0]}")
    return found[:, down, across], " and ".join(parts) or "nothing"


def _num(some: int, num: int) -> str:
    return "they" if some == num else f"{some} of {num}"


def _turned_fit(one: PlacementFeatures, way: int) -> float:
    if way in (1, 3, 4, 6) and not one.square:
        return 0.0
    return float(np.linalg.norm(one.basis @ _unit(eight_orientations(one.mask)[way]).astype(np.float32)))


def runs_of_neighbours(items: list[T], most: int) -> list[T]:
    """At most ``most`` of the items in their order: all, or eight runs of neighbours, which are alike where faults come in series."""
    if len(items) <= most:
        return items
    run = most // 8
    starts = np.linspace(0, len(items) - run, 8).astype(int)
    return [items[k] for k in sorted({start + k for start in starts for k in range(run)})]
