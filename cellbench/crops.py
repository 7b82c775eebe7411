"""Which images show a part of the same picture: a crop of another, or fields that overlap, at any scale, turned or mirrored.

Lowe's features (SIFT: places, sizes, directions and what they look like) find candidates; places must agree on one similarity transform, and the
pixels that both pictures share must correlate, all over. Features are looked up by visual words (Sivic and Zisserman 2003), so that the work grows
with the number of images and not with its square.

Legend: N features of one image, M of all. A place is a complex number x + iy in pixels of the small picture; a transform takes z to ``c z + t``,
mirrored to ``c conj(z) + t``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from scipy import ndimage

SIDE_PX = 400
"""The longer side at which features are looked for. A crop of 0.3 of the sides still fills 120 px."""
MOST = 400
"""Features kept of an image, the largest first: they outlive resizing and compression."""
CONTRAST = 0.01
"""Of a feature: a quarter of OpenCV's own, since a single stained cell has few. Of planted halves of single cells 44 of 50 are found, not 26."""
ALIKE = 0.9
"""Cosine of two descriptors. Of one spot in two pictures 0.95 to 1, of the nearest spot in another smear 0.85 at most for nine of ten."""
LEAST = 5
"""Features that agree on one transform. Of true crops 6 to 80, of other pairs of the three real sets 4 at most."""
CORRELATION = 0.8
"""Of what both pictures show, its slow waves taken out: the median over fields with structure, so that a scale bar or a label that all images
bear neither makes a crop nor hides one."""
TRIES = 3
"""Transforms tried of one pair: a label that all images bear agrees with itself before the cells do."""
_WORD = 150
"""Features a visual word, about."""

# A picture mirrored left to right, in SIFT's 4 x 4 fields of 8 directions: fields change sides across the main direction, directions their sign.
_MIRRORED = np.arange(128).reshape(4, 4, 8)[::-1][:, :, -np.arange(8) % 8].ravel()


@dataclass(frozen=True, kw_only=True, eq=False)
class Marks:
    """What the parts of an image are known again by."""

    places: np.ndarray
    """(N,) complex64"""
    sizes: np.ndarray
    """(N,) float32, px of the small picture"""
    ways: np.ndarray
    """(N,) complex64 of length 1: the main direction"""
    looks: np.ndarray
    """(N, 128) uint8, SIFT's histograms"""
    picture: np.ndarray
    """(H, W) uint8, the grey picture, its longer side ``SIDE_PX`` at most"""


