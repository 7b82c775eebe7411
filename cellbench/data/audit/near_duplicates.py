"""Groups images that show the same picture or a part of it. The result is cached until a file changes."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from cellbench.data.audit.keypoint_matching import Keypoints, find_same_images, find_shared_regions, keypoints
from cellbench.data.audit.perceptual_hash import connected_groups, mean_pool, to_grey
from cellbench.data.dataset import Sample
from cellbench.data.io import images
from cellbench.data.io.intensity import IntensityScaling
from cellbench.data.progress import map_files
from cellbench.errors import CellbenchError
from cellbench.files import cache_dir, file_stamp, text_digest, write_atomic

_VERSION = 6
"""Increased when results change."""


def group_near_duplicates(samples: Sequence[Sample], reading: IntensityScaling | None = None) -> tuple[Sample, ...]:
    """The samples, those that show the same picture (turned, saved again, a crop, fields that overlap) with a common group, the others with none.

    Reads every image the first time, about 0.1 s of a core each. Unreadable images are in no group; opening them raises the error.
    """
    return group_by_first(samples, _cached([sample.image for sample in samples], reading or IntensityScaling()))


def group_by_first(samples: Sequence[Sample], first: Sequence[int]) -> tuple[Sample, ...]:
    """The same, given the position of the first sample of each sample's group."""
    size = Counter(first)
    names: dict[int, str] = {}
    for sample, k in zip(samples, first, strict=True):
        names.setdefault(k, sample.name)
    return tuple(replace(sample, group=f"like {names[k]}" if size[k] > 1 else "") for sample, k in zip(samples, first, strict=True))


def _cached(paths: Sequence[Path], reading: IntensityScaling) -> list[int]:
    try:
        stamps = [[str(path.absolute()), *file_stamp(path)] for path in paths]
    except OSError:
        return _first_of_group(paths, reading)  # a missing file has no time stamp as a cache key
    key = [_VERSION, stamps, *([reading.to_dict()] if reading != IntensityScaling() else [])]
    place = cache_dir() / "alike" / f"{text_digest(json.dumps(key), 24)}.json"
    with contextlib.suppress(OSError, ValueError):  # missing or damaged: compare again
        known = json.loads(place.read_text())
        if isinstance(known, list) and len(known) == len(paths) and all(isinstance(k, int) and 0 <= k < len(paths) for k in known):
            return known
    first = _first_of_group(paths, reading)
    with contextlib.suppress(CellbenchError):  # only a cache: a full disk must not stop a run
        write_atomic(place, json.dumps(first))
    return first


def _first_of_group(paths: Sequence[Path], reading: IntensityScaling) -> list[int]:
    """For each image the position of the first of its group."""
    found = map_files(partial(_features, reading=reading), paths, "comparing images, once")
    read = [k for k, one in enumerate(found) if one is not None]
    thumbnails, all_keypoints = [one[0] for one in found if one is not None], [one[1] for one in found if one is not None]
    pairs = find_same_images(all_keypoints, thumbnails)
    pairs += [(pair.first, pair.second) for pair in find_shared_regions(all_keypoints)]
    return connected_groups(len(paths), [(read[i], read[j]) for i, j in pairs])


def _features(path: Path, reading: IntensityScaling) -> tuple[np.ndarray, Keypoints] | None:
    try:
        grey = to_grey(images.read_image(path, reading))
    except (CellbenchError, OSError):
        return None
    return mean_pool(grey), keypoints(grey)
