"""Derives findings from the facts about every image: errors that would invalidate results, warnings, and notes. Opens no files."""

from __future__ import annotations

import enum
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cellbench.data.audit.image_statistics import SampleFacts
from cellbench.data.audit.keypoint_matching import find_same_images, find_shared_regions
from cellbench.data.audit.mask_placement import check_placement
from cellbench.data.audit.perceptual_hash import connected_groups
from cellbench.errors import first_names, quantity


class Severity(enum.Enum):
    """How bad a finding is."""

    SEVERE = "severe"
    """It would invalidate results."""
    LOOK = "look"
    """The user should look at it."""
    NOTE = "note"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of fault, and the images that have it."""

    kind: str
    severity: Severity
    message: str
    """The fault and its remedy, one sentence each."""
    images: tuple[str, ...] = ()
    facts: tuple[tuple[SampleFacts, ...], ...] = ()
    """For each of ``images`` the measurements of the image, or of both of a pair; empty where a finding is about no image."""


FEWEST_IMAGES = 6
"""Of fewer test images no difference can be significant: Wilcoxon's smallest two-sided p over n images is 2 / 2**n, below 0.05 from 6 on."""
TOO_FEW = "too few"


def too_few(num_images: int) -> list[Finding]:
    """The finding that a set has too few images to compare models on, whichever of them are tested."""
    if num_images >= FEWEST_IMAGES:
        return []
    images = quantity(num_images, "image")
    message = f"With {images} no difference between models can be significant: {FEWEST_IMAGES} are the least, 30 are better."
    return [Finding(kind=TOO_FEW, severity=Severity.SEVERE, message=message, images=("the whole set",))]


def findings(facts: Sequence[SampleFacts], pairs: DuplicatePairs) -> list[Finding]:
    """All findings, the severe first. ``pairs``: from :func:`find_duplicates`."""
    read = [f for f in facts if not f.error]
    fit = [f for f in read if f.size_px == f.mask_px]
    found = [*_file_findings(facts, read), *_value_findings(fit), *_mask_findings(fit), *_duplicate_findings(facts, pairs), *_outliers(fit)]
    return severe_first([finding for finding in found if finding.images])


def severe_first(found: Sequence[Finding]) -> list[Finding]:
    """The findings by severity, those of one severity in the given order."""
    order = list(Severity)
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _of(kind: str, severity: Severity, message: str, facts: Sequence[SampleFacts], wrong: Callable[[SampleFacts], bool]) -> Finding:
    found = [f for f in facts if wrong(f)]
    return Finding(kind=kind, severity=severity, message=message, images=tuple(f.name for f in found), facts=tuple((f,) for f in found))


def _file_findings(facts: Sequence[SampleFacts], read: Sequence[SampleFacts]) -> list[Finding]:
    errors = [f for f in facts if f.error]
    first = f" First: {errors[0].error}" if errors else ""
    return [
        _of("unreadable", Severity.SEVERE, f"An image or its mask cannot be read.{first}", facts, lambda f: bool(f.error)),
        _of("mis-sized", Severity.SEVERE, "The mask has another size than its image. Replace it.", read, lambda f: f.size_px != f.mask_px),
    ]


def _value_findings(fit: Sequence[SampleFacts]) -> list[Finding]:
    example = next((f.off_example for f in fit if f.off_solid), 0)
    off = f"The mask holds fields of values that the card does not name, such as {example}. Correct the mask, or the card's values."
    smooth = "The mask's edges are smoothed: values between those of the card. Each pixel takes the nearest; save masks without smoothing."
    noisy = "The mask's values vary from pixel to pixel (a JPEG?), and any value but 0 is a cell. Write a card with values, or save as PNG."
    lost = "The mask holds a second value that the card reads as background, so no cell is left. Correct the card's values."
    return [
        _of("values", Severity.SEVERE, off, fit, lambda f: f.off_solid),
        _of("lost", Severity.SEVERE, lost, fit, lambda f: f.lost_share > 0),
        _of("noisy", Severity.SEVERE, noisy, fit, lambda f: f.noisy),
        _of("smoothed", Severity.LOOK, smooth, fit, lambda f: not f.off_solid and f.off_share > 0.0005),
    ]


def _cell_share(f: SampleFacts) -> float:
    return 1 - f.shares[0]


def _has_both(f: SampleFacts) -> bool:
    return 0 < _cell_share(f) < 1


