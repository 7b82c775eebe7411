"""Reads ``manifest.csv`` or ``manifest.toml``: a table with image, mask and optionally split, group and label."""

from __future__ import annotations

import csv
import io
import tomllib
from pathlib import Path

from cellbench.data.annotations import MaskFiles
from cellbench.data.dataset import Sample
from cellbench.data.scan import Listing, resolve_inside, unique_names
from cellbench.errors import CellbenchError, one_line, quote_name
from cellbench.files import parse_toml, read_text

NAMES = ("manifest.csv", "manifest.toml")
COLUMNS = ("image", "mask", "split", "group", "label")
SPLITS = {
    "": "train",
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def read_manifest(path: Path, root: Path) -> Listing:
    """The listing of a manifest; its paths are relative to its own folder and stay inside it. A mask may be a folder with one mask a cell.

    Raises CellbenchError for a file that is no such table; faults of single rows are problems of the listing.
    """
    rows, notes = (_toml if path.suffix.lower() == ".toml" else _csv)(path)
    out = Listing(root=root, layout=f"manifest {path.name}", notes=notes)
    if not rows:
        raise CellbenchError(f"{path}: holds no row. Expected one for each image, with {' and '.join(COLUMNS[:2])}.")
    if len({bool(row["split"]) for row in rows}) > 1:
        raise CellbenchError(
            f"{path}: some rows name a split and others none. Name train, val or test in each, or in none to have it drawn."
        )
    names = unique_names([row["image"] for row in rows])
    parts: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        name, part = row["image"], SPLITS.get(row["split"].lower())
        if part is None:
            raise CellbenchError(f"{path}: row {number} has split = {row['split']!r:.40}. Expected train, val or test.")
        if name in seen:
            out.reject("twice", name, f"{path}: names {quote_name(name)} twice", "Keep one of the rows.")
            continue
        seen.add(name)
        image, mask = resolve_inside(root, name), resolve_inside(root, row["mask"])
        if image is None or mask is None:
            out.reject_outside(name if image is None else row["mask"])
            continue
        truth = MaskFiles(paths=tuple(out.images_in(mask).values())) if mask.is_dir() else None
        missing = "image" if not image.is_file() else "mask" if not (mask.is_file() or (truth and truth.paths)) else ""
        if missing:
            message = f"{path}: row {number} names the {missing} {quote_name(row[missing])}, which does not exist"
            out.reject(f"missing-{missing}", name, message, "Add it, or take the row out.")
            continue
        parts[part].append(Sample(name=names[name], image=image, mask=mask, truth=truth, group=row["group"], label=row["label"]))
    out.parts = {part: tuple(samples) for part, samples in parts.items()}
    return out


def _csv(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        text = read_text(path)
        first = text.split("\n", 1)[0]
        delimiter = max(",;\t", key=first.count)
        table = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CellbenchError(f"{path}: cannot be read as CSV ({one_line(error)[:200]}). Save it as CSV in UTF-8.") from None
    heads = [head.strip().lower() for head in table[0]] if table else []
    if not {"image", "mask"} <= set(heads) or len(set(heads)) < len(heads):
        raise CellbenchError(
            f"{path}: its first line must name the columns, image and mask among them, each once; found: {', '.join(heads)[:200] or 'nothing'}."
        )
    rows = []
    for number, cells in enumerate(table[1:], 1):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(heads):
            todo = f"Correct it, with quotes around names that hold {delimiter!r}."
            raise CellbenchError(f"{path}: row {number} has {len(cells)} fields, the first line {len(heads)}. {todo}")
        row = dict(zip(heads, (cell.strip() for cell in cells), strict=True))
        rows.append({key: row.get(key, "") for key in COLUMNS})
    other = [head for head in heads if head not in COLUMNS]
    return rows, [f"{path.name}: columns not used: {quote_name(', '.join(other))}"] if other else []


def _toml(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        tree = parse_toml(read_text(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CellbenchError(f"{path}: cannot be read as TOML ({one_line(error)[:200]}).") from None
    rows = tree.get("image")
    if set(tree) != {"image"} or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CellbenchError(f"{path}: expected tables [[image]] with image, mask and perhaps split, group, label, and nothing else.")
    for row in rows:
        wrong = [key for key, value in row.items() if key not in COLUMNS or not isinstance(value, str)]
        if wrong or not {"image", "mask"} <= set(row):
            raise CellbenchError(
                f"{path}: an [[image]] has {f'{quote_name(wrong[0])} = {row[wrong[0]]!r:.60}' if wrong else 'no image or no mask'}. Strings are expected."
            )
    return [{key: row.get(key, "") for key in COLUMNS} for row in rows], []
