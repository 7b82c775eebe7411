"""What lies in a folder: files by stem, links followed only inside, and what is wrong told as problems rather than raised."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cellbench.data.dataset import Sample
from cellbench.data.io.decode import printable_path
from cellbench.data.io.images import EXTENSIONS
from cellbench.data.io.intensity import IntensityScaling
from cellbench.errors import CellbenchError, quote_name
from cellbench.files import to_nfc


@dataclass(frozen=True, kw_only=True)
class UnusableImage:
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


@dataclass(frozen=True, kw_only=True)
class FileWarning:
    """Something about files that does not keep images from use, and that a person should look at."""

    kind: str
    said: str
    names: tuple[str, ...]

    @property
    def line(self) -> str:
        """As one line, with the first names."""
        more = f" and {len(self.names) - 5} more" if len(self.names) > 5 else ""
        return f"{self.kind}: {self.said}: {', '.join(quote_name(name) for name in self.names[:5])}{more}."


@dataclass(kw_only=True)
class Listing:
    """The samples of a dataset as they lie, by ``train``, ``val`` and ``test``, before anything is decoded."""

    root: Path
    layout: str
    """In words, for people."""
    parts: dict[str, tuple[Sample, ...]] = field(default_factory=dict)
    problems: list[UnusableImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubts: list[FileWarning] = field(default_factory=list)
    reported: set[Path] = field(default_factory=set)
    """Files that a problem or doubt names already."""
    reading: IntensityScaling = field(default_factory=IntensityScaling)
    """What the images are read by, once it is decided."""
    um_per_px: float | None = None
    """The side of a pixel that all images state which state any, in micrometres; None where they differ or none does."""
    reading_words: list[str] = field(default_factory=list)
    """That in words, where it is not as usual."""

    @property
    def lines(self) -> tuple[str, ...]:
        """Notes, what images are read by, and doubts, for people."""
        return (*self.notes, *self.reading_words, *(doubt.line for doubt in self.doubts))

    classes: tuple[str, ...] = ()
    """As the data names them, the background first, where the card does not."""

    def refuse(self) -> None:
        """Raises the first problem, and how many more are like it."""
        if self.problems:
            first = self.problems[0]
            raise CellbenchError(first.told(sum(other.kind == first.kind for other in self.problems) - 1))


NO_SAMPLE = "image of no sample"
CLUTTER = frozenset({".ds_store", "thumbs.db", "desktop.ini", "__macosx"})
"""What file managers and archivers leave in folders, in small letters; neither used nor reported. So are Apple's ``._NAME``."""


@dataclass(frozen=True, kw_only=True)
class IgnoredFile:
    """A file, or a folder as a whole, that is not used."""

    path: Path
    reason: str
    """In a word or two, after a number: ``.dcm``, ``hidden``."""


def count_reasons(left: Iterable[IgnoredFile]) -> str:
    """How many there are for each reason, the most frequent first.

    >>> counted([LeftOut(path=Path("a.dcm"), reason=".dcm"), LeftOut(path=Path("b.dcm"), reason=".dcm")])
    '2 .dcm'
    """
    return ", ".join(f"{num} {reason}" for reason, num in Counter(one.reason for one in left).most_common())


def files_below(folder: Path) -> tuple[list[Path], list[IgnoredFile], set[Path]]:
    """All images of a folder and its subfolders, sorted; what else lies there; and the real folders that were looked into.

    Links to folders are followed, after all real folders, and each real folder is looked into once, so that circles end.
    """
    images: list[Path] = []
    left: list[IgnoredFile] = []
    seen: set[Path] = set()
    todo, links = [folder], []
    while todo or links:
        here = todo.pop() if todo else links.pop(0)
        real = here.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(here) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            left.append(IgnoredFile(path=here, reason=f"folder that cannot be opened ({error.strerror})"))
            continue
        for entry in listed:
            path = Path(entry.path)
            if _is_clutter(entry.name):
                continue
            if entry.name.startswith("."):
                left.append(IgnoredFile(path=path, reason="hidden folder" if entry.is_dir() else "hidden"))
            elif entry.is_dir():
                (links if entry.is_symlink() else todo).append(path)
            elif reason := why_unreadable(entry):
                left.append(IgnoredFile(path=path, reason=reason))
            else:
                images.append(path)
    return sorted(images), sorted(left, key=lambda one: one.path), seen


def _is_clutter(name: str) -> bool:
    return name.lower() in CLUTTER or name.startswith("._")


def why_unreadable(entry: os.DirEntry[str]) -> str:
    """Why an entry that is no folder is not read as an image; empty where it is."""
    if not entry.is_file():
        return "link that leads nowhere" if entry.is_symlink() else "no regular file"
    extension = os.path.splitext(entry.name)[1]
    return "" if extension.lower() in EXTENSIONS else (extension if extension.isprintable() else ascii(extension)) or "without an ending"


def other_files(folder: Path) -> list[Path]:
    """The files of a folder itself that are not read as images, by their names."""
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.is_dir() and not _is_clutter(entry.name) and why_unreadable(entry))


