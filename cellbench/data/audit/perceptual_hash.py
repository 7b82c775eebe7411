"""Which images are the same picture: perceptual hashes over the eight flips and rotations, proven by correlation.

A hash of 256 bits finds candidates in one matrix product; a pair counts only where the small pictures themselves correlate. Legend: N images,
T the side of a small picture (64), 8 ways to turn it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.fft import dctn

SIDE = 64
BITS = 16
NEAR_BITS = 48
"""Of 256: saving as JPEG, resizing and brightening change 10 at most, unrelated pictures differ in some 128."""
CORRELATION = 0.97
"""Of the small pictures, their slow half taken out."""


def mean_pool(grey_HW: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Means of ``side`` x ``side`` equal fields, (side, side) float32. Fields share the pixels on their edges, so that a turned picture gives
    the turned result."""
    return _fields(grey_HW.shape[0], side) @ grey_HW.astype(np.float32) @ _fields(grey_HW.shape[1], side).T


@functools.lru_cache(maxsize=32)
def _fields(length: int, side: int) -> np.ndarray:
    """(side, length) float32: how much each of ``length`` pixels counts in each of ``side`` equal fields. Not to be written to."""
    starts = np.arange(side)[:, None] * length / side
    pixels = np.arange(length)[None, :]
    shared = np.minimum(starts + length / side, pixels + 1) - np.maximum(starts, pixels)
    return (np.maximum(shared, 0) * side / length).astype(np.float32)


def to_grey(image_HW3: np.ndarray) -> np.ndarray:
    """(H, W) float32, 0..255, of an image uint8, half of it green, where stains differ most."""
    return image_HW3[..., 1] / np.float32(2) + image_HW3[..., 0] / np.float32(4) + image_HW3[..., 2] / np.float32(4)


def thumbnail_grey(image_HW3: np.ndarray) -> np.ndarray:
    """A grey picture (64, 64) float32 of an image uint8."""
    return mean_pool(to_grey(image_HW3))


def eight_orientations(picture_TT: np.ndarray) -> list[np.ndarray]:
    """The eight flips and right-angle rotations; the first is the picture itself."""
    return [np.rot90(one, k) for one in (picture_TT, picture_TT.T) for k in range(4)]


def hash_signs(picture_TT: np.ndarray) -> np.ndarray:
    """The hash as ±1, (256,) int8: whether each slow cosine coefficient is above their median (pHash)."""
    slow = dctn(picture_TT, norm="ortho")[:BITS, :BITS].ravel()
    slow[0] = 0  # brightness
    return np.where(slow > np.median(slow), 1, -1).astype(np.int8)


def high_pass(picture_TT: np.ndarray) -> np.ndarray:
    """Without its slowest waves, of length 1: correlations of what is left tell pictures that only share light and layout apart."""
    waves = dctn(picture_TT, norm="ortho")
    waves[:3, :3] = 0
    flat = waves.ravel()  # an orthonormal transform keeps scalar products
    return (flat / max(float(np.linalg.norm(flat)), 1e-6)).astype(np.float32)


def find_near_pairs(small_NTT: Sequence[np.ndarray], chunk: int = 512) -> list[tuple[int, int, float]]:
    """Pairs (i < j) of small pictures that are one picture however turned, with their correlation (0..1)."""
    if len(small_NTT) < 2:
        return []
    plain = np.stack([hash_signs(picture) for picture in small_NTT]).astype(np.float32)
    all_8 = np.stack([[hash_signs(one) for one in eight_orientations(picture)] for picture in small_NTT]).astype(np.float32)
    bound = BITS * BITS - 2 * NEAR_BITS
    best: dict[tuple[int, int], float] = {}
    for start in range(0, len(plain), chunk):
        for way in range(8):
            close = plain[start : start + chunk] @ all_8[:, way].T >= bound
            for i, j in np.argwhere(close):
                i = int(i) + start
                if i < j:
                    correlation = float(high_pass(small_NTT[i]) @ high_pass(eight_orientations(small_NTT[j])[way]))
                    if correlation >= CORRELATION:
                        best[i, int(j)] = max(correlation, best.get((i, int(j)), 0))
    return sorted((i, j, correlation) for (i, j), correlation in best.items())


def connected_groups(num: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of ``num`` things the smallest number among all that pairs join it to, itself included.

    >>> clusters(5, [(1, 2), (2, 4)])
    [0, 1, 1, 3, 1]
    """
    home = list(range(num))

    def root(i: int) -> int:
        while home[i] != i:
            home[i] = home[home[i]]
            i = home[i]
        return i

    for i, j in pairs:
        a, b = sorted((root(i), root(j)))
        home[b] = a
    return [root(i) for i in range(num)]
