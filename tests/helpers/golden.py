"""Golden numbers: small grids whose every number is written down in ``golden.json``.

They hold still as long as the numerics do. Where a change of code changes them on purpose, raise ``NUMERICS_VERSION`` and write new ones::

    python tests/helpers/golden.py

The numbers were written on one processor, and another one rounds differently. Losses of a few steps then agree to about 1e-5 (in bf16 to
1e-3), and masks to a few pixels. The tolerances are above that, and far below the effect of a change that matters. Scores of single cells may
jump by one cell.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

FILE = Path(__file__).with_name("golden.json")
COUNTS = ("count", "num_")
CELLS = ("ap50", "pq", "aji")

RUN = """
[run]
epochs = 2
crops_per_image = 4
batch_size = 4
tile_px = 64
overlap = 0.25
lr = 5e-3
"""
GRIDS = {
    # Every head with every framing, the baselines, masks of 0 and 255 on 8-bit RGB.
    "heads": (
        "binary",
        'baselines = ["otsu", "unet"]\n[grid]\nbackbone = ["vit-tiny-random"]\n'
        'head = ["bilinear", "detail", "fpn", "transposed-conv"]\nframing = ["tile", "pad", "resize"]\n',
        ["--precision", "fp32"],
    ),
    # What a head learns beside the classes; masks that number their cells; a pyramid of filters.
    "targets": (
        "numbered",
        '[grid]\nbackbone = ["filter-bank"]\nhead = ["bilinear"]\ntargets = ["cell", "cell+distance", "cell+border+distance"]\n',
        ["--precision", "fp32"],
    ),
    # Three classes, one of them missing from the test; stains; a backbone whose last block is trained; bf16.
    "classes": (
        "classes",
        '[grid]\nbackbone = ["vit-tiny-random"]\nhead = ["bilinear"]\nnormalise = ["none", "reinhard", "macenko"]\nunfreeze = [1]\n',
        ["--precision", "bf16"],
    ),
    # 16-bit grey.
    "depth": ("sixteen", '[grid]\nbackbone = ["filter-bank"]\nhead = ["fpn"]\n', ["--precision", "fp32"]),
}
CARD = 'classes = ["background", "red", "white"]\nvalues = [0, 128, 255]\n'


def scene(seed: int, height_px: int = 96, width_px: int = 136) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3) float in 0..1 of discs of two kinds on a pale ground, and the number (H, W) uint16 of the disc at each pixel."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height_px, :width_px]
    ids = np.zeros((height_px, width_px), np.uint16)
    for number in range(1, 9):
        y, x, radius = rng.uniform(0, height_px), rng.uniform(0, width_px), rng.uniform(8, 16)
        ids[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = number
    colours = np.array([(0.88, 0.84, 0.86)] + [(0.67, 0.35, 0.5), (0.45, 0.3, 0.65)] * 4)
    return (colours[ids] + rng.normal(0, 0.02, (height_px, width_px, 3))).clip(0, 1), ids


def write_data(kind: str, folder: Path) -> None:
    """Four images to train on and two to test, in the layout of BCCD. PNG alone: JPEG decoders differ in the last bit."""
    for split, seeds in (("train", (1, 2, 3, 4)), ("test", (11, 12))):
        for inner in ("original", "mask"):
            (folder / split / inner).mkdir(parents=True)
        for seed in seeds:
            picture, ids = scene(seed)
            image = (picture * 255).round().astype(np.uint8)
            mask = np.where(ids > 0, 255, 0).astype(np.uint8)
            if kind == "numbered":
                mask = ids
            elif kind == "classes":
                # The test has no white cells.
                mask = np.where(ids == 0, 0, np.where((ids % 2 == 1) | (split == "test"), 128, 255)).astype(np.uint8)
            elif kind == "sixteen":
                image = (picture[..., 1] * 3900).round().astype(np.uint16)
            Image.fromarray(image).save(folder / split / "original" / f"{seed}.png")
            Image.fromarray(mask).save(folder / split / "mask" / f"{seed}.png")
    if kind == "classes":
        (folder / "dataset.toml").write_text(CARD)


def numbers(name: str, folder: Path) -> dict[str, dict[str, float | list[float]]]:
    """The losses, validation scores and test scores of each run of a grid, which is run in ``folder``, the current one."""
    import mlflow

    from cellbench.run import main

    kind, asks, flags = GRIDS[name]
    write_data(kind, folder / kind)
    top, _, tables = asks.partition("[grid]")
    (folder / f"{name}.toml").write_text(f'experiment = "{name}"\ndataset = "folder"\n{top}[data]\ngroup = "none"\n[grid]{tables}{RUN}')
    assert main(["grid", f"{name}.toml", "--data", kind, "--device", "cpu", *flags]) == 0
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(name)
    found = {}
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        if not any(key.startswith("test/") for key in run.data.metrics):
            continue
        row: dict[str, float | list[float]] = {
            key: round(value, 6)
            for key, value in run.data.metrics.items()
            if key.partition("/")[0].startswith("test") and math.isfinite(value)
        }
        for key in ("train/loss", "val/loss", "val/dice"):
            row[key] = [round(one.value, 6) for one in client.get_metric_history(run.info.run_id, key)]
        found[run.info.run_name] = dict(sorted(row.items()))
    return dict(sorted(found.items()))


def tolerance(grid: str, key: str) -> float:
    """How far a number may be from the written one."""
    if any(part in key for part in COUNTS):
        return 2.0
    if any(part in key for part in CELLS):
        return 0.13
    return 0.01 if "bf16" in GRIDS[grid][2] else 0.002


def main() -> None:
    """Writes all numbers anew."""
    import torch

    from cellbench.config.run import NUMERICS_VERSION

    torch.set_num_threads(1)
    out: dict[str, object] = {"numerics": NUMERICS_VERSION}
    for name in GRIDS:
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            os.environ |= {"CELLBENCH_CACHE": f"{place}/cache", "MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db"}
            out[name] = numbers(name, Path(place))
    FILE.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
