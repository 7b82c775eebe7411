"""Finds images that show a part of the same picture: crops or overlapping fields, at any scale, rotated or mirrored.

SIFT features (Lowe 2004) propose pairs; their positions must agree on one similarity transform. That alone is no proof: round cells and regular
layouts agree by chance. So the pictures are aligned with subpixel accuracy (ECC, Evangelidis and Psarakis 2008) and compared pixel by
pixel: the edges must coincide everywhere, and the texture between them must agree. Features are looked up by visual words, so that the work grows
with the number of images and not with its square. On 34,244 features (100 images) that takes 1.0 s; OpenCV's FLANN finds the same pairs in 3.6 s,
and the product of all descriptors takes 53 s.

Legend: N features of one image, M of all. A place is a complex number x + iy in pixels of the small picture; a transform maps z to ``c z + t``,
mirrored to ``c conj(z) + t``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from cellbench.data.audit.perceptual_hash import eight_orientations, find_near_pairs, high_pass
from cellbench.data.audit.visual_words import find_matches

SIDE_PX = 400
"""Longer side of the small picture in which features are detected. A crop of 0.3 of the sides still fills 120 px."""
MAX_KEYPOINTS = 200
"""Maximum number of features per image, the largest first, which survive resizing and compression. With 400 no more planted crops are found."""
CONTRAST = 0.006
"""Contrast threshold of SIFT: a seventh of OpenCV's, because a single stained cell has few features."""
COARSE = 0.5
"""Size at which features are first looked for, of that of the small picture: the time grows with the pixels."""
FINE = 0.75
"""Size at which they are looked for where the coarse picture has few."""
FEW_KEYPOINTS = 130
"""Measured by ``tests/tools/planted_crops.py``: 147 of 160 planted crops of nuclei and 156 of 160 of single cells are found, as many as with up to 400
features at half the size or, where that has fewer than 100, at full size, in two thirds of the time."""
MIN_COSINE = 0.9
"""Minimum similarity of two descriptors. The same spot in two pictures has 0.95 to 1; the nearest spot in another smear at most 0.85 in 90 % of cases."""
MIN_MATCHES = 4
"""Features that agree on one transform, to compare two pictures."""
MAX_TRANSFORMS = 3
"""Number of transforms tried for one pair: a label in all images may match before the cells do."""
MAX_PAIRS = 40
"""Candidate pairs tried for an image, those with most matches first: if all images share a layout, every pair is a candidate."""
_WAVE_PX = 4
"""Lower frequencies are removed before the comparison: a round edge that is 2 px off correlates at 0.9 with them, and not at all without."""
_FIELD_PX = 16
"""Side of the fields in which edges are compared."""

# SIFT's 4 x 4 fields of 8 directions after mirroring: fields change sides across the main direction, directions their sign.
_MIRRORED = np.arange(128).reshape(4, 4, 8)[::-1][:, :, -np.arange(8) % 8].ravel()


@dataclass(frozen=True, kw_only=True, eq=False)
class Keypoints:
    """SIFT features of one image."""

    places: np.ndarray
    """(N,) complex64"""
    sizes: np.ndarray
    """(N,) float32, px of the small picture"""
    directions: np.ndarray
    """(N,) complex64 of length 1"""
    descriptors: np.ndarray
    """(N, 128) uint8"""
    picture: np.ndarray
    """(H, W) uint8: the small grey picture, its longer side ``SIDE_PX`` at most"""


_NONE = np.zeros(0, np.complex64)
NO_KEYPOINTS = Keypoints(
    places=_NONE, sizes=_NONE.real, directions=_NONE, descriptors=np.zeros((0, 128), np.uint8), picture=np.zeros((0, 0), np.uint8)
)


@dataclass(frozen=True, kw_only=True)
class SharedRegion:
    """Two images, ``first < second``, that show the same."""

    first: int
    second: int
    agreement: float
    """Share of the edges that coincide, 0..1."""
    share: float
    """Overlap as a share of the smaller field of view."""


