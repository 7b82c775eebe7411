"""Splits images into training, validation and test sets: drawn once from a seed, saved to a file, and read from it afterwards.

Splits as published, by groups, by strata, or into k folds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cellbench.config.experiment import DataSpec
from cellbench.data.audit import near_duplicates
from cellbench.data.dataset import SPLITS, Sample
from cellbench.data.io import images
from cellbench.data.stratify import allocate
from cellbench.errors import CellbenchError
from cellbench.files import cache_dir, is_writable, read_text, text_digest, to_nfc, write_atomic

Grouping = Callable[[tuple[Sample, ...]], tuple[Sample, ...]]
"""Assigns a common group to samples that show the same picture."""


MIN_TEST_IMAGES = 30
"""With fewer test images, few differences between models are significant."""
USUAL_FOLDS = 5


def choose_folds(root: Path, parts: Mapping[str, tuple[Sample, ...]], spec: DataSpec) -> tuple[int, str]:
    """How many folds test every image once where one split would test too few, and a sentence about it; 0 and "" where one split is enough.

    The user's own ``splits.json`` is kept, and so are sets with too few images or groups for folds.
    """
    samples = with_groups(tuple(sample for part in SPLITS for sample in parts.get(part, ())), spec, tuple)
    num_test = len(parts.get("test", ())) or round(spec.test_fraction * len(samples))
    num_folds = min(USUAL_FOLDS, len({unit_of(sample) for sample in samples}))
    if num_test >= MIN_TEST_IMAGES or num_folds < 3 or _own(root / "splits.json"):
        return 0, ""
    known = f"Its test folder has {num_test}" if parts.get("test") else f"One split would test {num_test}"
    return num_folds, (
        f"{known} of {len(samples)} images, too few to decide much: all {len(samples)} are tested instead, each once, in {num_folds} folds "
        "(--set data.folds=0 for one split)."
    )


@dataclass(frozen=True, kw_only=True)
class Splits:
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    place: Path
    """The file of the split."""
    record: str = ""
    """Content of a new file; empty if the split was read from one."""

    def keep(self) -> str:
        """Writes a new split to its file; returns a note, the same for all folds."""
        if self.record:
            write_atomic(self.place, self.record)
        return f"split {'written to' if self.record else 'read from'} {re.sub(r'-fold[0-9]+of', '-fold*of', str(self.place))}"


def split_of(
    root: Path,
    pool: tuple[Sample, ...],
    test: tuple[Sample, ...],
    spec: DataSpec,
    foreground: Callable[[Sample], float] = lambda _: 0.0,
    grouped: Grouping = near_duplicates.group_near_duplicates,
) -> Splits:
    """The splits of a pool of images and, if the data has one, of a test folder that training never uses.

    ``root/splits.json`` is used if it exists: ``{"train": [names], "val": [names]}`` (and ``"test"`` without a test folder), with or without
    extensions. Otherwise the split is drawn from ``split_seed``, and ``keep`` writes it there or, if the folder is read-only, into the cache
    folder. Files for another seed or share have other names and stay as they are.

    With ``spec.folds`` pool and test folder are joined and cut into folds, one of which is the test set; a user's own ``splits.json`` has no folds
    and is not used. ``foreground``: the share of an image's pixels that are cells, for ``stratify``.

    If nothing else groups the images, ``grouped`` finds those of the pool that show the same picture. A new split keeps them together and lists
    them in its file. Without such images the split is the same as without grouping.
    """
    if spec.folds:
        pool, test = _one_pool(pool, test), ()
    samples = with_groups((*pool, *test), spec, grouped)
    pool, test = samples[: len(pool)], samples[len(pool) :]
    in_groups = any(sample.group or sample.appearance for sample in pool)
    standard = not any(getattr(spec, key) != DataSpec.model_fields[key].default for key in ("val_fraction", "split_seed", *_LATER))
    standard &= not in_groups and (bool(test) or spec.test_fraction == DataSpec.model_fields["test_fraction"].default)
    name = "splits.json" if standard else _name(spec, bool(test), in_groups)
    # A file without a seed is the user's or the published one, and applies whatever the settings are.
    own = [root / "splits.json"] if not spec.folds and _own(root / "splits.json") else []
    for place in (*own, root / name, _elsewhere(root, name)):
        if place.is_file():
            found = _read(place, pool, test)
            _refuse_torn(place, found)
            return found
    together: list[list[str]] = []
    if spec.group == "auto" and not in_groups:
        pool, together = _kept_together(pool, grouped)
    try:
        parts = _allocated(pool, test, spec, foreground) if in_groups or together or _special(spec) else _draw(pool, test, spec)
    except CellbenchError as error:
        if not together:
            raise
        raise CellbenchError(
            f"{error} {sum(map(len, together))} of the images show the same as others, whole or in part, such as {together[0][0]} and "
            f"{together[0][1]}, and are kept together; data.group=none splits them nevertheless."
        ) from None
    record = {
        "seed": spec.split_seed,
        "val_fraction": spec.val_fraction,
        **({key: getattr(spec, key) for key in _LATER} if in_groups or _special(spec) else {}),
        **{part: [sample.name for sample in samples] for part, samples in parts.items() if samples or part != "test"},
        **({_TOGETHER: together} if together else {}),
    }
    place = root / name if is_writable(root) else _elsewhere(root, name)
    drawn = Splits(train=parts["train"], val=parts["val"], test=test or parts["test"], place=place, record=json.dumps(record, indent=1))
    _refuse_torn(root, drawn)  # the data's own test folder may split a group
    return drawn


def given_splits(
    root: Path,
    layout: str,
    parts: Mapping[str, tuple[Sample, ...]],
    spec: DataSpec,
    grouped: Grouping = near_duplicates.group_near_duplicates,
) -> Splits:
    """The three splits that the data itself names. Nothing is drawn or written."""
    samples = with_groups((*parts["train"], *parts["val"], *parts["test"]), spec, grouped)
    first, second = len(parts["train"]), len(parts["train"]) + len(parts["val"])
    found = Splits(train=samples[:first], val=samples[first:second], test=samples[second:], place=root / layout)
    for part in SPLITS:
        if not getattr(found, part):
            raise CellbenchError(f"{root}: {layout} has images of a validation split and none of '{part}'. Name some, or no split at all.")
    _refuse_torn(root, found)
    return found


_TOGETHER = "together"
"""Key in a split's file: lists of names that show the same picture."""


