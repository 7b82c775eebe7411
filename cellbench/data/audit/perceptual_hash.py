"""Finds copies of an image by perceptual hashes over the eight flips and rotations, confirmed by correlation.

A hash of 256 bits gives candidates in one matrix product; a pair counts only where the thumbnails correlate. Legend: N images, T the side of a
thumbnail (64), 8 orientations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.fft import dctn

SIDE = 64
BITS = 16
NEAR_BITS = 48
"""Maximum Hamming distance of 256 bits: JPEG, resizing and brightening change at most 10; unrelated pictures differ in about 128."""
CORRELATION = 0.97
"""Least correlation of two thumbnails, without their lowest frequencies."""


def mean_pool(grey_HW: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Means of ``side`` x ``side`` equal fields, (side, side) float32.

    Fields share the pixels on their edges, so that turning the picture turns the result.
    """
    return _fields(grey_HW.shape[0], side) @ grey_HW.astype(np.float32) @ _fields(grey_HW.shape[1], side).T


@functools.lru_cache(maxsize=32)
def _fields(length: int, side: int) -> np.ndarray:
    """(side, length) float32: the weight of each of ``length`` pixels in each of ``side`` equal fields. Read-only."""
    starts = np.arange(side)[:, None] * length / side
    pixels = np.arange(length)[None, :]
    shared = np.minimum(starts + length / side, pixels + 1) - np.maximum(starts, pixels)
    return (np.maximum(shared, 0) * side / length).astype(np.float32)


def to_grey(image_HW3: np.ndarray) -> np.ndarray:
    """(H, W) float32, 0..255, of an image uint8; half of it is green, where stains differ most."""
    return image_HW3[..., 1] / np.float32(2) + image_HW3[..., 0] / np.float32(4) + image_HW3[..., 2] / np.float32(4)


def eight_orientations(picture_TT: np.ndarray) -> list[np.ndarray]:
    """The eight flips and right-angle rotations; the first is the picture itself."""
    one, other = picture_TT, picture_TT.T
    return [one, other[::-1], one[::-1, ::-1], other[:, ::-1], other, one[::-1], other[::-1, ::-1], one[:, ::-1]]


def hash_signs(picture_TT: np.ndarray) -> np.ndarray:
    """The hash as ±1 in each of the eight orientations, (8, 256) int8: whether each low-frequency cosine coefficient is above their median (pHash)."""
    slow = dctn(picture_TT, norm="ortho")[:BITS, :BITS]
    slow[0, 0] = 0  # brightness
    sign = np.where(np.arange(BITS) % 2, -1, 1).astype(slow.dtype)  # mirroring a picture changes the sign of its odd waves
    down, across = slow * sign[:, None], slow * sign
    both = down * sign
    turned = np.stack([slow, across.T, both, down.T, slow.T, down, both.T, across]).reshape(8, -1)
    return np.where(turned > np.median(turned, axis=1, keepdims=True), 1, -1).astype(np.int8)


def high_pass(picture_TT: np.ndarray) -> np.ndarray:
    """Flat, of length 1, without the lowest frequencies: its correlation separates pictures that only share light and layout."""
    waves = dctn(picture_TT, norm="ortho")
    waves[:3, :3] = 0
    flat = waves.ravel()  # an orthonormal transform keeps scalar products
    return (flat / max(float(np.linalg.norm(flat)), 1e-6)).astype(np.float32)


def find_near_pairs(small_NTT: Sequence[np.ndarray], chunk: int = 512) -> list[tuple[int, int, float]]:
    """Pairs (i < j) of thumbnails that are one picture in any orientation, with their correlation (0..1)."""
    if len(small_NTT) < 2:
        return []
    all_8 = np.stack([hash_signs(picture) for picture in small_NTT]).astype(np.float32)
    plain = np.ascontiguousarray(all_8[:, 0])
    bound = BITS * BITS - 2 * NEAR_BITS
    best: dict[tuple[int, int], float] = {}
    for start in range(0, len(plain), chunk):
        for way in range(8):
            close = plain[start : start + chunk] @ all_8[start:, way].T >= bound
            for i, j in np.argwhere(close) + start:
                if i < j:
                    correlation = float(high_pass(small_NTT[i]) @ high_pass(eight_orientations(small_NTT[j])[way]))
                    if correlation >= CORRELATION:
                        best[int(i), int(j)] = max(correlation, best.get((int(i), int(j)), 0))
    return sorted((i, j, correlation) for (i, j), correlation in best.items())


def connected_groups(num: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of ``num`` items the smallest index in its connected component.

    >>> connected_groups(5, [(1, 2), (2, 4)])
    [0, 1, 1, 3, 1]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = np.array([*pairs], int).reshape(-1, 2).T
    group = connected_components(coo_array((np.ones(ends.shape[1]), (ends[0], ends[1])), shape=(num, num)), directed=False)[1]
    first: list[int] = np.unique(group, return_index=True)[1][group].tolist()
    return first
