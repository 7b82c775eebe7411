"""Plants crops of the images of a set among them, and counts those that the search for near-duplicates finds, and pairs that show nothing in common.

    python tests/tools/planted_crops.py [--num 40] shared/data/dsb2018 shared/data/wbc

Of ``num`` images of each set four crops each: three quarters of each side, turned and mirrored; half of each side; a part turned by 30 degrees; a part
at 0.7 of its size, saved as JPEG.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from cellbench.data.audit.keypoint_matching import find_same_images, find_shared_regions, keypoints  # noqa: E402
from cellbench.data.audit.perceptual_hash import mean_pool, to_grey  # noqa: E402
from cellbench.data.io.images import read_image  # noqa: E402


def part(picture: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    width, height = (round(side * share) for side in picture.size)
    x, y = (int(rng.integers(0, full - side + 1)) for full, side in zip(picture.size, (width, height), strict=True))
    return picture.crop((x, y, x + width, y + height))


def turned(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return part(picture, 0.75, rng).transpose(Image.Transpose.TRANSVERSE)


def half(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return part(picture, 0.5, rng)


def oblique(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The middle of the picture, turned by 30 degrees: no corner of it lies outside."""
    width, height = (round(side * 0.6) for side in picture.size)
    x, y = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.rotate(30, Image.Resampling.BICUBIC).crop((x, y, x + width, y + height))


def saved_again(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    crop = part(picture, 0.6, rng)
    file = io.BytesIO()
    crop.resize((max(1, round(crop.width * 0.7)), max(1, round(crop.height * 0.7))), Image.Resampling.LANCZOS).save(
        file, "JPEG", quality=75
    )
    return Image.open(file)


CROPS: tuple[Callable[[Image.Image, np.random.Generator], Image.Image], ...] = (turned, half, oblique, saved_again)


def measure(folder: Path, num_sources: int) -> None:
    rng = np.random.default_rng(0)
    originals = [Image.fromarray(read_image(path)) for path in sorted(folder.rglob("original/*"))]
    num_sources = min(num_sources, len(originals))
    chosen = np.linspace(0, len(originals) - 1, num_sources).round().astype(int).tolist()
    planted = [(source, crop) for source in chosen for crop in CROPS]
    pictures = [*originals, *(crop(originals[source], rng) for source, crop in planted)]
    greys = [to_grey(np.asarray(picture.convert("RGB"))) for picture in pictures]
    start = time.process_time()
    features = [keypoints(grey) for grey in greys]
    middle = time.process_time()
    pairs = {*find_same_images(features, [mean_pool(grey) for grey in greys])}
    pairs |= {(pair.first, pair.second) for pair in find_shared_regions(features)}
    end = time.process_time()
    num = len(originals)
    source_of = [*range(num), *(source for source, _ in planted)]
    known = {pair for pair in pairs if pair[1] < num}
    found = [(source, num + k) in pairs for k, (source, _) in enumerate(planted)]
    other = sorted({pair for i, j in pairs if (pair := tuple(sorted((source_of[i], source_of[j]))))[0] != pair[1]} - known)
    kinds = ", ".join(f"{crop.__name__} {sum(found[k :: len(CROPS)])}" for k, crop in enumerate(CROPS))
    print(f"{folder.name}: {sum(found)} of {len(planted)} planted crops found ({kinds} of {num_sources} each)")
    print(f"  {len(known)} pairs of originals: {sorted(known)}")
    print(f"  {len(other)} pairs of crops of different images: {other}")
    print(f"  CPU s: features {middle - start:.2f}, of {len(pictures)} pictures; pairs {end - middle:.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--num", type=int, default=40)
    given = parser.parse_args()
    for one in given.folders:
        measure(one, given.num)
