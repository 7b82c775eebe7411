"""What lies in a folder: files by stem, links followed only inside, and what is wrong told as problems rather than raised."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cellbench.data.dataset import Sample
from cellbench.data.images import EXTENSIONS
from cellbench.errors import CellbenchError, quoted
from cellbench.files import nfc


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that keeps an image from being used."""

    kind: str
    """``missing``, ``outside``, ``same-stem``, ``empty`` …"""
    name: str
    """The file that it is about."""
    said: str
    todo: str

    def told(self, num_more: int = 0) -> str:
        more = f"; {num_more} more like it" if num_more else ""
        return f"{self.said}{more}. {self.todo}"


@dataclass(kw_only=True)
class Listing:
    """The samples of a dataset as they lie, by ``train``, ``val`` and ``test``, before anything is decoded."""

    root: Path
    layout: str
    """In words, for people."""
    parts: dict[str, tuple[Sample, ...]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self) -> None:
        """Raises the first problem, and how many more are like it."""
        if self.problems:
            first = self.problems[0]
            raise CellbenchError(first.told(sum(other.kind == first.kind for other in self.problems) - 1))


def inside(root: Path, path: Path) -> bool:
    """Whether a path, its links followed, lies in ``root``; with ``CELLBENCH_FOLLOW_LINKS=1`` links may lead anywhere."""
    if os.environ.get("CELLBENCH_FOLLOW_LINKS") == "1":
        return True
    return path.resolve().is_relative_to(root.resolve())


def place(root: Path, name: str) -> Path | None:
    """The file of a relative name, with / or \\ between folders; None where it would leave ``root``."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name or "\0" in name or parts.is_absolute() or ".." in parts.parts or ":" in (parts.parts or ("",))[0]:
        return None
    try:
        too_long = any(len(os.fsencode(part)) > 255 for part in parts.parts) or len(parts.parts) > 64
    except UnicodeEncodeError:  # half a character, as JSON can write it
        return None
    if too_long:  # no file system has such names
        return None
    path = _as_written(root, parts.parts)
    return path if inside(root, path) else None


def _as_written(root: Path, parts: Sequence[str]) -> Path:
    """The path of a relative name as the disk has it, where that is another Unicode form of the same."""
    path = root.joinpath(*parts)
    if "".join(parts).isascii() or path.exists():
        return path
    path = root
    for part in parts:
        here = path / part
        if not here.exists() and path.is_dir():
            here = next((one for one in path.iterdir() if nfc(one.name) == nfc(part)), here)
        path = here
    return path


def outside(root: Path, name: str) -> Problem:
    todo = "Only files inside it are read: copy it there, or set CELLBENCH_FOLLOW_LINKS=1 where links are meant."
    return Problem(kind="outside", name=name, said=f"{root.name}: {quoted(name)} leads out of the folder", todo=todo)


def by_stem(folder: Path, root: Path, problems: list[Problem]) -> dict[str, Path]:
    """The pictures of a folder by stem, sorted by name. A link that leads out of ``root``, or a stem that two share, is a problem."""
    found: dict[str, Path] = {}
    if not inside(root, folder):
        problems.append(outside(root, str(folder.relative_to(root))))
        return found
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        stem, extension = os.path.splitext(nfc(entry.name))
        if extension.lower() not in EXTENSIONS or entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if entry.is_symlink() and not inside(root, path):
            problems.append(outside(root, str(path.relative_to(root))))
        elif not entry.is_file():
            continue
        elif stem in found:
            problems.append(
                Problem(
                    kind="same-stem",
                    name=entry.name,
                    said=f"{folder}: '{found[stem].name}' and '{entry.name}' share a stem, so their masks cannot be told apart",
                    todo="Rename one.",
                )
            )
        else:
            found[stem] = path
    return found


def named(paths: Sequence[str]) -> dict[str, str]:
    """A name for each relative path: the file's own, or where two share it the whole path with ``__`` for its folders; as it is where that is
    another file's name."""
    last = [PurePosixPath(path).name for path in paths]
    twice = {name for name, num in Counter(last).items() if num > 1}
    out = {path: path.replace("/", "__") if name in twice else name for path, name in zip(paths, last, strict=True)}
    again = {name for name, num in Counter(out.values()).items() if num > 1}  # a/b.png beside a__b.png
    return {path: path if name in again else name for path, name in out.items()}
