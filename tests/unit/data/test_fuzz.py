"""Damaged manifests and COCO files, thousands of ways: one line that names what is wrong, or an answer of the right shape. Never another
error, a hang, or a truth that came from outside the folder.

``CELLBENCH_FUZZ=20000`` asks for so many mutations of each kind.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_folders import FOLDER, SIZE, coco_folder, coco_tree, manifest

from cellbench.config.experiment import DataSpec
from cellbench.data.loading import scan_dataset, split_dataset
from cellbench.data.scan import Listing
from cellbench.errors import CellbenchError

NUM = int(os.environ.get("CELLBENCH_FUZZ", "150"))
NASTY: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1.5, -1e308, float("nan"), float("inf"), "", "\0", "../../etc/passwd", "/dev/zero", "a" * 5000, "é\u202e",
    "\ud800.png",
    [], [[]], {}, [[0] * 6], [[-1e9] * 8], {"size": list(SIZE), "counts": [2**62, -(2**62)]}, {"size": list(SIZE), "counts": "~~~~"}, [1, [2, [3]]],
]  # fmt: skip


def bytes_mutated(data: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(0, max(len(out), 1)))
        kind = rng.integers(0, 5)
        if kind == 0 and out:
            out[place] = int(rng.integers(0, 256))
        elif kind == 1:
            del out[place : place + int(rng.integers(1, 40))]
        elif kind == 2:
            out[place:place] = bytes(rng.integers(0, 256, int(rng.integers(1, 20)), dtype=np.uint8))
        elif kind == 3:
            out[place:place] = out[place : place + int(rng.integers(1, 60))]
        else:
            out[place:place] = rng.choice([b",", b'"', b"\n", b"\r", b"../", b"\xff", b";", b"9" * 30, b"[" * 200])
    return bytes(out)


def tree_mutated(tree: Any, rng: np.random.Generator) -> Any:
    """The tree with one random value replaced by an invalid one, or removed."""
    tree = json.loads(json.dumps(tree))
    node, steps = tree, int(rng.integers(1, 7))
    for step in range(steps):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = keys[int(rng.integers(len(keys)))]
        if step == steps - 1 or not isinstance(node[key], dict | list):
            if rng.integers(0, 6) == 0:
                del node[key]
            else:
                node[key] = NASTY[int(rng.integers(len(NASTY)))]
            break
        node = node[key]
    return tree


def read(folder: Path) -> int:
    """Images read to the end; every class map and id map has its image's size, every file lies inside."""
    card, listing = scan_dataset(FOLDER, folder, DataSpec())
    assert isinstance(listing, Listing)
    listing.raise_first()
    dataset, _ = split_dataset(card, listing, DataSpec())
    num = 0
    for sample in (*dataset.train, *dataset.val, *dataset.test):
        assert sample.image.resolve().is_relative_to(folder.resolve())
        image, classes = dataset.read(sample)
        ids = dataset.read_instances(sample)
        assert classes.dtype == np.uint8
        assert classes.max(initial=0) <= 1
        assert ids is None or ids.shape == classes.shape
        num += image.shape[:2] == classes.shape
    return num


def survive(folder: Path, path: Path, mutate) -> tuple[int, int]:
    """How many mutations were read and how many refused."""
    good, said = 0, []
    for seed in range(NUM):
        path.write_bytes(mutate(np.random.default_rng(seed)))
        try:
            good += read(folder) > 0
        except CellbenchError as error:
            said.append(str(error))
    assert all("\n" not in line and len(line) < 2000 for line in said)
    return good, len(said)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.csv", "manifest.toml"])
def test_no_damaged_manifest_gets_through_but_as_one_line_or_an_answer(tmp_path: Path, name: str) -> None:
    folder = manifest(tmp_path / "own", name)
    whole = (folder / name).read_bytes()
    good, refused = survive(folder, folder / name, lambda rng: bytes_mutated(whole, rng))
    assert refused > NUM // 4
    assert good + refused == NUM


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["polygon", "rle", "compressed"])
def test_no_damaged_coco_file_gets_through_but_as_one_line_or_an_answer(tmp_path: Path, kind: str) -> None:
    folder = coco_folder(tmp_path / "own", 4, kind)
    path = folder / "annotations.json"
    whole, tree = path.read_bytes(), coco_tree(4, kind)
    survive(folder, path, lambda rng: bytes_mutated(whole, rng))
    good, refused = survive(folder, path, lambda rng: json.dumps(tree_mutated(tree, rng)).encode())
    assert good > NUM // 20
    assert refused > NUM // 4
