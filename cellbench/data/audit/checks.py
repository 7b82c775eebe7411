"""From the facts of every image to findings: what would falsify a result, what should be looked at, what is good to know. No files here."""

from __future__ import annotations

import enum
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cellbench.data.audit.keypoint_matching import Keypoints, find_same_images, find_shared_regions
from cellbench.data.audit.mask_placement import PlacementFeatures, check_placement
from cellbench.data.audit.perceptual_hash import connected_groups


class Severity(enum.Enum):
    """How bad a finding is."""

    SEVERE = "severe"
    """It would falsify a result."""
    LOOK = "look"
    """A person should look at it."""
    NOTE = "note"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of fault, and the images that have it."""

    kind: str
    severity: Severity
    said: str
    """What is wrong and what to do, one sentence each."""
    images: tuple[str, ...] = ()


class ImageFacts(Protocol):
    """What is read of `data.survey`'s record."""

    name: str
    split: str
    group: str
    error: str
    size_px: tuple[int, int]
    mask_px: tuple[int, int]
    image_hash: str
    mask_hash: str
    small: np.ndarray
    marks: Keypoints
    stain: tuple[float, float, float]
    shares: tuple[float, ...]
    areas_px: tuple[int, ...]
    num_specks: int
    min_cell_px: int
    off_share: float
    off_solid: bool
    off_example: int
    lost_share: float
    noisy: bool
    frame_share: float
    holes: int
    islands: int
    mode_in_cell: float
    seen_share: float
    seen_contrast: float
    agreement: float
    maps: PlacementFeatures | None
    exif_turn: int
    missed_border: tuple[int, ...]


def findings(facts: Sequence[ImageFacts], same: DuplicatePairs) -> list[Finding]:
    """All findings, the severe first. ``same``: as ``twins`` found them."""
    read = [f for f in facts if not f.error]
    fit = [f for f in read if f.size_px == f.mask_px]
    found = [*_files(facts, read), *_values(fit), *_masks(fit), *_twins(facts, same), *_odd(fit)]
    order = list(Severity)
    return sorted((finding for finding in found if finding.images), key=lambda finding: order.index(finding.severity))


def _of(kind: str, severity: Severity, said: str, facts: Sequence[ImageFacts], wrong: Callable[[ImageFacts], bool]) -> Finding:
    return Finding(kind=kind, severity=severity, said=said, images=tuple(f.name for f in facts if wrong(f)))


def _files(facts: Sequence[ImageFacts], read: Sequence[ImageFacts]) -> list[Finding]:
    errors = [f for f in facts if f.error]
    first = f" First: {errors[0].error}" if errors else ""
    return [
        _of("unreadable", Severity.SEVERE, f"An image or its mask cannot be read.{first}", facts, lambda f: bool(f.error)),
        _of("mis-sized", Severity.SEVERE, "The mask has another size than its image. Replace it.", read, lambda f: f.size_px != f.mask_px),
    ]


def _values(fit: Sequence[ImageFacts]) -> list[Finding]:
    example = next((f.off_example for f in fit if f.off_solid), 0)
    said = f"The mask holds fields of values that the card does not know, such as {example}. Correct the mask, or the card's values."
    smooth = "The mask's edges are smoothed: values between those of the card. Each pixel takes the nearest; save masks without smoothing."
    noisy = "The mask's numbers vary from pixel to pixel (a JPEG?), and any number but 0 is a cell here. Write a card with values, or save as PNG."
    lost = "The mask holds a second value that the card takes for background, so no cell is left. Correct the card's values."
    return [
        _of("values", Severity.SEVERE, said, fit, lambda f: f.off_solid),
        _of("lost", Severity.SEVERE, lost, fit, lambda f: f.lost_share > 0),
        _of("noisy", Severity.SEVERE, noisy, fit, lambda f: f.noisy),
        _of("smoothed", Severity.LOOK, smooth, fit, lambda f: not f.off_solid and f.off_share > 0.0005),
    ]


