"""Records the training and validation images of a run in a few bytes each, and recognises them among other images.

An image is recognised by its pixels (under any file name and compression) and, turned, mirrored, resized or saved again, by its perceptual hash.
Parts of an image are only found while the training images are still at their paths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellbench.data.audit.keypoint_matching import Keypoints, find_shared_regions, keypoints
from cellbench.data.audit.perceptual_hash import hash_signs, mean_pool, to_grey
from cellbench.data.dataset import Dataset, Sample
from cellbench.data.io import images
from cellbench.data.progress import map_files
from cellbench.errors import CellbenchError
from cellbench.file_cache import FileFactCache

FORMAT = 1
PARTS = ("train", "val")
NEAR_BITS = 24
"""Of 256. JPEG, resizing and brightening change at most 10; different pictures of one layout differ in about 60, others in 128."""
MOST_COMPARED = 400
"""Training images compared for parts: about 0.05 s each."""


def record_seen_images(dataset: Dataset, trained_on: Collection[int] | None = None) -> dict[str, Any]:
    """Name, path, digest of the pixels and hash of each training and validation image, for JSON (about 150 bytes an image).

    ``trained_on``: positions of the training images that were used, where not all were.
    """
    parts = {"train": dataset.train, "val": dataset.val}
    if trained_on is not None:
        parts["train"] = tuple(dataset.train[k] for k in sorted(trained_on))
    rows = {
        part: [[sample.name, str(sample.image.absolute()), *found] for sample, found in zip(samples, _fingerprints(samples), strict=True)]
        for part, samples in parts.items()
    }
    return {"format": FORMAT, **rows}


def without_paths(known: Mapping[str, Any]) -> dict[str, Any]:
    """The record without the paths of this machine, for publication."""
    return {"format": FORMAT, **{part: [[row[0], "", *row[2:]] for row in known[part]] for part in PARTS}}


def match_seen_images(known: Mapping[str, Any], samples: Sequence[Sample]) -> list[str]:
    """For each image ``train``, ``val``, or an empty string if the run has used neither it nor a part of it. Training takes precedence."""
    fingerprints = _fingerprints(samples)
    out = [""] * len(samples)
    for part in reversed(PARTS):
        if not known[part]:
            continue
        pixels = {row[2] for row in known[part]}
        hashes = np.stack([_bits(row[3]) for row in known[part]]).astype(np.float32)
        for k, (sample, (digest, _)) in enumerate(zip(samples, fingerprints, strict=True)):
            if digest in pixels or (hashes @ _all_orientations(sample).T).max() >= hashes.shape[1] - 2 * NEAR_BITS:
                out[k] = part
    rest = [k for k, part in enumerate(out) if not part]
    for k, part in _parts_of(known, [samples[k] for k in rest]).items():
        out[rest[k]] = part
    return out


def find_readable(samples: Sequence[Sample]) -> list[bool]:
    """Whether each image can be read; the others here expect that it can."""
    with FileFactCache("looks", _fingerprint) as cache:

        def is_readable(path: Path) -> bool:
            try:
                return bool(cache[path])
            except (CellbenchError, OSError):
                return False

        return map_files(is_readable, [sample.image for sample in samples], "reading images once")


def find_unseen(known: Mapping[str, Any], samples: Sequence[Sample], tested: Collection[str]) -> list[bool]:
    """Whether the run was neither trained nor validated on each image. Of its own test images, ``tested``, pixels decide, else also similar images."""
    used = {row[2] for part in PARTS for row in known[part]}
    out = [digest not in used for digest, _ in _fingerprints(samples)]
    other = [k for k, sample in enumerate(samples) if out[k] and sample.name not in tested]
    for k, part in zip(other, match_seen_images(known, [samples[k] for k in other]), strict=True):
        out[k] = not part
    return out


def _fingerprints(samples: Sequence[Sample]) -> list[list[str]]:
    with FileFactCache("looks", _fingerprint) as cache:
        new = [sample.image for sample in samples if not cache.knows(sample.image)]
        map_files(cache.__getitem__, new, "reading images once")
        return [cache[sample.image] for sample in samples]


def _fingerprint(path: Path) -> list[str]:
    image = images.read_image(path)
    digest = hashlib.sha256(str(image.shape).encode())
    digest.update(image.data)
    return [digest.hexdigest()[:16], np.packbits(hash_signs(mean_pool(to_grey(image)))[0] > 0).tobytes().hex()]


def _bits(text: str) -> np.ndarray:
    return np.where(np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)) > 0, 1, -1)


def _all_orientations(sample: Sample) -> np.ndarray:
    """(8, 256) float32: the hash of the image in every orientation."""
    return hash_signs(mean_pool(to_grey(images.read_image(sample.image)))).astype(np.float32)


def _parts_of(known: Mapping[str, Any], samples: Sequence[Sample]) -> dict[int, str]:
    """The split of each sample that shows a part of an image of the run, where those can still be read."""
    rows = [(part, row) for part in PARTS for row in known[part] if row[1] and Path(row[1]).is_file()][:MOST_COMPARED]
    if not rows or not samples:
        return {}
    files = [Path(row[1]) for _, row in rows] + [sample.image for sample in samples]
    found = map_files(_keypoints, files, "comparing with the training images")
    out: dict[int, str] = {}
    read = [k for k, one in enumerate(found) if one is not None]
    for pair in find_shared_regions([one for one in found if one is not None]):
        first, second = read[pair.first], read[pair.second]
        if first < len(rows) <= second:
            part = rows[first][0]
            out[second - len(rows)] = "train" if "train" in (part, out.get(second - len(rows))) else part
    return out


def _keypoints(path: Path) -> Keypoints | None:
    try:
        return keypoints(to_grey(images.read_image(path)))
    except (CellbenchError, OSError):
        return None


def describe_seen(found: Sequence[str]) -> str:
    """One sentence; empty if no image was seen.

    >>> describe_seen(["train", "val", "train", ""])
    '2 of 4 images were trained on, 1 validated on: for these the scores say nothing of new images.'
    """
    num = {part: sum(one == part for one in found) for part in PARTS}
    words = [f"{num[part]} {verb}" for part, verb in (("train", "trained on"), ("val", "validated on")) if num[part]]
    if not words:
        return ""
    first, space, rest = words[0].partition(" ")
    words[0] = f"{first} of {len(found)} images {'was' if first == '1' else 'were'}{space}{rest}"
    return f"{', '.join(words)}: for these the scores say nothing of new images."