def keypoints(grey_HW: np.ndarray) -> Keypoints:
    """The features of a grey image float32, 0..255 (``perceptual_hash.to_grey``). About 10 ms of a core for any size, 120 kB."""
    picture = _small(grey_HW)
    low, high = np.percentile(picture[::2, ::2], (1, 99))
    stretched = ((picture - low) * (255 / max(high - low, 24))).clip(0, 255).astype(np.uint8)
    sift = cv2.SIFT.create(contrastThreshold=CONTRAST)
    for share in (COARSE, FINE):
        size = [max(1, round(side * share)) for side in stretched.shape[::-1]]
        seen = cv2.resize(stretched, size, interpolation=cv2.INTER_AREA)
        if len(found := sift.detect(seen, None)) >= FEW_KEYPOINTS:
            break
    found = sorted(found, key=lambda one: -one.size)[:MAX_KEYPOINTS]
    if not found:
        return replace(NO_KEYPOINTS, picture=picture.astype(np.uint8))
    found, descriptors = sift.compute(seen, found)
    down, across = (full / own for full, own in zip(stretched.shape, seen.shape, strict=True))
    return Keypoints(
        places=np.array([complex((x + 0.5) * across - 0.5, (y + 0.5) * down - 0.5) for x, y in (one.pt for one in found)], np.complex64),
        sizes=np.array([one.size * across for one in found], np.float32),
        directions=np.exp(1j * np.radians([one.angle for one in found])).astype(np.complex64),
        descriptors=descriptors.astype(np.uint8),
        picture=picture.astype(np.uint8),
    )


def _small(grey_HW: np.ndarray) -> np.ndarray:
    """At most ``SIDE_PX`` long; smaller pictures are doubled once, so that a single cell has features too."""
    height, width = grey_HW.shape
    factor = min(SIDE_PX / max(height, width), 2.0)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(np.ascontiguousarray(grey_HW), size, interpolation=cv2.INTER_LINEAR if factor > 1 else cv2.INTER_AREA).clip(0, 255)


def find_shared_regions(all_keypoints: Sequence[Keypoints]) -> list[SharedRegion]:
    """All pairs of images that show a part of the same, in order."""
    found: dict[tuple[int, int], SharedRegion] = {}
    num_tried: Counter[int] = Counter()
    for first, second, mirrored, ones, others in sorted(_candidates(all_keypoints), key=lambda one: -len(one[3])):
        if (first, second) in found or min(num_tried[first], num_tried[second]) >= MAX_PAIRS:
            continue
        num_tried.update((first, second))
        pair = _shared_region(all_keypoints, first, second, mirrored, ones, others)
        if pair is not None:
            found[first, second] = pair
    return [found[pair] for pair in sorted(found)]