def find_unused(listing: Listing, known: Iterable[str]) -> tuple[list[FileWarning], list[str]]:
    """What lies in a data folder and is in no sample: where the samples lie as a doubt, elsewhere as a note.

    ``known``: names of files that say how the folder is read. Of folders that hold no sample only the name is given, unless one is named as
    those of images are.
    """
    root = listing.root
    samples = [sample for part in listing.parts.values() for sample in part]
    pictures = {sample.image for sample in samples}
    used = pictures | {sample.mask for sample in samples} | {path for sample in samples for path in getattr(sample.truth, "paths", ())}
    homes = {path.relative_to(root).parts[0] for path in used if path.is_relative_to(root)}
    folders, words = {path.parent for path in pictures}, {path.parent.name for path in pictures if path.parent != root}
    holders = folders | {path.parent for path in used}
    lost: list[IgnoredFile] = []
    elsewhere: dict[str, int] = Counter()
    with os.scandir(root) as entries:
        top = sorted((entry for entry in entries if not _is_clutter(entry.name)), key=lambda entry: entry.name)
    for entry in top:
        path = Path(entry.path)
        if not entry.is_dir():
            split = entry.name.startswith("splits") and entry.name.endswith(".json")
            if not split and path not in used and path not in listing.reported and entry.name not in known:
                if root in holders:
                    lost.append(IgnoredFile(path=path, reason=why_unreadable(entry) or NO_SAMPLE))
                else:
                    elsewhere[entry.name] += 1
            continue
        if entry.name not in homes and not entry.name.startswith(".") and not any((path / word).is_dir() for word in words):
            elsewhere[f"{entry.name}/"] += 1
            continue
        if entry.name.startswith(".") or (entry.is_symlink() and not inside(root, path)):
            continue  # no folder of data, or a problem of its own
        images, left, _ = files_below(path)
        left += [IgnoredFile(path=image, reason=NO_SAMPLE) for image in images if image not in used]
        for one in left:
            if one.path in listing.reported or one.path.name in known:
                continue
            chosen = listing.layout.startswith("manifest") and one.reason == NO_SAMPLE  # a table may name some images on purpose
            if not chosen and (one.path.parent in holders or folders & set(one.path.parents) or one.path.parent.name in words):
                lost.append(one)
            else:
                elsewhere[f"{one.path.parent.relative_to(root).as_posix()}/"] += 1
    doubts = []
    if lost:
        said = f"Files that are not used: {count_reasons(lost)}. Convert them, or move them out"
        doubts.append(
            FileWarning(kind="left out", said=said, names=tuple(printable_path(one.path.relative_to(root).as_posix()) for one in lost))
        )
    more = f" and {len(elsewhere) - 10} more" if len(elsewhere) > 10 else ""
    shown = ", ".join(f"{quote_name(name)} ({num} files)" if num > 1 else quote_name(name) for name, num in list(elsewhere.items())[:10])
    return doubts, [f"not used in {root.name}: {shown}{more}"] if elsewhere else []


def inside(root: Path, path: Path) -> bool:
    """Whether a path, its links followed, lies in ``root``; with ``CELLBENCH_FOLLOW_LINKS=1`` links may lead anywhere."""
    if os.environ.get("CELLBENCH_FOLLOW_LINKS") == "1":
        return True
    return path.resolve().is_relative_to(root.resolve())


def resolve_inside(root: Path, name: str) -> Path | None:
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
            here = next((one for one in path.iterdir() if to_nfc(one.name) == to_nfc(part)), here)
        path = here
    return path


def check_outside(root: Path, name: str) -> UnusableImage:
    todo = "Only files inside it are read: copy it there, or set CELLBENCH_FOLLOW_LINKS=1 where links are meant."
    return UnusableImage(kind="outside", name=name, said=f"{root.name}: {quote_name(name)} leads out of the folder", todo=todo)


def by_stem(folder: Path, root: Path, problems: list[UnusableImage]) -> dict[str, Path]:
    """The pictures of a folder by stem, sorted by name. A link that leads out of ``root``, or a stem that two share, is a problem."""
    found: dict[str, Path] = {}
    if not inside(root, folder):
        problems.append(check_outside(root, str(folder.relative_to(root))))
        return found
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        stem, extension = os.path.splitext(to_nfc(entry.name))
        if extension.lower() not in EXTENSIONS or entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if entry.is_symlink() and not inside(root, path):
            problems.append(check_outside(root, str(path.relative_to(root))))
        elif not entry.is_file():
            continue
        elif stem in found:
            problems.append(
                UnusableImage(
                    kind="same-stem",
                    name=entry.name,
                    said=f"{folder}: '{found[stem].name}' and '{entry.name}' share a stem, so their masks cannot be told apart",
                    todo="Rename one.",
                )
            )
        else:
            found[stem] = path
    return found


def unique_names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each relative path: the file's own, or where two share it the whole path with ``__`` for its folders; as it is where that is
    another file's name."""
    last = [PurePosixPath(path).name for path in paths]
    twice = {name for name, num in Counter(last).items() if num > 1}
    out = {path: path.replace("/", "__") if name in twice else name for path, name in zip(paths, last, strict=True)}
    again = {name for name, num in Counter(out.values()).items() if num > 1}  # a/b.png beside a__b.png
    return {path: path if name in again else name for path, name in out.items()}
