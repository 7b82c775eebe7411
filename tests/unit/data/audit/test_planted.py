"""Each fault, planted into copies of the three real sets, is reported under its name with its file, and nothing else is reported as severe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cellbench.cli.check import check_folder

NUM = {"bccd": 40, "wbc": 40, "dsb2018": 40}
"""Images copied of each set; of BCCD, which has fourteen large ones, quarters."""


class Copy:
    """Images and masks of a set in ``original/`` and ``mask/``, with the split written down; faults are planted into them."""

    def __init__(self, shared: Path, name: str, folder: Path) -> None:
        self.folder, self.used = folder, 0
        for kind in ("original", "mask"):
            (folder / kind).mkdir(parents=True)
        found = sorted((shared / name).rglob("original/*"))
        masks = {path.stem: path for path in (shared / name).rglob("mask/*")}
        self.card = name
        if name == "bccd":
            self.card = "folder"  # bccd's has its own test folder
            (folder / "dataset.toml").write_text('classes = ["background", "cell"]\nvalues = [0, 255]\n')
            for path in found:
                _quarters(path, folder / "original")
                _quarters(masks[path.stem], folder / "mask")
            self.images = sorted((folder / "original").iterdir())[: NUM[name]]
            self.masks = [folder / "mask" / path.name for path in self.images]
            for kind in ("original", "mask"):
                for path in sorted((folder / kind).iterdir())[NUM[name] :]:
                    path.unlink()
        else:
            step = len(found) // NUM[name]
            self.images = [Path(shutil.copy(path, folder / "original")) for path in found[::step][: NUM[name]]]
            self.masks = [Path(shutil.copy(masks[path.stem], folder / "mask")) for path in self.images]
        self.train = [path.name for path in self.images]
        self.test: list[str] = []

    def next(self) -> int:
        """An image without a fault as yet."""
        self.used += 1
        return self.used - 1

    def mask(self, how: Callable[[np.ndarray], np.ndarray]) -> list[str]:
        """Changes a mask; the image's name."""
        k = self.next()
        Image.fromarray(how(np.array(Image.open(self.masks[k])))).save(self.masks[k])
        return [self.images[k].name]

    def image(self, how: Callable[[Image.Image], Image.Image], both: bool = False) -> list[str]:
        k = self.next()
        for path in (self.images[k], self.masks[k])[: 1 + both]:
            how(Image.open(path)).save(path)
        return [self.images[k].name]

    def another(self, how: Callable[[Image.Image], Image.Image], part: str) -> list[str]:
        """Adds a picture made from one that trains; the two names."""
        k = self.next()
        name = f"added{k}{self.images[k].suffix}"
        for path, added in ((self.images[k], name), (self.masks[k], f"added{k}{self.masks[k].suffix}")):
            how(Image.open(path)).save(path.parent / added)
        (self.test if part == "test" else self.train).append(name)
        return [self.images[k].name, name]

    def copied(self, part: str) -> list[str]:
        k = self.next()
        name = f"added{k}{self.images[k].suffix}"
        shutil.copy(self.images[k], self.images[k].parent / name)
        shutil.copy(self.masks[k], self.masks[k].parent / f"added{k}{self.masks[k].suffix}")
        (self.test if part == "test" else self.train).append(name)
        return [self.images[k].name, name]


def _quarters(path: Path, folder: Path) -> None:
    picture = Image.open(path)
    width, height = picture.width // 2, picture.height // 2
    for k, (x, y) in enumerate(((0, 0), (width, 0), (0, height), (width, height))):
        picture.crop((x, y, x + width, y + height)).save(folder / f"{path.stem}-{k}.png", compress_level=1)