NOTHING = Marks(
    places=np.zeros(0, np.complex64),
    sizes=np.zeros(0, np.float32),
    ways=np.zeros(0, np.complex64),
    looks=np.zeros((0, 128), np.uint8),
    picture=np.zeros((0, 0), np.uint8),
)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Two images, ``first < second``, that show the same."""

    first: int
    second: int
    correlation: float
    share: float
    """Of the one that has less of its own, what the other shows too."""


def marks(grey_HW: np.ndarray) -> Marks:
    """The marks of a grey image float32, 0..255 (``likeness.grey``). About 40 ms of a core for any size, 180 kB."""
    picture = _small(grey_HW)
    low, high = np.percentile(picture, (1, 99))
    stretched = ((picture - low) * (255 / max(high - low, 24))).clip(0, 255).astype(np.uint8)
    sift = cv2.SIFT_create(contrastThreshold=CONTRAST)
    found = sorted(sift.detect(stretched, None), key=lambda one: -one.size)[:MOST]
    if not found:
        return NOTHING
    found, looks = sift.compute(stretched, found)
    return Marks(
        places=np.array([complex(*one.pt) for one in found], np.complex64),
        sizes=np.array([one.size for one in found], np.float32),
        ways=np.exp(1j * np.radians([one.angle for one in found])).astype(np.complex64),
        looks=looks.astype(np.uint8),
        picture=picture.astype(np.uint8),
    )


def _small(grey_HW: np.ndarray) -> np.ndarray:
    """At most ``SIDE_PX`` long; smaller pictures are doubled once, so that a single cell has features too."""
    height, width = grey_HW.shape
    factor = min(SIDE_PX / max(height, width), 2.0)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(np.ascontiguousarray(grey_HW), size, interpolation=cv2.INTER_LINEAR if factor > 1 else cv2.INTER_AREA).clip(0, 255)


def shared(all_marks: Sequence[Marks]) -> list[Shared]:
    """Every pair of images that show a part of the same, in their order."""
    found: dict[tuple[int, int], Shared] = {}
    for first, second, mirrored, ones, others in _candidates(all_marks):
        pair = _settled(all_marks, first, second, mirrored, ones, others)
        known = found.get((first, second))
        if pair is not None and (known is None or known.correlation < pair.correlation):
            found[first, second] = pair
    return [found[pair] for pair in sorted(found)]


def _settled(all_marks: Sequence[Marks], first: int, second: int, mirrored: bool, ones: np.ndarray, others: np.ndarray) -> Shared | None:
    one, other = all_marks[first], all_marks[second]
    for _ in range(TRIES):
        placed = _placed(one, other, mirrored, ones, others)
        if placed is None:
            return None
        c, t, inside = placed
        correlation, share = _proof(one.picture, other.picture, mirrored, c, t)
        if correlation >= CORRELATION:
            return Shared(first=first, second=second, correlation=correlation, share=share)
        ones, others = ones[~inside], others[~inside]
    return None


def _candidates(all_marks: Sequence[Marks]):
    """(first, second, mirrored, features of the first, features of the second) of pairs in which ``LEAST`` features have a like."""
    image_M = np.repeat(np.arange(len(all_marks)), [len(one.places) for one in all_marks])
    if len(image_M) < 2:
        return
    looks_MD = np.concatenate([one.looks for one in all_marks]).astype(np.float32)
    looks_MD /= np.maximum(np.linalg.norm(looks_MD, axis=1, keepdims=True), 1)
    within_M = np.concatenate([np.arange(len(one.places)) for one in all_marks])
    alike = np.unique(np.concatenate([_alike(looks_MD, image_M, mirrored) for mirrored in (False, True)]), axis=0)
    if not len(alike):
        return
    order = np.lexsort((alike[:, 0], image_M[alike[:, 2]], image_M[alike[:, 1]]))
    alike = alike[order]
    keys = np.stack([image_M[alike[:, 1]], image_M[alike[:, 2]], alike[:, 0]], 1)
    starts = np.flatnonzero(np.any(np.diff(keys, axis=0, prepend=-1), axis=1))
    for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
        end = min(end, start + 300)
        if end - start >= LEAST:
            first, second, mirrored = keys[start].tolist()
            yield first, second, bool(mirrored), within_M[alike[start:end, 1]], within_M[alike[start:end, 2]]


def _alike(looks_MD: np.ndarray, image_M: np.ndarray, mirrored: bool) -> np.ndarray:
    """(K, 3) int64: mirrored, a feature and its like in a later image. Of each feature the two most alike in each of its two nearest words."""
    num = len(looks_MD)
    words = looks_MD[np.random.default_rng(0).choice(num, max(1, num // _WORD), replace=False)]
    asked_MD = looks_MD[:, _MIRRORED] if mirrored else looks_MD
    home_M = _nearest(looks_MD, words, 1)[:, 0]
    asked_in = _nearest(asked_MD, words, min(2, len(words)))
    told = np.argsort(home_M, kind="stable")
    askers = np.argsort(asked_in.ravel(), kind="stable")
    told_from = np.searchsorted(home_M[told], np.arange(len(words) + 1))
    asked_from = np.searchsorted(asked_in.ravel()[askers], np.arange(len(words) + 1))
    found = [np.zeros((0, 3), np.int64)]
    for word in range(len(words)):
        asking = askers[asked_from[word] : asked_from[word + 1]] // asked_in.shape[1]
        known = told[told_from[word] : told_from[word + 1]]
        if not len(asking) or not len(known):
            continue
        cosine = asked_MD[asking] @ looks_MD[known].T
        cosine[image_M[asking][:, None] == image_M[known][None]] = 0
        best = np.argpartition(-cosine, 1, axis=1)[:, :2] if len(known) > 2 else np.tile(np.arange(len(known)), (len(asking), 1))
        row, column = np.nonzero(np.take_along_axis(cosine, best, 1) >= ALIKE)
        one, other = asking[row], known[best[row, column]]
        found.append(np.stack([np.full(len(one), mirrored, np.int64), np.minimum(one, other), np.maximum(one, other)], 1))
    return np.concatenate(found)


def _nearest(looks_MD: np.ndarray, words: np.ndarray, num: int, chunk: int = 4096) -> np.ndarray:
    """(M, num): the nearest words."""
    found = np.empty((len(looks_MD), num), np.int64)
    for start in range(0, len(looks_MD), chunk):
        cosine = looks_MD[start : start + chunk] @ words.T
        found[start : start + chunk] = cosine.argmax(1)[:, None] if num == 1 else np.argpartition(-cosine, num - 1, axis=1)[:, :num]
    return found


def _placed(one: Marks, other: Marks, mirrored: bool, ones: np.ndarray, others: np.ndarray) -> tuple[complex, complex, np.ndarray] | None:
    """The similarity transform on which most features agree, fitted to them, and which do; None where fewer than ``LEAST`` do.

    Each pair of features proposes one: by its places, sizes and directions (Lowe 2004).
    """
    if len(ones) < LEAST:
        return None
    z, w = one.places[ones].astype(complex), other.places[others].astype(complex)
    way = one.ways[ones]
    if mirrored:
        z, way = z.conj(), way.conj()
    c = other.sizes[others] / one.sizes[ones] * other.ways[others] / way
    t = w - c * z
    off = np.abs(c[:, None] * z + t[:, None] - w) / np.maximum(1, np.abs(c))[:, None]
    turned = c[None] / c[:, None]
    fits = (off < 4) & (np.abs(np.log(np.abs(turned))) < 0.4) & (np.abs(np.angle(turned)) < 0.35)
    inside = fits[fits.sum(1).argmax()]
    for _ in range(2):
        if _spots(z[inside], w[inside]) < LEAST:
            return None
        scale, shift = np.linalg.lstsq(np.stack([z[inside], np.ones(inside.sum())], 1), w[inside], rcond=None)[0]
        inside = np.abs(scale * z + shift - w) < 3 * max(1, abs(scale))
    return (complex(scale), complex(shift), inside) if _spots(z[inside], w[inside]) >= LEAST and scale else None


def _spots(z: np.ndarray, w: np.ndarray) -> int:
    """Distinct places: one spot may have features of several directions."""
    return min(len(np.unique(z.round())), len(np.unique(w.round())))


def _proof(one_HW: np.ndarray, other_HW: np.ndarray, mirrored: bool, c: complex, t: complex) -> tuple[float, float]:
    """How well the pictures correlate where both show the same (-1..1), and how much of the smaller one that is (0..1)."""
    if abs(c) < 1:  # the other way round, so that the finer picture is the one that is resampled
        turned = (1 / np.conj(c), -np.conj(t / c)) if mirrored else (1 / c, -t / c)
        return _proof(other_HW, one_HW, mirrored, *turned)
    rows, columns = np.indices(one_HW.shape)
    z = columns + 1j * rows
    w = c * (z.conj() if mirrored else z) + t
    inside = (w.real >= 0) & (w.real <= other_HW.shape[1] - 1) & (w.imag >= 0) & (w.imag <= other_HW.shape[0] - 1)
    if inside.sum() < 400:
        return 0.0, 0.0
    weight = inside.astype(np.float32)
    known = np.maximum(ndimage.gaussian_filter(weight, 12), 1e-3)

    def fast(picture: np.ndarray) -> np.ndarray:
        return (picture - ndimage.gaussian_filter(picture * weight, 12) / known) * weight

    finer = ndimage.gaussian_filter(other_HW.astype(np.float32), abs(c))
    a = fast(ndimage.gaussian_filter(one_HW.astype(np.float32), 1))
    b = fast(ndimage.map_coordinates(finer, [w.imag, w.real], order=1, mode="nearest"))
    field = (rows // 24) * (one_HW.shape[1] // 24 + 1) + columns // 24
    product, energy_a, energy_b, num = (np.bincount(field.ravel(), values.ravel()) for values in (a * b, a * a, b * b, weight))
    # Three grey levels of 255: what is left of a plain ground is noise.
    structured = (num >= 100) & (np.maximum(energy_a, energy_b) > 9 * num)
    share = inside.sum() / min(inside.size, other_HW.size / abs(c) ** 2)
    if not structured.any():
        return 0.0, float(min(share, 1))
    correlations = product[structured] / np.sqrt(np.maximum(energy_a * energy_b, 1e-6))[structured]
    return float(np.median(correlations)), float(min(share, 1))
