"""Does training on the images that ``next`` ranks first help more than training on as many random ones?

    python tests/tools/next_images.py FOLDER OUT [--repeats 4] [--start 5] [--more 5] [--test 20] [--side 320]

Of a folder of ``original/`` and ``mask/``, each repeat draws images to test on, a few to start from, and a pool. A small model is trained on the first,
ranks the pool, and is trained again on the first with the best-ranked images, and with random ones. Prints the test Dice of each.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from cellbench.reporting.collect import collect_runs  # noqa: E402
from cellbench.run import main  # noqa: E402
from cellbench.tracking.tracker import Tracker  # noqa: E402

QUESTION = """experiment = "next"
dataset    = "folder"
[data]
val_fraction = 0.2
[grid]
backbone = ["efficientnet-lite0"]
head     = ["detail"]
seed     = [0]
[run]
epochs             = 6
crops_per_image    = 4
repeat_views_every = 3
batch_size         = 4
lr                 = 3e-3
tile_px            = 160
overlap            = 0.25
normalise          = "background"
"""


def trained(out: Path, name: str, train: list[Path], test: list[Path], seeds: str) -> float:
    """The test Dice, mean over images, of models trained on these images."""
    for part, images in (("train", train), ("test", test)):
        for image in images:
            for inner in ("original", "mask"):
                target = out / name / part / inner / image.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(image.parents[1] / inner / image.name, target)
    (out / "next.toml").write_text(QUESTION)
    experiment = f"{out.parent.name} {out.name} {name}"
    changes = ["--set", f"experiment={experiment}", "--set", f"grid.seed={seeds}"]
    if main(["grid", str(out / "next.toml"), "--data", str(out / name), *changes]):
        sys.exit(1)
    return collect_runs([Tracker(experiment)]).sets[0].models[0].scores().mean


def repeat(folder: Path, out: Path, seed: int, asked: argparse.Namespace) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    images = sorted(path for path in (folder / "original").iterdir() if max(Image.open(path).size) <= asked.side)
    images = [images[k] for k in rng.permutation(len(images))]
    test, start, pool = np.split(np.array(images, object), [asked.test, asked.test + asked.start])
    out.mkdir(parents=True, exist_ok=True)
    found = {"start": trained(out, "start", [*start], [*test], "[0, 1]")}
    (out / "pool").mkdir(exist_ok=True)
    for image in pool:
        shutil.copy(image, out / "pool" / image.name)
    main(["next", str(out / "pool"), "--experiment", f"{out.parent.name} {out.name} start", "--out", str(out)])
    ranked = [row["image"] for row in csv.DictReader((out / "next.csv").open())][: asked.more]
    found["ranked"] = trained(out, "ranked", [*start, *(folder / "original" / name for name in ranked)], [*test], "[0]")
    found["random"] = trained(out, "random", [*start, *rng.choice(pool, asked.more, replace=False)], [*test], "[0]")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in (("repeats", 4), ("start", 5), ("more", 5), ("test", 20), ("side", 320)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    rows = []
    for k in range(asked.repeats):
        rows.append(repeat(asked.folder, asked.out / str(k), k, asked))
        print(f"repeat {k}: " + ", ".join(f"{name} {dice:.3f}" for name, dice in rows[-1].items()), flush=True)
    gains = np.array([row["ranked"] - row["random"] for row in rows])
    print(
        f"ranked minus random: {gains.mean():+.3f}, deviation {gains.std(ddof=1):.3f}, better in {(gains > 0).sum()} of {len(gains)} repeats"
    )
