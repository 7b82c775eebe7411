"""Which images of a set show the same, whole or in part: found once, remembered for as long as the files stay as they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cellbench.data.audit.keypoint_matching import Keypoints, find_same_images, find_shared_regions, keypoints
from cellbench.data.audit.perceptual_hash import connected_groups, mean_pool, to_grey
from cellbench.data.dataset import Sample
from cellbench.data.io import images
from cellbench.data.io.intensity import IntensityScaling
from cellbench.errors import CellbenchError
from cellbench.files import cache_dir, write_atomic

_FOUND_AS = 3
"""Counts up when what is found changes."""


def group_near_duplicates(samples: Sequence[Sample], reading: IntensityScaling | None = None) -> tuple[Sample, ...]:
    """The samples, those that show the same picture (turned, saved anew, a crop, fields that overlap) with a common group; the others with none.

    Reads every image, about 0.3 s of a processor each, the first time. One that cannot be read is like no other; whoever uses it will say so.
    """
    return group_by_first(samples, _remembered([sample.image for sample in samples], reading or IntensityScaling()))


def group_by_first(samples: Sequence[Sample], first: Sequence[int]) -> tuple[Sample, ...]:
    """The same, where it is known for each sample which is the first that it is like."""
    size = Counter(first)
    names: dict[int, str] = {}
    for sample, k in zip(samples, first, strict=True):
        names.setdefault(k, sample.name)
    return tuple(replace(sample, group=f"like {names[k]}" if size[k] > 1 else "") for sample, k in zip(samples, first, strict=True))


def _remembered(paths: Sequence[Path], reading: IntensityScaling) -> list[int]:
    try:
        stamps = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    except OSError:
        return _first_alike(paths, reading)  # a file is missing, so there is nothing to remember by
    made = [_FOUND_AS, stamps, *([reading.told()] if reading != IntensityScaling() else [])]
    place = cache_dir() / "alike" / f"{hashlib.sha256(json.dumps(made).encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged: found anew
        known = json.loads(place.read_text())
        if isinstance(known, list) and len(known) == len(paths) and all(isinstance(k, int) and 0 <= k < len(paths) for k in known):
            return known
    first = _first_alike(paths, reading)
    with contextlib.suppress(CellbenchError):  # only a memory: a full disk must not stop a run
        write_atomic(place, json.dumps(first))
    return first


def _first_alike(paths: Sequence[Path], reading: IntensityScaling) -> list[int]:
    """For each image the number of the first that it is like."""
    with ThreadPoolExecutor(2) as pool:
        jobs = pool.map(partial(_told, reading=reading), paths)
        told = list(tqdm(jobs, desc="comparing images, once", total=len(paths), unit="image", leave=False, disable=len(paths) < 20))
    read = [k for k, one in enumerate(told) if one is not None]
    seen = [one for one in told if one is not None]
    all_marks = [parts for _, parts in seen]
    pairs = find_same_images(all_marks, [small for small, _ in seen])
    pairs += [(pair.first, pair.second) for pair in find_shared_regions(all_marks)]
    return connected_groups(len(paths), [(read[i], read[j]) for i, j in pairs])


def _told(path: Path, reading: IntensityScaling) -> tuple[np.ndarray, Keypoints] | None:
    try:
        plain = to_grey(images.read_image(path, reading))
    except (CellbenchError, OSError):
        return None
    return mean_pool(plain), keypoints(plain)