def _kept_together(pool: tuple[Sample, ...], grouped: Grouping) -> tuple[tuple[Sample, ...], list[list[str]]]:
    pool = grouped(pool)
    names: dict[str, list[str]] = {}
    for sample in pool:
        if sample.group:
            names.setdefault(sample.group, []).append(sample.name)
    return pool, list(names.values())


_LATER = ("folds", "fold", "group", "group_pattern", "stratify")


def _special(spec: DataSpec) -> bool:
    return bool(spec.folds) or spec.stratify != "none"


def _own(place: Path) -> bool:
    return place.is_file() and '"seed"' not in place.read_text("utf-8", "replace")


def _one_pool(pool: tuple[Sample, ...], test: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """Both together. A test image with the name of a training image is called ``test__NAME``."""
    names = {sample.name for sample in pool}
    return (*pool, *(replace(sample, name=f"test__{sample.name}") if sample.name in names else sample for sample in test))


def with_groups(
    samples: tuple[Sample, ...], spec: DataSpec, grouped: Grouping = near_duplicates.group_near_duplicates
) -> tuple[Sample, ...]:
    """The samples with the group (patient, slide, …) that ``spec.group`` gives each.

    Raises CellbenchError where groups are wanted and none is found.
    """
    if spec.group == "none":
        return tuple(replace(sample, group="") for sample in samples)
    if spec.group in ("near-duplicates", "appearance"):
        return grouped(samples)
    if spec.group == "prefix":
        matches = [re.search(spec.group_pattern, Path(sample.name).stem) for sample in samples]
        samples = tuple(replace(sample, group=(match[1] or "") if match else "") for match, sample in zip(matches, samples, strict=True))
        problem = f"no name, such as '{samples[0].name}', matches group_pattern {spec.group_pattern!r}. Set one that does."
    else:
        problem = "no image has a group. Give a manifest with a column 'group', or group by 'prefix'."
    if spec.group != "auto" and not any(sample.group for sample in samples):
        raise CellbenchError(f"[data] group = '{spec.group}': {problem}")
    return samples


def unit_of(sample: Sample) -> str:
    """The unit that is never split: all that look alike, the group, or the image alone."""
    if sample.appearance:
        return sample.appearance
    return f"group {sample.group}" if sample.group else f"image {sample.name}"


def _refuse_torn(place: Path, splits: Splits) -> None:
    home: dict[str, str] = {}
    for part, samples in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        for sample in samples:
            if sample.group and home.setdefault(sample.group, part) != part:
                raise CellbenchError(
                    f"{place}: group '{sample.group}' lies in '{home[sample.group]}' and in '{part}' ({sample.name}). "
                    "Correct the split, or set data.group=none."
                )


def _name(spec: DataSpec, has_test: bool, grouped: bool) -> str:
    tail = "" if has_test or spec.folds else f"-test{spec.test_fraction:g}"
    tail += f"-fold{spec.fold}of{spec.folds}" if spec.folds else ""
    tail += f"-by-{'column' if spec.group == 'auto' else spec.group}" if grouped else ""
    if spec.group == "prefix" and spec.group_pattern != DataSpec.model_fields["group_pattern"].default:
        tail += text_digest(spec.group_pattern, 6)
    tail += f"-{spec.stratify}" if spec.stratify != "none" else ""
    return f"splits-seed{spec.split_seed}-val{spec.val_fraction:g}{tail}.json"


def _elsewhere(root: Path, name: str) -> Path:
    path = root.absolute()
    key = f"{path.name[:80]}-{text_digest(str(path), 8)}"
    return cache_dir() / "splits" / key / name


def _draw(pool: tuple[Sample, ...], test: tuple[Sample, ...], spec: DataSpec) -> dict[str, tuple[Sample, ...]]:
    """Image by image, as published."""
    order = np.random.default_rng(spec.split_seed).permutation(len(pool))
    num_test = 0 if test else max(1, round(spec.test_fraction * len(pool)))
    num_val = max(1, round(spec.val_fraction * (len(pool) - num_test)))
    if num_test + num_val >= len(pool):
        raise CellbenchError(
            f"{len(pool)} images are too few to split: {num_test} for test and {num_val} for validation leave none to train on."
        )
    cuts = {"test": order[:num_test], "val": order[num_test : num_test + num_val], "train": order[num_test + num_val :]}
    return {part: tuple(pool[i] for i in sorted(chosen)) for part, chosen in cuts.items()}


def _allocated(
    pool: tuple[Sample, ...], test: tuple[Sample, ...], spec: DataSpec, foreground: Callable[[Sample], float]
) -> dict[str, tuple[Sample, ...]]:
    """By groups, by strata, or one of several folds. All folds come from the same seed, so that their test sets are disjoint."""
    names = [unit_of(sample) for sample in pool]
    strata = _strata(pool, spec, foreground)
    if spec.folds:
        in_test = allocate(names, strata, [1.0] * spec.folds, [spec.split_seed]) == spec.fold
    elif test:
        in_test = np.zeros(len(pool), bool)
    else:
        in_test = allocate(names, strata, [1 - spec.test_fraction, spec.test_fraction], [spec.split_seed]) == 1
    rest = np.flatnonzero(~in_test)
    seed = [spec.split_seed, 1 + spec.fold]  # another one for each fold
    in_val = allocate([names[i] for i in rest], [strata[i] for i in rest], [1 - spec.val_fraction, spec.val_fraction], seed) == 1
    cuts = {"test": np.flatnonzero(in_test), "val": rest[in_val], "train": rest[~in_val]}
    return {part: tuple(pool[i] for i in chosen) for part, chosen in cuts.items()}


def _strata(pool: tuple[Sample, ...], spec: DataSpec, foreground: Callable[[Sample], float]) -> list[str]:
    if spec.stratify == "label":
        if not any(sample.label for sample in pool):
            raise CellbenchError(
                "[data] stratify = 'label': no image has a label. Give a manifest with a column 'label', or stratify by 'foreground'."
            )
        return [sample.label for sample in pool]
    if spec.stratify == "size":
        return [str(images.image_size(sample.image)) for sample in pool]
    if spec.stratify == "foreground":
        shares = np.array([foreground(sample) for sample in pool])
        return [str(int(fifth)) for fifth in np.searchsorted(np.quantile(shares, [0.2, 0.4, 0.6, 0.8]), shares, side="right")]
    return [""] * len(pool)


def _read(place: Path, pool: tuple[Sample, ...], test: tuple[Sample, ...]) -> Splits:
    try:
        record = json.loads(read_text(place))
        parts = {part: [str(name) for name in record.get(part, [])] for part in SPLITS}
        together = [[str(name) for name in names] for names in record.get(_TOGETHER, [])]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CellbenchError(
            f'{place}: cannot be read as a split ({error}). Expected {{"train": [names], "val": [names]}}. Correct or remove it.'
        ) from None
    known = {to_nfc(Path(sample.name).stem): sample for sample in pool} | {
        to_nfc(sample.name): sample for sample in pool
    }  # a.png.png: stem a.png
    chosen: dict[str, list[Sample]] = {}
    for part in ("train", "val") if test else SPLITS:
        strangers = [name for name in parts[part] if to_nfc(Path(name).name) not in known]
        if strangers:
            raise CellbenchError(
                f"{place}: names '{strangers[0]}' in '{part}', which is not among the images ({len(strangers)} such names). Remove the file to split again."
            )
        chosen[part] = [known[to_nfc(Path(name).name)] for name in parts[part]]
        if not chosen[part]:
            raise CellbenchError(f"{place}: '{part}' is empty. Name images there, or remove the file to split again.")
    names = [sample.name for samples in chosen.values() for sample in samples]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise CellbenchError(f"{place}: '{twice}' occurs in two splits or twice in one. Each image belongs to one split.")
    group = {to_nfc(name): f"like {names[0]}" for names in together for name in names}
    chosen = {part: [replace(s, group=s.group or group.get(to_nfc(s.name), "")) for s in samples] for part, samples in chosen.items()}
    unused = len(pool) - len(names)
    if unused:
        raise CellbenchError(
            f"{place}: does not name {unused} images of the folder. Add them to a split, or remove the file to split again."
        )
    return Splits(train=tuple(chosen["train"]), val=tuple(chosen["val"]), test=test or tuple(chosen["test"]), place=place)
