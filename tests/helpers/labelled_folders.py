"""Small folders of images with four rectangular cells each: as pairs of files, as COCO annotations and as a manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from cellbench.config.registry import Registry

FOLDER = Registry().dataset("folder")
SIZE = (40, 60)


def cells(seed: int) -> np.ndarray:
    """Ids (40, 60) of four rectangles that may touch but not overlap."""
    rng = np.random.default_rng(seed)
    ids = np.zeros(SIZE, np.uint16)
    for number, (y, x) in enumerate([(2, 3), (2, 30), (21, 3), (21, 30)], 1):
        ids[y : y + rng.integers(5, 18), x : x + rng.integers(5, 27)] = number
    return ids


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 20, (*SIZE, 3))
    return Image.fromarray((np.where(cells(seed)[..., None] > 0, 120, 220) + noise).astype(np.uint8))


def pairs(folder: Path, num: int = 6) -> Path:
    for seed in range(num):
        for inner in ("images", "masks"):
            (folder / inner).mkdir(parents=True, exist_ok=True)
        picture(seed).save(folder / "images" / f"i{seed}.png")
        Image.fromarray(cells(seed)).save(folder / "masks" / f"i{seed}.png")
    return folder


def nuclei(folder: Path, num: int = 6) -> Path:
    for seed in range(num):
        for inner in ("images", "masks"):
            (folder / f"i{seed}" / inner).mkdir(parents=True, exist_ok=True)
        picture(seed).save(folder / f"i{seed}" / "images" / f"i{seed}.png")
        for number in range(1, 5):
            Image.fromarray(np.where(cells(seed) == number, 255, 0).astype(np.uint8)).save(folder / f"i{seed}" / "masks" / f"{number}.png")
    return folder


def segmentation(mask: np.ndarray, kind: str):
    if kind == "polygon":  # pixel corners of a rectangle
        rows, columns = np.nonzero(mask)
        y0, y1, x0, x1 = int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    if kind == "compressed":
        return {"size": list(SIZE), "counts": rle["counts"].decode()}
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [0]])
    edges = np.flatnonzero(np.diff(flat))
    return {"size": list(SIZE), "counts": np.diff([0, *edges, mask.size]).tolist()} if len(edges) % 2 == 0 else None


def coco_tree(num: int = 6, kind: str = "polygon") -> dict:
    annotations = [
        {"id": 10 * seed + number, "image_id": seed, "category_id": 7, "segmentation": segmentation(cells(seed) == number, kind)}
        for seed in range(num)
        for number in range(1, 5)
    ]
    images = [{"id": seed, "file_name": f"i{seed}.png", "height": SIZE[0], "width": SIZE[1]} for seed in range(num)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "nucleus"}]}


def coco_folder(folder: Path, num: int = 6, kind: str = "polygon") -> Path:
    (folder / "images").mkdir(parents=True)
    for seed in range(num):
        picture(seed).save(folder / "images" / f"i{seed}.png")
    (folder / "annotations.json").write_text(json.dumps(coco_tree(num, kind)))
    return folder


def manifest(folder: Path, name: str = "manifest.csv", num: int = 6) -> Path:
    pairs(folder, num)
    rows = [
        {"image": f"images/i{k}.png", "mask": f"masks/i{k}.png", "group": f"patient {k // 2}", "label": "ab"[k % 2]} for k in range(num)
    ]
    if name.endswith(".csv"):
        (folder / name).write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    else:
        (folder / name).write_text("\n".join("[[image]]\n" + "\n".join(f'{key} = "{value}"' for key, value in row.items()) for row in rows))
    return folder
