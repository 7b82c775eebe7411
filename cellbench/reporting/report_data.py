"""The content of a report as format-independent records. :mod:`sections` creates them; :mod:`render` writes them as HTML, CSV and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from cellbench.reporting.leaderboard import LeaderboardRow
    from cellbench.reporting.plots.style import Drawing


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text cells. With a ``name`` it is also a file of its own, in each format."""

    kind: ClassVar[str] = "table"
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    name: str = ""
    sentence_columns: Sequence[int] = ()
    """Columns that hold sentences and may break into lines."""
    page_columns: int | None = None
    """How many columns the page shows; None: all."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure that is drawn when the report is rendered."""

    kind: ClassVar[str] = "figure"
    name: str
    draw: Callable[[], Drawing]
    caption: str = ""

    @cached_property
    def png(self) -> bytes:
        """The figure as it is drawn once, for the page and for its file."""
        from cellbench.reporting.plots.style import to_png

        return to_png(self.draw())


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """A PNG artifact of a run. ``photo``: a micrograph, embedded as JPEG at a tenth of the size."""

    kind: ClassVar[str] = "image"
    name: str
    png: bytes
    photo: bool = False


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Micrographs with their captions, as PNG, in a grid. ``wide``: with fewer columns, for pictures of two images."""

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[tuple[str, bytes]]
    wide: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values; those with an empty value are not shown."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Text:
    """Paragraphs, one per item."""

    kind: ClassVar[str] = "text"
    sentences: Sequence[str]


@dataclass(frozen=True)
class Heading:
    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Folded:
    """A paragraph that is shown on a click on its title."""

    kind: ClassVar[str] = "folded"
    title: str
    text: str


@dataclass(frozen=True)
class Code:
    kind: ClassVar[str] = "code"
    text: str


Block = Table | Figure | StoredImage | Gallery | Facts | Text | Heading | Folded | Code


@dataclass(frozen=True)
class Section:
    """A section without blocks is not shown."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True)
class Page:
    """``verdict``: at most five sentences, the most important first; ``notes``: further ones; ``lead``: blocks before the first section."""

    title: str
    subtitle: str
    verdict: Sequence[str]
    notes: Sequence[str] = ()
    question: str = ""
    lead: Sequence[Block] = ()
    sections: Sequence[Section] = ()


@dataclass(frozen=True, kw_only=True)
class ReportData(Page):
    """A whole report."""

    leaderboard: Sequence[LeaderboardRow]
    """Of the first test set, which the verdict is about."""
    files_only: Sequence[Table] = ()
    """Tables that are written as files and not shown on the page."""

    def tables(self) -> Iterator[Table]:
        """The tables that are files."""
        blocks = [block for section in self.sections for block in section.blocks]
        yield from (block for block in (*blocks, *self.files_only) if isinstance(block, Table) and block.name)

    def figures(self) -> Iterator[Figure]:
        yield from (block for section in self.sections for block in section.blocks if isinstance(block, Figure))