def find_same_images(all_keypoints: Sequence[Keypoints], small_NTT: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs (i < j) of images that are one picture, turned, resized or saved again. ``small_NTT``: ``mean_pool(to_grey(image))`` of each.

    ``find_near_pairs`` proposes them; pairs whose pixels differ are left out, such as two photographs of the same empty plate.
    """
    found = []
    for i, j, _ in find_near_pairs(small_NTT):
        mine = high_pass(small_NTT[i])
        way = int(np.argmax([float(mine @ high_pass(other)) for other in eight_orientations(small_NTT[j])]))
        one, other = all_keypoints[i].picture, np.ascontiguousarray(eight_orientations(all_keypoints[j].picture)[way])
        if not one.size or not other.size:
            found.append((i, j))
            continue
        across, down = other.shape[1] / one.shape[1], other.shape[0] / one.shape[0]
        evidence = _compared(one, other, np.array([[across, 0, (across - 1) / 2], [0, down, (down - 1) / 2]]), similar=False)
        # Where a plain picture has neither edges nor texture, the small pictures' correlation is all there is.
        if evidence is None or evidence.proves or not (evidence.num_fields or evidence.denies):
            found.append((i, j))
    return found


def _shared_region(
    all_keypoints: Sequence[Keypoints], first: int, second: int, mirrored: bool, ones: np.ndarray, others: np.ndarray
) -> SharedRegion | None:
    one, other = all_keypoints[first], all_keypoints[second]
    for _ in range(MAX_TRANSFORMS):
        similarity = _similarity(one, other, mirrored, ones, others)
        if similarity is None:
            return None
        c, t, inside = similarity
        matrix = np.array([[c.real, -c.imag, t.real], [c.imag, c.real, t.imag]]) @ np.diag([1, -1 if mirrored else 1, 1])
        evidence = _compared(one.picture, other.picture, matrix)
        if evidence is not None and evidence.proves:
            return SharedRegion(first=first, second=second, agreement=evidence.agreement, share=evidence.share)
        ones, others = ones[~inside], others[~inside]
    return None


def _candidates(all_keypoints: Sequence[Keypoints]) -> Iterator[tuple[int, int, bool, np.ndarray, np.ndarray]]:
    """(first, second, mirrored, features of the first, features of the second) of pairs with ``MIN_MATCHES`` matches or more."""
    image_M = np.repeat(np.arange(len(all_keypoints)), [len(one.places) for one in all_keypoints])
    if len(image_M) < 2:
        return
    descriptors_MD = np.concatenate([one.descriptors for one in all_keypoints])
    within_M = np.concatenate([np.arange(len(one.places)) for one in all_keypoints])
    matches = _distinct(find_matches(descriptors_MD, image_M, _MIRRORED, MIN_COSINE), len(image_M))
    if not len(matches):
        return
    matches = matches[np.lexsort((matches[:, 0], image_M[matches[:, 2]], image_M[matches[:, 1]]))]
    keys = np.stack([image_M[matches[:, 1]], image_M[matches[:, 2]], matches[:, 0]], 1)
    starts = np.flatnonzero(np.any(np.diff(keys, axis=0, prepend=-1), axis=1))
    for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
        end = min(end, start + 300)
        if end - start >= MIN_MATCHES:
            first, second, mirrored = keys[start].tolist()
            yield first, second, bool(mirrored), within_M[matches[start:end, 1]], within_M[matches[start:end, 2]]


def _distinct(matches_K3: np.ndarray, num: int) -> np.ndarray:
    """The distinct rows, sorted, of positions below ``num``: as one number each, since ``np.unique`` of rows takes ten times longer."""
    keys, second = np.divmod(np.unique((matches_K3[:, 0] * num + matches_K3[:, 1]) * num + matches_K3[:, 2]), num)
    return np.stack([*np.divmod(keys, num), second], 1)


def _similarity(
    one: Keypoints, other: Keypoints, mirrored: bool, ones: np.ndarray, others: np.ndarray
) -> tuple[complex, complex, np.ndarray] | None:
    """The similarity transform (c, t) with most votes, fitted to its voters, and the voters; None with fewer than ``MIN_MATCHES``.

    Each match proposes one, by its places, sizes and directions (Lowe 2004). OpenCV's RANSAC, which draws pairs of matches by their places alone,
    misses crops of regular layouts.
    """
    if len(ones) < MIN_MATCHES:
        return None
    z, w = one.places[ones].astype(complex), other.places[others].astype(complex)
    direction = one.directions[ones]
    if mirrored:
        z, direction = z.conj(), direction.conj()
    c = other.sizes[others] / one.sizes[ones] * other.directions[others] / direction
    t = w - c * z
    off = np.abs(c[:, None] * z + t[:, None] - w) / np.maximum(1, np.abs(c))[:, None]
    turned = c[None] / c[:, None]
    fits = (off < 4) & (np.abs(np.log(np.abs(turned))) < 0.4) & (np.abs(np.angle(turned)) < 0.35)
    inside = fits[fits.sum(1).argmax()]
    if inside.sum() < MIN_MATCHES:  # almost always
        return None
    for _ in range(2):
        if _num_places(z[inside], w[inside]) < MIN_MATCHES:
            return None
        scale, shift = np.linalg.lstsq(np.stack([z[inside], np.ones(inside.sum())], 1), w[inside], rcond=None)[0]
        inside = np.abs(scale * z + shift - w) < 3 * max(1, abs(scale))
    return (complex(scale), complex(shift), inside) if _num_places(z[inside], w[inside]) >= MIN_MATCHES and scale else None


def _num_places(z: np.ndarray, w: np.ndarray) -> int:
    """Distinct places: one spot may have features of several directions."""
    return min(len(np.unique(z.round())), len(np.unique(w.round())))


@dataclass(frozen=True, kw_only=True)
class _Evidence:
    """How well two aligned pictures agree."""

    num_fields: int
    """Fields with edges in either picture."""
    agreement: float
    """Share of these fields, weighted by edge strength, in which both correlate. Measured: true copies 0.98 to 1, different pictures of one layout at
    most 0.93."""
    texture: float | None
    """Correlation between the edges, -1..1; None where there is no texture, or one picture has lost its own (JPEG, smoothing)."""
    share: float

    @property
    def denies(self) -> bool:
        """Whether the textures differ. Measured: true copies 0.23 or more, different pictures at most 0.1."""
        return self.texture is not None and self.texture < 0.2

    @property
    def proves(self) -> bool:
        if self.texture is not None and self.texture > 0.5:
            return not self.num_fields or self.agreement >= 0.3  # a label or a scale bar hides what lies below it
        if self.texture is not None and not self.denies and self.agreement >= 0.7:
            return True  # saved again at another size, sharpened or smoothed
        if self.num_fields >= 100 and self.agreement >= 0.98:
            return True  # whatever the texture: a second photograph of the same place has another noise
        # A few round edges coincide by chance, mostly those of a small part.
        return self.num_fields > 0 and self.agreement >= 0.95 and not self.denies and self.share > 1 / 3


def _compared(one_HW: np.ndarray, other_HW: np.ndarray, matrix: np.ndarray, similar: bool = True) -> _Evidence | None:
    """The evidence for ``matrix`` (2, 3), which maps (x, y, 1) of the first picture, uint8, to (x, y) of the second.

    None where they overlap by less than 400 px, or where they only fit when sheared (``similar``).
    """
    if (scale := _scale(matrix)) < 1:  # swapped, so that the finer picture is resampled
        return _compared(other_HW, one_HW, cv2.invertAffineTransform(matrix), similar) if scale > 0 else None
    one = cv2.GaussianBlur(one_HW.astype(np.float32), (0, 0), 1)
    other = cv2.GaussianBlur(other_HW.astype(np.float32), (0, 0), scale)
    matrix = _aligned(one, other, matrix)
    longest, shortest = np.linalg.svd(matrix[:, :2])[1]
    if similar and longest > 1.03 * shortest:
        return None
    flags, size = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, one.shape[::-1]
    other = cv2.warpAffine(other, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(np.ones(other_HW.shape, np.float32), matrix, size, flags=flags) > 0.999
    if (area_px := int(inside.sum())) < 400:
        return None
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    weight = inside[box].astype(np.float32)
    known = np.maximum(cv2.GaussianBlur(weight, (0, 0), _WAVE_PX), 1e-3)
    a, b = ((picture[box] - cv2.GaussianBlur(picture[box] * weight, (0, 0), _WAVE_PX) / known) * weight for picture in (one, other))
    height, width = weight.shape
    field = np.arange(height)[:, None] // _FIELD_PX * (width // _FIELD_PX + 1) + np.arange(width) // _FIELD_PX
    product, energy_a, energy_b, num = (np.bincount(field.ravel(), values.ravel()) for values in (a * b, a * a, b * b, weight))
    # Three grey levels of 255: below is the noise of a plain ground, and compression changes it. Dim pictures have weaker edges.
    least = np.clip(0.05 * np.ptp(np.percentile(one_HW, (1, 99))), 1.5, 3)
    edges = (num >= 0.4 * _FIELD_PX**2) & (np.maximum(energy_a, energy_b) > least**2 * num)
    strength = np.sqrt(np.maximum(energy_a, energy_b) / np.maximum(num, 1))[edges]
    agrees = product[edges] > 0.7 * np.sqrt(energy_a * energy_b)[edges]
    near_edge = cv2.dilate((cv2.GaussianBlur(np.maximum(a * a, b * b), (0, 0), 2) > 6).astype(np.uint8), np.ones((13, 13), np.uint8)) > 0
    return _Evidence(
        num_fields=int(edges.sum()),
        agreement=float(np.average(agrees, weights=strength)) if edges.any() else 0.0,
        texture=_texture(a[~near_edge & (weight > 0)], b[~near_edge & (weight > 0)]),
        share=min(1.0, area_px / min(inside.size, other_HW.size / _scale(matrix) ** 2)),
    )


def _texture(a: np.ndarray, b: np.ndarray) -> float | None:
    if a.size < 1000:
        return None
    power_a, power_b = float((a * a).mean()), float((b * b).mean())
    # Rounding to whole grey levels alone leaves 0.01; a copy that lost three quarters of its texture has none to compare.
    if min(power_a, power_b) < max(0.1, 0.25 * max(power_a, power_b)):
        return None
    return float((a * b).mean() / np.sqrt(power_a * power_b))


def _aligned(one: np.ndarray, other: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The affine transform near ``matrix`` with the best correlation (ECC), at half the size or less; ``matrix`` where it does not converge."""
    size = [max(16, side // 2) if min(one.shape) >= 150 else side for side in one.shape[::-1]]
    scale = _scale(matrix)
    coarse = [min(full, max(16, round(full * size[0] / one.shape[1] / scale))) for full in other.shape[::-1]]
    into_one, into_other = _resizing(one.shape[::-1], size), _resizing(other.shape[::-1], coarse)
    start = into_other @ np.vstack([matrix, [0, 0, 1]]) @ np.linalg.inv(into_one)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 20, 1e-4)
    first, second = (cv2.resize(picture, to, interpolation=cv2.INTER_AREA) for picture, to in ((one, size), (other, coarse)))
    try:
        _, found = cv2.findTransformECC(first, second, start[:2].astype(np.float32), cv2.MOTION_AFFINE, stop, None, 1)  # type: ignore[call-overload]  # its stub wants a mask
    except cv2.error:  # it did not converge
        return matrix
    better = (np.linalg.inv(into_other) @ np.vstack([found, [0, 0, 1]]) @ into_one)[:2]
    height, width = one.shape
    moved = np.abs((better - matrix) @ np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]])).max()
    return better if moved < 8 * max(scale, 1) else matrix


def _resizing(full: Sequence[int], to: Sequence[int]) -> np.ndarray:
    """(3, 3): from pixel centres in a picture of (width, height) to those in the resized one."""
    across, down = to[0] / full[0], to[1] / full[1]
    return np.array([[across, 0, (across - 1) / 2], [0, down, (down - 1) / 2], [0, 0, 1]])


def _scale(matrix: np.ndarray) -> float:
    return float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
