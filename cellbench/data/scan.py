"""Lists the files of a data folder: images by stem. Follows links only inside the folder; collects faults instead of raising them."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cellbench.data.dataset import Sample
from cellbench.data.io.decode import printable_path
from cellbench.data.io.images import EXTENSIONS
from cellbench.data.io.intensity import IntensityScaling
from cellbench.errors import CellbenchError, first_names, quote_name, quoted
from cellbench.escaping import readable
from cellbench.files import to_nfc

LINKS_ADVICE = "Only files inside it are read: copy it there, or set CELLBENCH_FOLLOW_LINKS=1 if links are intended."


@dataclass(frozen=True, kw_only=True)
class UnusableImage:
    """A fault that keeps an image from being used."""

    kind: str
    """``missing-mask``, ``outside``, ``same-stem``, ``empty`` …"""
    name: str
    """The file with the fault."""
    message: str
    advice: str

    def describe(self, num_more: int = 0) -> str:
        more = f"; {num_more} more like it" if num_more else ""
        return f"{self.message}{more}. {self.advice}"


@dataclass(frozen=True, kw_only=True)
class FileWarning:
    """A warning about files whose images can be used nevertheless."""

    kind: str
    message: str
    names: tuple[str, ...]

    @property
    def line(self) -> str:
        """One line with the first names."""
        return f"{self.kind}: {self.message}: {quoted(self.names)}."


@dataclass(kw_only=True)
class Listing:
    """The samples of a dataset by ``train``, ``val`` and ``test``, before anything is decoded."""

    root: Path
    layout: str
    """How the folder is laid out, in words."""
    parts: dict[str, tuple[Sample, ...]] = field(default_factory=dict)
    problems: list[UnusableImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """For the user."""
    doubts: list[FileWarning] = field(default_factory=list)
    reported: set[Path] = field(default_factory=set)
    """Files that a problem or doubt already names."""
    labelled: bool = True
    """False: a folder of images without masks."""
    classes: tuple[str, ...] = ()
    """Class names from the data, the background first, if the card gives none."""
    reading: IntensityScaling = field(default_factory=IntensityScaling)
    """Black, white and channels with which the images are read, once decided."""
    um_per_px: float | None = None
    """Side of a pixel in micrometres, the same in all images that state one; None if they differ or none is stated."""
    reading_notes: list[str] = field(default_factory=list)

    @property
    def lines(self) -> tuple[str, ...]:
        """Notes and doubts for the user."""
        return (*self.notes, *self.reading_notes, *(doubt.line for doubt in self.doubts))

    def reject(self, kind: str, name: str, message: str, advice: str) -> None:
        """Adds a problem."""
        self.problems.append(UnusableImage(kind=kind, name=name, message=message, advice=advice))

    def reject_outside(self, name: str) -> None:
        """Adds the problem of a path that leaves the folder."""
        self.reject("outside", name, f"{self.root.name}: {quote_name(name)} leads out of the folder", LINKS_ADVICE)

    def raise_first(self) -> None:
        """Raises the first problem as a CellbenchError, with the number of others of its kind."""
        if self.problems:
            first = self.problems[0]
            raise CellbenchError(first.describe(sum(other.kind == first.kind for other in self.problems) - 1))

    def images_in(self, folder: Path) -> dict[str, Path]:
        """The images of a folder by stem, sorted by name. A link that leaves ``root``, or a stem that two share, is a problem."""
        found: dict[str, Path] = {}
        if not is_inside(self.root, folder):
            self.reject_outside(str(folder.relative_to(self.root)))
            return found
        for entry in _entries(folder):
            stem, extension = os.path.splitext(to_nfc(entry.name))
            if extension.lower() not in EXTENSIONS or entry.name.startswith("."):
                continue
            path = Path(entry.path)
            if entry.is_symlink() and not is_inside(self.root, path):
                self.reject_outside(str(path.relative_to(self.root)))
            elif not entry.is_file():
                continue
            elif stem in found:
                message = f"{folder}: '{found[stem].name}' and '{entry.name}' share a stem, so they share a mask"
                self.reject("same-stem", entry.name, message, "Rename one.")
            else:
                found[stem] = path
        return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not _is_clutter(entry.name)), key=lambda entry: entry.name)


# --- unused files -----------------------------------------------------------------------------------------------------------------------

NO_SAMPLE = "image of no sample"
CLUTTER = frozenset({".ds_store", "thumbs.db", "desktop.ini", "__macosx"})
"""Lower-case names of files that file managers and archivers create; ignored without a note, like Apple's ``._NAME``."""