def _masks(fit: Sequence[ImageFacts]) -> list[Finding]:
    def share(f: ImageFacts) -> float:
        return 1 - f.shares[0]

    usual = float(np.median([share(f) for f in fit])) if fit else 0.0
    agreements = [f.agreement for f in fit if 0 < share(f) < 1]
    typical = float(np.median(agreements)) if agreements else 0.0

    def inverted(f: ImageFacts) -> bool:
        return 0 < share(f) < 1 and f.frame_share > 0.6 and f.holes >= max(1, 2 * f.islands) and f.mode_in_cell > 0.8

    def plain_empty(f: ImageFacts) -> bool:
        return share(f) == 0 and not f.lost_share

    def has_cells(f: ImageFacts) -> bool:
        # What a threshold finds is about as much as cells usually are, and clearly apart.
        return f.seen_contrast > 0.6 and f.seen_share > 0.3 * usual > 0

    def astray(f: ImageFacts) -> bool:
        # On the real sets 0.86 to 0.93 in the median; the least of all 0.27 in truth, 0.18 at most where a mask is moved by half the image.
        return len(fit) >= 5 and typical > 0.6 and 0 < share(f) < 1 and f.agreement < 0.25 * typical and f.seen_contrast > 0.6

    mapped = [f for f in fit if f.maps is not None and not inverted(f)]
    place = check_placement([f.maps for f in mapped if f.maps is not None], [f.seen_contrast for f in mapped])
    misplaced = [mapped[k] for k in place.wrong]
    turned = ""
    if "turned" in place.said + place.said.replace("mirrored", "turned") and sum(f.exif_turn > 1 for f in misplaced) > 0.5 * len(misplaced):
        turned = " The images carry an EXIF orientation, which whatever drew the masks ignored."

    masks: dict[str, list[ImageFacts]] = defaultdict(list)
    for f in fit:
        if 0 < share(f) < 1:
            masks[f.mask_hash].append(f)
    shared = [f for group in masks.values() if len({f.image_hash for f in group}) > 1 for f in group]
    areas = np.concatenate([np.array(f.areas_px, float) for f in fit]) if fit else np.zeros(0)
    cell_px = float(np.median(areas)) if areas.size else 0.0
    specks, limit = sum(f.num_specks for f in fit), max((f.min_cell_px for f in fit), default=0)
    all_parts = specks + len(areas)
    return [
        _of("full", Severity.SEVERE, "Every pixel is marked as cell. Replace the mask.", fit, lambda f: share(f) == 1),
        _of("empty", Severity.SEVERE, "No pixel is marked, though something stands out like cells. Replace the mask.", fit,
            lambda f: plain_empty(f) and has_cells(f)),
        _of("no cell", Severity.LOOK, "No pixel is marked. Right where the image has no cell.", fit, lambda f: plain_empty(f) and not has_cells(f)),
        _of("inverted", Severity.SEVERE, "Cells and background are exchanged in the mask. Invert it.", fit, inverted),
        _of("same mask", Severity.SEVERE, "Different images have the very same mask. One of them is another's.", shared, lambda f: True),
        _of("misplaced", Severity.SEVERE, f"The masks do not lie on what their images show: {place.said}.{turned} Put them right.",
            misplaced if place.most else (), lambda f: True),
        _of("astray", Severity.LOOK, "What is marked is not what stands out: another image's mask, or a shifted one?"
            + (f" Of the masks {place.said}.{turned}" if place.said else ""), () if place.most else fit,
            lambda f: (astray(f) and not inverted(f)) or f in misplaced),
        _of("border", Severity.LOOK, "Something at the border stands out like a cell and is not marked.", fit,
            lambda f: any(area > 0.25 * cell_px for area in f.missed_border) and cell_px > 0),
        _of("specks", Severity.LOOK, f"{specks} of {all_parts} marked fields are below {limit} px. Cell counts ignore them; pixels count.", fit,
            lambda f: f.num_specks > 0 and specks > 0.05 * all_parts),
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DuplicatePairs:
    """Pairs of images, by their numbers among the facts, that show the same."""

    same: tuple[tuple[int, int], ...]
    """The very same file: each with the next like it."""
    whole: tuple[tuple[int, int], ...]
    """The same picture, turned or saved anew. Of same files the first only, here and in ``part``."""
    part: tuple[tuple[int, int], ...]
    """A part of the same picture, and no more."""

    def first(self, num: int) -> list[int]:
        """For each of ``num`` images the number of the first that pairs join it to."""
        return connected_groups(num, (*self.same, *self.whole, *self.part))


def find_duplicates(facts: Sequence[ImageFacts]) -> DuplicatePairs:
    """Finds them among the images that could be read."""
    same: dict[str, list[int]] = defaultdict(list)
    for k, f in enumerate(facts):
        if not f.error:
            same[f.image_hash].append(k)
    once = [numbers[0] for numbers in same.values()]
    all_marks = [facts[k].marks for k in once]
    near = [(once[i], once[j]) for i, j in find_same_images(all_marks, [facts[k].small for k in once])]
    part = [(once[pair.first], once[pair.second]) for pair in find_shared_regions(all_marks)]
    return DuplicatePairs(
        same=tuple(pair for numbers in same.values() for pair in itertools.pairwise(numbers)),
        whole=tuple(near),
        part=tuple(pair for pair in part if pair not in set(near)),
    )


def _twins(facts: Sequence[ImageFacts], found: DuplicatePairs) -> list[Finding]:
    """Same and near-same images, within a split and, worse, across."""
    splits: dict[str, set[str]] = defaultdict(set)
    for f in facts:
        splits[f.image_hash].add(f.split)

    def lying(pairs: Sequence[tuple[int, int]], across: bool) -> tuple[str, ...]:
        return tuple(
            f"{a.split}/{a.name} = {b.split}/{b.name}"
            for a, b in ((facts[i], facts[j]) for i, j in pairs)
            if (len(splits[a.image_hash] | splits[b.image_hash]) > 1) == across
        )

    todo = "Remove one, or split anew with data.group=near-duplicates."
    torn: dict[str, set[str]] = defaultdict(set)
    for f in facts:
        if f.group:
            torn[f.group].add(f.split)
    groups = tuple(group for group, splits in torn.items() if "test" in splits and len(splits) > 1)
    return [
        Finding(
            kind="leak: same", severity=Severity.SEVERE, said=f"The same image lies in two splits. {todo}", images=lying(found.same, True)
        ),
        Finding(
            kind="leak: near",
            severity=Severity.SEVERE,
            said=f"Images in two splits are the same picture, turned or saved anew. {todo}",
            images=lying(found.whole, True),
        ),
        Finding(
            kind="leak: crop",
            severity=Severity.SEVERE,
            said=f"Images in two splits show a part of the same picture: a crop, or fields that overlap. {todo}",
            images=lying(found.part, True),
        ),
        Finding(
            kind="leak: group", severity=Severity.SEVERE, said="A group lies in the test and elsewhere. Split by data.group.", images=groups
        ),
        Finding(
            kind="same",
            severity=Severity.LOOK,
            said="The same image comes twice in one split and counts double.",
            images=lying(found.same, False),
        ),
        Finding(
            kind="near",
            severity=Severity.LOOK,
            said="Images in one split are the same picture, turned or saved anew.",
            images=lying(found.whole, False),
        ),
        Finding(
            kind="crop",
            severity=Severity.LOOK,
            said="Images in one split show a part of the same picture: a crop, or fields that overlap.",
            images=lying(found.part, False),
        ),
    ]


def _odd(fit: Sequence[ImageFacts]) -> list[Finding]:
    if len(fit) < 5:
        return []
    size, num = Counter(f.size_px for f in fit).most_common(1)[0]
    stains = np.array([f.stain for f in fit])
    middle = np.median(stains, 0)
    spread = np.maximum(1.4826 * np.median(np.abs(stains - middle), 0), 2.0)
    far = {f.name for f, distance in zip(fit, np.abs((stains - middle) / spread).max(1), strict=True) if distance > 6}
    said = f"The image has another size than most ({size[1]} x {size[0]})."
    return [
        _of("size", Severity.NOTE, said, fit, lambda f: num > 0.6 * len(fit) and f.size_px != size),
        _of(
            "stain",
            Severity.LOOK,
            "The image's colour is far from the others' (6 robust deviations). Another stain or camera?",
            fit,
            lambda f: f.name in far,
        ),
    ]


def statistics(facts: Sequence[ImageFacts], classes: Sequence[str]) -> list[tuple[str, str]]:
    """Names and values for a table: images, sizes, class balance, cells, areas and diameters."""
    fit = [f for f in facts if not f.error and f.size_px == f.mask_px]
    out = [("images", ", ".join(f"{num} {split}" for split, num in Counter(f.split for f in facts).items()))]
    if not fit:
        return out
    sizes = Counter(f"{f.size_px[1]} x {f.size_px[0]}" for f in fit).most_common()
    out.append(
        ("sizes", ", ".join(f"{size} ({num})" for size, num in sizes[:4]) + (f" and {len(sizes) - 4} more" if len(sizes) > 4 else ""))
    )
    weights = np.array([f.size_px[0] * f.size_px[1] for f in fit], float)
    shares = np.average([f.shares for f in fit], axis=0, weights=weights)
    out.append(("pixels", ", ".join(f"{name} {share:.1%}" for name, share in zip(classes, shares, strict=True))))
    counts = [len(f.areas_px) for f in fit]
    out.append(("cells an image", f"{np.median(counts):g} in the median, {min(counts)} to {max(counts)}; {sum(counts)} in all"))
    areas = np.concatenate([np.array(f.areas_px, float) for f in fit])
    if areas.size:
        low, middle, high = np.quantile(areas, [0.05, 0.5, 0.95])
        out.append(("area of a cell", f"{middle:,.0f} px in the median; 90 % have {low:,.0f} to {high:,.0f} px"))
        low, middle, high = 2 * np.sqrt(np.array([low, middle, high]) / np.pi)
        out.append(("diameter", f"{middle:.0f} px in the median; 90 % have {low:.0f} to {high:.0f} px (of a disc of that area)"))
    return out
