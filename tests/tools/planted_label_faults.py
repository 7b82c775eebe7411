"""How many planted label faults does ``check --with`` find?

    python tests/tools/planted_label_faults.py FOLDER OUT [--scale 0.5] [--side 320] [--most 40] [--share 0.04]

Copies a folder of ``original/`` and ``mask/`` (or ``train`` and ``test`` with those) to OUT/data with single cells removed, added and shifted, runs two
small models by folds, calls ``check --with``, and compares its faults.csv with what was planted. Faults that the set had before count as wrong, so that
the precision is a lower bound.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from planted_faults import KINDS, plant  # noqa: E402

from cellbench.run import main  # noqa: E402

QUESTION = """experiment = "planted"
dataset    = "folder"

[data]
folds        = 2
val_fraction = 0.1

[grid]
backbone = ["efficientnet-lite0", "filter-bank"]
head     = ["detail"]

[run]
epochs             = 8
crops_per_image    = 6
repeat_views_every = 4
batch_size         = 4
lr                 = 3e-3
tile_px            = 160
overlap            = 0.25
normalise          = "background"
"""


def make(folder: Path, out: Path, scale: float, side: int, most: int, share: float, seed: int) -> None:
    """OUT/data and OUT/planted.json, of ``most`` images of up to ``side`` pixels."""
    rng = np.random.default_rng(seed)
    images = sorted(path for path in folder.rglob("*.*") if path.parent.name == "original" and max(Image.open(path).size) <= side)
    images = [images[k] for k in sorted(rng.permutation(len(images))[:most])]
    planted = {}
    for inner in ("original", "mask"):
        (out / "data" / inner).mkdir(parents=True)
    for path in images:
        image = Image.open(path).convert("RGB")
        mask = np.array(Image.open(path.parents[1] / "mask" / path.name))
        ids = mask.astype(np.int32) if mask.ndim == 2 else ndimage.label(mask[..., 0] > 127)[0].astype(np.int32)
        if scale != 1:
            size = round(image.width * scale), round(image.height * scale)
            image, ids = image.resize(size, Image.Resampling.BOX), np.array(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))
        wrong, planted[path.name] = plant(ids, rng, share)
        image.save(out / "data" / "original" / path.name)
        Image.fromarray(wrong.astype(np.uint16) if mask.ndim == 2 else (wrong > 0).astype(np.uint8) * 255).save(
            out / "data" / "mask" / path.name
        )
    (out / "planted.json").write_text(json.dumps({name: [asdict(one) for one in some] for name, some in planted.items()}, indent=1))


def compare(planted: dict[str, list[dict]], found: list[dict]) -> list[str]:
    """Precision and recall by kind, at all listed faults and at as many as were planted."""
    num = {kind: sum(one["kind"] == kind for some in planted.values() for one in some) for kind in KINDS}
    hits: set[tuple[str, int]] = set()
    right = []
    for fault in found:
        x, y = float(fault["x_px"]), float(fault["y_px"])
        near = [
            k
            for k, one in enumerate(planted.get(fault["image"], []))
            if np.hypot(one["x"] - x, one["y"] - y) < _reach(one["kind"], fault["kind"]) * one["radius"]
        ]
        right.append(bool(near))
        hits |= {(fault["image"], k) for k in near}
    found_of = {kind: sum(planted[name][k]["kind"] == kind for name, k in hits) for kind in KINDS}
    total, top = sum(num.values()), right[: sum(num.values())]
    listed = {
        kind: [ok for ok, one in zip(right, found, strict=True) if one["kind"] == kind] for kind in sorted({one["kind"] for one in found})
    }
    return [
        f"planted {total}, listed {len(found)}: precision {np.mean(right):.2f}, recall {len(hits) / total:.2f}; of the first {len(top)}: {np.mean(top):.2f}",
        *(f"  {kind}: recall {found_of[kind]} of {num[kind]}" for kind in KINDS),
        *(f"  listed as {kind}: {sum(some)} of {len(some)} planted" for kind, some in listed.items()),
    ]


def _reach(planted: str, found: str) -> float:
    """In radii, how far from the planted fault the found one may lie. A shifted cell also leaves a place without a mark, and a mark without a cell."""
    return 1.5 if planted == "outline" else 1.0 if planted == found.replace("border", "missing") else 0.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--side", type=int, default=10_000)
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--share", type=float, default=0.04)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if not (asked.out / "planted.json").exists():
        make(asked.folder, asked.out, asked.scale, asked.side, asked.most, asked.share, asked.seed)
    data, name = str(asked.out / "data"), f"planted in {asked.folder.name}"
    (asked.out / "planted.toml").write_text(QUESTION)
    if code := main(["grid", str(asked.out / "planted.toml"), "--data", data, "--set", f"experiment={name}"]):
        sys.exit(code)
    main(["check", data, "--with", name, "--out", str(asked.out / "check")])
    faults = list(csv.DictReader((asked.out / "check" / "faults.csv").open()))
    print("\n".join(compare(json.loads((asked.out / "planted.json").read_text()), faults)))