@dataclass(frozen=True, kw_only=True)
class IgnoredFile:
    """A file, or a whole folder, that is not used."""

    path: Path
    reason: str
    """A word or two that follow a number: ``.dcm``, ``hidden``."""


def count_reasons(left: Iterable[IgnoredFile]) -> str:
    """The number of files for each reason, the most frequent first.

    >>> count_reasons([IgnoredFile(path=Path("a.dcm"), reason=".dcm"), IgnoredFile(path=Path("b.dcm"), reason=".dcm")])
    '2 .dcm'
    """
    return ", ".join(f"{num} {reason}" for reason, num in Counter(one.reason for one in left).most_common())


def files_below(where: Path, endings: Collection[str] = EXTENSIONS) -> tuple[list[Path], list[IgnoredFile], set[Path]]:
    """All files of a folder and its subfolders with these endings, sorted; all other files; and the real folders that were searched.

    ``where``: the folder, or a pattern like ``masks/*.instances.png`` (:func:`pattern_root`), which files match by the end of their path, as in
    subfolders, or by a folder that they lie in. Links to folders are followed after all real folders, and each real folder is searched once, so that
    cycles end.
    """
    root = pattern_root(where)
    found: list[Path] = []
    left: list[IgnoredFile] = []
    seen: set[Path] = set()
    folders, links = [root or where], list[Path]()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        real = here.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = _entries(here)
        except OSError as error:
            left.append(IgnoredFile(path=here, reason=f"folder that cannot be opened ({error.strerror})"))
            continue
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                left.append(IgnoredFile(path=path, reason="hidden folder" if entry.is_dir() else "hidden"))
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif reason := why_unreadable(entry, endings):
                left.append(IgnoredFile(path=path, reason=reason))
            else:
                found.append(path)
    if root is not None:
        named, pattern = set(map(Path, glob.glob(str(where), recursive=True))), str(where.relative_to(root))
        found, left = [path for path in found if path.relative_to(root).match(pattern) or named & {path, *path.parents}], []
    return sorted(found), sorted(left, key=lambda one: one.path), seen


def pattern_root(where: Path) -> Path | None:
    """The folder in which a pattern is looked for; None for what exists, and where there is no such folder.

    >>> str(pattern_root(Path("*/a.png"))), pattern_root(Path("a.png"))
    ('.', None)
    """
    first = next((k for k, part in enumerate(where.parts) if set(part) & set("*?[")), None)
    if first is None or where.exists():
        return None
    root = Path(*where.parts[:first])
    return root if root.is_dir() else None


def _is_clutter(name: str) -> bool:
    return name.lower() in CLUTTER or name.startswith("._")


def why_unreadable(entry: os.DirEntry[str], endings: Collection[str] = EXTENSIONS) -> str:
    """Why an entry of a folder is not read as a file with one of these endings; empty if it is."""
    if not entry.is_file():
        return "link that leads nowhere" if entry.is_symlink() else "no regular file"
    extension = os.path.splitext(entry.name)[1]
    return "" if extension.lower() in endings else (extension if extension.isprintable() else ascii(extension)) or "without an ending"


def other_files(folder: Path) -> list[Path]:
    """The files directly in a folder that are not read as images, by name."""
    return [Path(entry.path) for entry in _entries(folder) if not entry.is_dir() and why_unreadable(entry)]


