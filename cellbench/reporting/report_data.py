"""The content of a report as format-independent records. :mod:`sections` creates them; :mod:`render` writes them as HTML, CSV and so on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from cellbench.reporting.plots.by_name import find_plot

if TYPE_CHECKING:
    from cellbench.reporting.leaderboard import LeaderboardRow
    from cellbench.reporting.plots.style import Figure as Drawing


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text cells. With a ``name`` it is also a file of its own, in each format."""

    kind: ClassVar[str] = "table"
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    name: str = ""
    sentence_columns: Sequence[int] = ()
    """Columns that hold sentences and may break into lines."""
    open_rows: int | None = None
    """How many rows the page shows before the rest is unfolded; None: all."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure that is drawn when the report is rendered. Only a process that draws one imports matplotlib."""

    kind: ClassVar[str] = "figure"
    name: str
    plot: str
    """``module:name`` of a function in :mod:`cellbench.reporting.plots`. One with an argument ``narrow`` draws it again for a phone."""
    arguments: Sequence[object] = ()
    note: str = ""
    """Follows the caption that the figure has."""

    def draw(self, **named: object) -> Drawing:
        """The figure, laid out anew."""
        return find_plot(self.plot)(*self.arguments, **named)

    @cached_property
    def drawn(self) -> DrawnFigure:
        """All forms of the figure, laid out once for a page and once for a phone."""
        from cellbench.reporting.plots import style

        figure = self.draw()
        caption, width_px = " ".join(part for part in (style.get_caption(figure), self.note) if part), round(96 * figure.get_figwidth())
        picture = self._for_page(figure)
        png = style.to_png(figure, style.SHARP_DPI, self.note)
        for_phones = "narrow" in inspect.signature(find_plot(self.plot)).parameters
        narrow = self._for_page(self.draw(narrow=True), narrow=True) if for_phones else b""
        return DrawnFigure(picture=picture, png=png, narrow=narrow, caption=caption, width_px=width_px)

    def _for_page(self, figure: Drawing, **named: object) -> bytes:
        """SVG; where thousands of dots make it large, PNG if that is smaller."""
        from cellbench.reporting.plots import style

        svg = style.to_svg(figure)
        if len(svg) <= LARGE_SVG_BYTES:
            return svg
        other = self.draw(**named)
        style.set_caption(other)  # the page shows it
        return min(svg, style.to_png(other, style.SHARP_DPI), key=len)

    def take(self, drawn: DrawnFigure) -> None:
        """Takes the figure as :func:`draw` has drawn it elsewhere."""
        self.__dict__["drawn"] = drawn


def draw(figure: Figure) -> DrawnFigure:
    """All forms of a figure: a function that another process can call."""
    return figure.drawn


LARGE_SVG_BYTES = 100_000


@dataclass(frozen=True, kw_only=True)
class DrawnFigure:
    """A figure for the page as SVG or PNG; ``png``: for a file, with its caption inside."""

    picture: bytes
    narrow: bytes
    """For a phone; empty: the page scales the other one."""
    png: bytes
    caption: str
    width_px: int
    """Its natural width."""


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """A PNG artifact of a run. ``photo``: a micrograph, embedded as JPEG at a tenth of the size."""

    kind: ClassVar[str] = "image"
    name: str
    png: bytes
    photo: bool = False
    caption: str = ""


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
    folded: bool = False
    """Whether the page shows only its title until it is unfolded."""


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
        blocks = [*self.lead, *(block for section in self.sections for block in section.blocks)]
        yield from (block for block in (*blocks, *self.files_only) if isinstance(block, Table) and block.name)

    def figures(self) -> Iterator[Figure]:
        blocks = [*self.lead, *(block for section in self.sections for block in section.blocks)]
        yield from (block for block in blocks if isinstance(block, Figure))