def _is_inverted(f: SampleFacts) -> bool:
    return _has_both(f) and f.frame_share > 0.6 and f.holes >= max(1, 2 * f.islands) and f.mode_in_cell > 0.8


def _mask_findings(fit: Sequence[SampleFacts]) -> list[Finding]:
    usual = float(np.median([_cell_share(f) for f in fit])) if fit else 0.0
    agreements = [f.agreement for f in fit if _has_both(f)]
    typical = float(np.median(agreements)) if agreements else 0.0

    def is_empty(f: SampleFacts) -> bool:
        return _cell_share(f) == 0 and not f.lost_share

    def shows_cells(f: SampleFacts) -> bool:
        # The threshold selects about as much as cells usually cover, with a clear contrast.
        return f.seen_contrast > 0.6 and f.seen_share > 0.3 * usual > 0

    def is_astray(f: SampleFacts) -> bool:
        # Medians on the real sets are 0.86 to 0.93; the worst correct mask has 0.27, masks moved by half the image at most 0.18.
        unlike = len(fit) >= 5 and typical > 0.6 and _has_both(f) and f.agreement < 0.25 * typical and f.seen_contrast > 0.6
        return (unlike and not _is_inverted(f)) or f in misplaced

    mapped = [f for f in fit if f.placement is not None and not _is_inverted(f)]
    placement = check_placement([f.placement for f in mapped if f.placement is not None], [f.seen_contrast for f in mapped])
    misplaced = [mapped[k] for k in placement.wrong]
    turned = ""
    if ("turned" in placement.message or "mirrored" in placement.message) and 2 * sum(f.exif_turn > 1 for f in misplaced) > len(misplaced):
        turned = " The images carry an EXIF orientation, which whatever drew the masks ignored."
    by_mask: dict[str, list[SampleFacts]] = defaultdict(list)
    for f in fit:
        if _has_both(f):
            by_mask[f.mask_hash].append(f)
    shared = [f for group in by_mask.values() if len({f.image_hash for f in group}) > 1 for f in group]
    areas = np.concatenate([np.array(f.areas_px, float) for f in fit]) if fit else np.zeros(0)
    cell_px = float(np.median(areas)) if areas.size else 0.0
    specks, limit = sum(f.num_specks for f in fit), max((f.min_cell_px for f in fit), default=0)
    all_parts = specks + len(areas)
    return [
        _of("full", Severity.SEVERE, "Every pixel is marked as cell. Replace the mask.", fit, lambda f: _cell_share(f) == 1),
        _of("empty", Severity.SEVERE, "No pixel is marked, though something stands out like cells. Replace the mask.", fit,
            lambda f: is_empty(f) and shows_cells(f)),
        _of("no cell", Severity.LOOK, "No pixel is marked. Right where the image has no cell.", fit, lambda f: is_empty(f) and not shows_cells(f)),
        _of("inverted", Severity.SEVERE, "Cells and background are exchanged in the mask. Invert it.", fit, _is_inverted),
        _of("same mask", Severity.SEVERE, "Different images have the same mask. One of them is another's.", shared, lambda f: True),
        _of("misplaced", Severity.SEVERE, f"The masks do not lie on what their images show: {placement.message}.{turned} Correct them.",
            misplaced if placement.most else (), lambda f: True),
        _of("astray", Severity.LOOK, "What is marked is not what stands out: another image's mask, or a shifted one?"
            + (f" Of the masks {placement.message}.{turned}" if placement.message else ""), () if placement.most else fit, is_astray),
        _of("border", Severity.LOOK, "Something at the border stands out like a cell and is not marked.", fit,
            lambda f: any(area > 0.25 * cell_px for area in f.missed_border) and cell_px > 0),
        _of("specks", Severity.LOOK, f"{specks} of {all_parts} marked fields are below {limit} px. Cell counts ignore them; pixels count.", fit,
            lambda f: f.num_specks > 0 and specks > 0.05 * all_parts),
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DuplicatePairs:
    """Pairs of images that show the same, by their position among the facts."""

    same: tuple[tuple[int, int], ...] = ()
    """The same file: each with the next one."""
    whole: tuple[tuple[int, int], ...] = ()
    """The same picture, turned or saved again. Of same files only the first, here and in ``part``."""
    part: tuple[tuple[int, int], ...] = ()
    """A part of the same picture."""

    def groups(self, num: int) -> list[int]:
        """For each of ``num`` images the first of its group."""
        return connected_groups(num, (*self.same, *self.whole, *self.part))


def find_duplicates(facts: Sequence[SampleFacts]) -> DuplicatePairs:
    """Finds them among the images that could be read."""
    same: dict[str, list[int]] = defaultdict(list)
    for k, f in enumerate(facts):
        if not f.error:
            same[f.image_hash].append(k)
    once = [numbers[0] for numbers in same.values()]
    keypoints = [facts[k].keypoints for k in once]
    whole = [(once[i], once[j]) for i, j in find_same_images(keypoints, [facts[k].small for k in once])]
    part = [(once[pair.first], once[pair.second]) for pair in find_shared_regions(keypoints)]
    return DuplicatePairs(
        same=tuple(pair for numbers in same.values() for pair in itertools.pairwise(numbers)),
        whole=tuple(whole),
        part=tuple(pair for pair in part if pair not in set(whole)),
    )


def _duplicate_findings(facts: Sequence[SampleFacts], pairs: DuplicatePairs) -> list[Finding]:
    """Same and nearly same images, within a split and, worse, across splits."""
    splits: dict[str, set[str]] = defaultdict(set)
    by_group: dict[str, set[str]] = defaultdict(set)
    for f in facts:
        splits[f.image_hash].add(f.split)
        if f.group:
            by_group[f.group].add(f.split)

    def of_pairs(kind: str, severity: Severity, message: str, some: Sequence[tuple[int, int]]) -> Finding:
        across = severity is Severity.SEVERE
        found = [
            (a, b) for a, b in ((facts[i], facts[j]) for i, j in some) if (len(splits[a.image_hash] | splits[b.image_hash]) > 1) == across
        ]
        names = tuple(f"{a.split}/{a.name} = {b.split}/{b.name}" for a, b in found)
        return Finding(kind=kind, severity=severity, message=message, images=names, facts=tuple(found))

    todo = "Remove one, or split again with data.group=near-duplicates."
    torn = tuple(group for group, home in by_group.items() if "test" in home and len(home) > 1)
    torn_message = "A group lies in the test set and elsewhere. Split by data.group."
    part = "show a part of the same picture: a crop, or fields that overlap."
    return [
        of_pairs("leak: same", Severity.SEVERE, f"The same image lies in two splits. {todo}", pairs.same),
        of_pairs("leak: near", Severity.SEVERE, f"Images in two splits are the same picture, turned or saved again. {todo}", pairs.whole),
        of_pairs("leak: crop", Severity.SEVERE, f"Images in two splits {part} {todo}", pairs.part),
        Finding(kind="leak: group", severity=Severity.SEVERE, message=torn_message, images=torn),
        of_pairs("same", Severity.LOOK, "The same image occurs twice in one split and counts double.", pairs.same),
        of_pairs("near", Severity.LOOK, "Images in one split are the same picture, turned or saved again.", pairs.whole),
        of_pairs("crop", Severity.LOOK, f"Images in one split {part}", pairs.part),
    ]


def _outliers(fit: Sequence[SampleFacts]) -> list[Finding]:
    if len(fit) < 5:
        return []
    size, num = Counter(f.size_px for f in fit).most_common(1)[0]
    stains = np.array([f.stain for f in fit])
    middle = np.median(stains, 0)
    spread = np.maximum(1.4826 * np.median(np.abs(stains - middle), 0), 2.0)
    far = {f.name for f, distance in zip(fit, np.abs((stains - middle) / spread).max(1), strict=True) if distance > 6}
    stain = "The image's colour is far from the others' (6 robust deviations). Another stain or camera?"
    return [
        _of("size", Severity.NOTE, f"The image has another size than most ({size[1]} x {size[0]}).", fit,
            lambda f: num > 0.6 * len(fit) and f.size_px != size),
        _of("stain", Severity.LOOK, stain, fit, lambda f: f.name in far),
    ]  # fmt: skip


def statistics(facts: Sequence[SampleFacts], classes: Sequence[str]) -> list[tuple[str, str]]:
    """Names and values for a table: images, sizes, class balance, cells, areas and diameters."""
    fit = [f for f in facts if not f.error and f.size_px == f.mask_px]
    out = [("images", ", ".join(f"{num} {split}" for split, num in Counter(f.split for f in facts).items()))]
    if not fit:
        return out
    sizes = Counter(f"{f.size_px[1]} x {f.size_px[0]}" for f in fit).most_common()
    out.append(("sizes", first_names([f"{size} ({num})" for size, num in sizes], 4)))
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