def find_unused(listing: Listing, known: Iterable[str]) -> tuple[list[FileWarning], list[str]]:
    """Reports files of a data folder that are in no sample: as a doubt in folders with samples, elsewhere as a note.

    ``known``: names of files that configure how the folder is read. A folder without samples is named as a whole, unless it has the name of a folder
    of images.
    """
    root = listing.root
    samples = [sample for part in listing.parts.values() for sample in part]
    pictures = {sample.image for sample in samples}
    used = pictures | {sample.mask for sample in samples} | {path for sample in samples for path in getattr(sample.truth, "paths", ())}
    used |= {sample.regions for sample in samples if sample.regions is not None}
    used_tops = {path.relative_to(root).parts[0] for path in used if path.is_relative_to(root)}
    image_folders, folder_names = {path.parent for path in pictures}, {path.parent.name for path in pictures if path.parent != root}
    sample_folders = image_folders | {path.parent for path in used}
    lost: list[IgnoredFile] = []
    elsewhere: Counter[str] = Counter()
    for entry in _entries(root):
        path = Path(entry.path)
        if not entry.is_dir():
            is_split = entry.name.startswith("splits") and entry.name.endswith(".json")
            if not is_split and path not in used and path not in listing.reported and entry.name not in known:
                if root in sample_folders:
                    lost.append(IgnoredFile(path=path, reason=why_unreadable(entry) or NO_SAMPLE))
                else:
                    elsewhere[entry.name] += 1
        elif entry.name.startswith("."):
            continue
        elif entry.name not in used_tops and not any((path / name).is_dir() for name in folder_names):
            elsewhere[f"{entry.name}/"] += 1
        elif not entry.is_symlink() or is_inside(root, path):  # a link that leaves the folder is a separate problem
            images, left, _ = files_below(path)
            for one in [*left, *(IgnoredFile(path=image, reason=NO_SAMPLE) for image in images if image not in used)]:
                if one.path in listing.reported or one.path in used or one.path.name in known:
                    continue
                here = one.path.parent
                chosen = listing.layout.startswith("manifest") and one.reason == NO_SAMPLE  # a manifest may select images
                if not chosen and (here in sample_folders or image_folders & set(one.path.parents) or here.name in folder_names):
                    lost.append(one)
                else:
                    elsewhere[f"{here.relative_to(root).as_posix()}/"] += 1
    doubts = []
    if lost:
        message = f"Files that are not used: {count_reasons(lost)}. Convert them, or move them out"
        names = tuple(printable_path(one.path.relative_to(root).as_posix()) for one in lost)
        doubts.append(FileWarning(kind="left out", message=message, names=names))
    shown = first_names([quote_name(name) + f" ({num} files)" * (num > 1) for name, num in elsewhere.items()], 10)
    return doubts, [f"not used in {root.name}: {shown}"] if elsewhere else []


# --- paths ------------------------------------------------------------------------------------------------------------------------------


def is_inside(root: Path, path: Path) -> bool:
    """Whether a path, its links followed, lies in ``root``; with ``CELLBENCH_FOLLOW_LINKS=1`` links may lead anywhere."""
    if os.environ.get("CELLBENCH_FOLLOW_LINKS") == "1":
        return True
    return path.resolve().is_relative_to(root.resolve())


def resolve_inside(root: Path, name: str) -> Path | None:
    r"""The file of a relative name, with / or \\ between folders; None if it would leave ``root``."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not name or "\0" in name or name[0] in "/\\" or ".." in parts or ":" in (parts or ("",))[0]:
        return None
    try:
        if any(len(os.fsencode(part)) > 255 for part in parts) or len(parts) > 64:  # no file system has such names
            return None
    except UnicodeEncodeError:  # a lone surrogate, as JSON can contain
        return None
    path = _on_disk(root, parts)
    return path if is_inside(root, path) else None


def _on_disk(root: Path, parts: Sequence[str]) -> Path:
    """The path of a relative name as stored on disk, which may use another Unicode form of the name."""
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


def unique_names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each relative path: the file name; if two share it, the path with ``__`` between folders; if that is taken, the path."""
    last = [readable(PurePosixPath(path).name) for path in paths]
    twice = {name for name, num in Counter(last).items() if num > 1}
    out = {path: readable(path.replace("/", "__")) if name in twice else name for path, name in zip(paths, last, strict=True)}
    again = {name for name, num in Counter(out.values()).items() if num > 1}  # a/b.png beside a__b.png
    return {path: path if name in again else name for path, name in out.items()}