def part_of(picture: Image.Image) -> Image.Image:
    """Three quarters of each side, mirrored and turned: few features are left of a single cell."""
    width, height = picture.size
    box = (width // 5, height // 5, width // 5 + 3 * width // 4, height // 5 + 3 * height // 4)
    return picture.crop(box).transpose(Image.Transpose.TRANSPOSE)


def noise_free(mask: np.ndarray) -> np.ndarray:
    return np.where(np.indices(mask.shape)[0] < mask.shape[0] // 6, 64, mask).astype(mask.dtype)


def damaged(copy: Copy) -> list[str]:
    k = copy.next()
    copy.images[k].write_bytes(copy.images[k].read_bytes()[: copy.images[k].stat().st_size // 2])
    return [copy.images[k].name]


def missing(copy: Copy) -> list[str]:
    k = copy.next()
    copy.masks[k].unlink()
    copy.train.remove(copy.images[k].name)
    return [copy.images[k].name]


def of_another(copy: Copy) -> list[str]:
    k, other = copy.next(), copy.next()
    size = Image.open(copy.images[k]).size
    Image.open(copy.images[other]).resize(size).save(copy.images[other])
    shutil.copy(copy.masks[k], copy.masks[other])
    return [copy.images[k].name, copy.images[other].name]


def away(mask: np.ndarray) -> np.ndarray:
    return np.roll(mask, (mask.shape[0] // 2, mask.shape[1] // 2), (0, 1))


FAULTS: dict[str, tuple[Sequence[str], Callable[[Copy], list[str]]]] = {
    "unreadable": (("bccd", "wbc", "dsb2018"), damaged),
    "missing-mask": (("bccd", "wbc", "dsb2018"), missing),
    "mis-sized": (("bccd", "wbc", "dsb2018"), lambda copy: copy.mask(lambda m: m[:-1])),
    "full": (("bccd", "wbc", "dsb2018"), lambda copy: copy.mask(lambda m: np.full_like(m, 255))),
    "empty": (("bccd", "wbc", "dsb2018"), lambda copy: copy.mask(np.zeros_like)),
    "inverted": (("bccd", "wbc", "dsb2018"), lambda copy: copy.mask(lambda m: np.where(m > 40 * (m.max() > 99), 0, 255).astype(m.dtype))),
    "values": (("bccd", "wbc"), lambda copy: copy.mask(noise_free)),
    "same mask": (("bccd", "wbc", "dsb2018"), of_another),
    "astray": (("bccd", "wbc", "dsb2018"), lambda copy: copy.mask(away)),
    "stain": (("bccd", "wbc"), lambda copy: copy.image(lambda p: Image.fromarray(np.array(p.convert("RGB"))[..., ::-1] // np.array([1, 2, 1], np.uint8)))),
    "leak: same": (("bccd", "wbc", "dsb2018"), lambda copy: copy.copied("test")),
    "leak: near": (("bccd", "wbc", "dsb2018"), lambda copy: copy.another(lambda p: p.transpose(Image.Transpose.ROTATE_90), "test")),
    "leak: crop": (("bccd", "wbc", "dsb2018"), lambda copy: copy.another(part_of, "test")),
    "same": (("bccd", "wbc", "dsb2018"), lambda copy: copy.copied("train")),
    "near": (("bccd", "wbc", "dsb2018"), lambda copy: copy.another(lambda p: p.transpose(Image.Transpose.TRANSVERSE), "train")),
    "crop": (("bccd", "wbc", "dsb2018"), lambda copy: copy.another(part_of, "train")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NUM)
def test_every_planted_fault_is_found_where_it_lies(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("cellbench.cli.check._page", lambda *_: "")  # test_check.py looks at the pictures of faults
    copy = Copy(shared, name, tmp_path / "copy")
    planted = {kind: plant(copy) for kind, (sets, plant) in FAULTS.items() if name in sets}
    val = [path.name for path in copy.images[copy.used :]][:2]
    record = {"train": [one for one in copy.train if one not in val], "val": val, "test": copy.test}
    (copy.folder / "splits.json").write_text(json.dumps(record))
    assert check_folder(copy.folder, card=copy.card, out=tmp_path / "out", say=lambda line: None) == 1
    reported = {finding["kind"]: finding for finding in json.loads((tmp_path / "out" / "check.json").read_text())["findings"]}
    missed = [
        kind
        for kind, names in planted.items()
        if not all(any(n in where for where in reported.get(kind, {"images": []})["images"]) for n in names)
    ]
    assert missed == []
    severe = {kind: finding["images"] for kind, finding in reported.items() if finding["severity"] == "severe"}
    assert set(severe) <= set(planted)
    assert {kind: len(where) for kind, where in severe.items() if kind != "same mask"} == {
        kind: 1 for kind in severe if kind != "same mask"
    }
