"""Which images train, which validate and which test: seeded, written down once, and taken from the file ever after."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellbench.data.dataset import Sample
from cellbench.errors import CellbenchError
from cellbench.files import cache_dir, writable, write_atomic
from cellbench.spec import DataSpec


@dataclass(frozen=True, kw_only=True)
class Splits:
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    place: Path
    """The file that says so, or will."""
    record: str = ""
    """What ``keep`` writes there; empty where the file was there before."""

    def keep(self) -> str:
        """Writes a newly drawn split down; returns what a person should know."""
        if not self.record:
            return f"split read from {self.place}"
        write_atomic(self.place, self.record)
        return f"split written to {self.place}"


def split_of(root: Path, pool: tuple[Sample, ...], test: tuple[Sample, ...], spec: DataSpec) -> Splits:
    """The splits of a pool of images and, where the data comes with one, a test folder that training never touches.

    ``root/splits.json`` is used where it lies, as published: ``{"train": [names], "val": [names]}`` (and ``"test"`` where the data has no
    test folder), with or without extensions. Otherwise it is drawn from ``split_seed``, for ``keep`` to write there or, where the folder
    is read-only, into the cache folder. A file that this code wrote for another seed or share is left alone; its name says for which.
    """
    standard = spec.val_fraction == DataSpec().val_fraction and spec.split_seed == DataSpec().split_seed
    name = "splits.json" if standard and (test or spec.test_fraction == DataSpec().test_fraction) else _name(spec, bool(test))
    # A file that names no seed is a person's own, or the published one, and is meant whatever the settings say.
    own = [root / "splits.json"] if (root / "splits.json").is_file() and '"seed"' not in (root / "splits.json").read_text("utf-8", "replace") else []
    for place in (*own, root / name, _elsewhere(root, name)):
        if place.is_file():
            return _read(place, pool, test)
    chosen = _draw(pool, test, spec)
    record = {
        "seed": spec.split_seed,
        "val_fraction": spec.val_fraction,
        **{part: [sample.name for sample in samples] for part, samples in chosen.items() if samples or part != "test"},
    }
    place = root / name if writable(root) else _elsewhere(root, name)
    return Splits(train=chosen["train"], val=chosen["val"], test=test or chosen["test"], place=place, record=json.dumps(record, indent=1))


def _name(spec: DataSpec, has_test: bool) -> str:
    tail = "" if has_test else f"-test{spec.test_fraction:g}"
    return f"splits-seed{spec.split_seed}-val{spec.val_fraction:g}{tail}.json"


def _elsewhere(root: Path, name: str) -> Path:
    path = root.absolute()
    key = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    return cache_dir() / "splits" / key / name


def _draw(pool: tuple[Sample, ...], test: tuple[Sample, ...], spec: DataSpec) -> dict[str, tuple[Sample, ...]]:
    order = np.random.default_rng(spec.split_seed).permutation(len(pool))
    num_test = 0 if test else max(1, round(spec.test_fraction * len(pool)))
    num_val = max(1, round(spec.val_fraction * (len(pool) - num_test)))
    if num_test + num_val >= len(pool):
        raise CellbenchError(f"{len(pool)} images are too few to split: {num_test} for test and {num_val} for validation leave none to train on.")
    cuts = {"test": order[:num_test], "val": order[num_test : num_test + num_val], "train": order[num_test + num_val :]}
    return {part: tuple(pool[i] for i in sorted(chosen)) for part, chosen in cuts.items()}


def _read(place: Path, pool: tuple[Sample, ...], test: tuple[Sample, ...]) -> Splits:
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
        parts = {part: [str(name) for name in record.get(part, [])] for part in ("train", "val", "test")}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CellbenchError(f'{place}: cannot be read as a split ({error}). Expected {{"train": [names], "val": [names]}}. Mend or remove it.') from None
    known = {Path(sample.name).stem: sample for sample in pool} | {sample.name: sample for sample in pool}  # a.png.png has the stem a.png
    chosen: dict[str, list[Sample]] = {}
    for part in ("train", "val") if test else ("train", "val", "test"):
        strangers = [name for name in parts[part] if Path(name).name not in known]
        if strangers:
            raise CellbenchError(
                f"{place}: names '{strangers[0]}' in '{part}', which is not among the images ({len(strangers)} such names). Remove the file to split anew."
            )
        chosen[part] = [known[Path(name).name] for name in parts[part]]
        if not chosen[part]:
            raise CellbenchError(f"{place}: '{part}' is empty. Name images there, or remove the file to split anew.")
    names = [sample.name for samples in chosen.values() for sample in samples]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise CellbenchError(f"{place}: '{twice}' stands in two splits or twice in one. Each image belongs to one split.")
    unused = len(pool) - len(names)
    if unused:
        raise CellbenchError(f"{place}: says nothing of {unused} images of the folder. Add them to a split, or remove the file to split anew.")
    return Splits(train=tuple(chosen["train"]), val=tuple(chosen["val"]), test=test or tuple(chosen["test"]), place=place)
