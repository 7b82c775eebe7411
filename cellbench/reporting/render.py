"""Writes a report's records in each format: one self-contained HTML page, Markdown, CSV, LaTeX, and the note for MLflow.

The page needs no network: figures are embedded. Jinja2 escapes every text in it.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import jinja2
from PIL import Image

from cellbench.background import BackgroundCalls
from cellbench.escaping import escape_markdown, to_csv
from cellbench.files import make_folder, os_errors_as
from cellbench.reporting.leaderboard import LeaderboardRow, format_row
from cellbench.reporting.report_data import Page, ReportData, Table, draw
from cellbench.tracking.ui_view import padded_table

MAX_PAGE_ROWS = 200
"""Rows of a table in the page; its CSV file has them all."""
MAX_NOTE_MODELS = 15
MAX_NOTE_CHARS = 7900
NOTE_COLUMNS = ("model", "seeds", "Dice", "Dice/image", "95 %", "AP50", "train s")


def write_report_files(report: ReportData, folder: Path, drawing: BackgroundCalls | None = None) -> Path:
    """Writes page, tables and figures into a folder, which is made if need be; returns the page's path. Raises CellbenchError.

    ``drawing``: processes that draw the figures, if they have started already.
    """
    drawn = [drawing.submit(draw, figure) for figure in report.figures()] if drawing is not None and drawing.started else []
    make_folder(folder / "figures")
    with os_errors_as(f"writing the report to {folder}"):
        for table in report.tables():
            (folder / f"{table.name}.csv").write_text(to_csv(table.headings, table.rows), encoding="utf-8")
            (folder / f"{table.name}.md").write_text(to_markdown(table) + "\n", encoding="utf-8")
            (folder / f"{table.name}.tex").write_text(to_latex(table), encoding="utf-8")
        for figure, there in zip(report.figures(), drawn, strict=False):
            if there.exception() is None:  # else it is drawn, or fails, here
                figure.take(there.result())
        for figure in report.figures():
            (folder / "figures" / f"{figure.name}.png").write_bytes(figure.drawn.png)
        (folder / "report.html").write_text(to_html(report), encoding="utf-8")
    return folder / "report.html"


def to_html(page: Page) -> str:
    """The whole page."""
    template = _templates().get_template("page.html.j2")
    return template.render(
        page=page,
        max_rows=MAX_PAGE_ROWS,
        without_empty=_without_empty_columns,
        column_kinds=_column_kinds,
        fold_class=_fold_class,
        fold_widths=(*FOLD_WIDTHS_PX, 0),
    )


def to_note(
    *, question: str, data: str, verdict: Sequence[str], rows: Sequence[LeaderboardRow], skipped: Mapping[str, str], picture: str = ""
) -> str:
    """The report in short, as Markdown for MLflow. ``picture``: the address of a figure."""
    cells = [format_row(row) for row in rows[:MAX_NOTE_MODELS]]
    table = padded_table(NOTE_COLUMNS, [[line[name] for name in NOTE_COLUMNS] for line in cells])
    text = _templates().get_template("note.md.j2").render(
        question=question,
        data=data,
        verdict=verdict,
        table=table,
        num_more=max(0, len(rows) - MAX_NOTE_MODELS),
        skipped=skipped,
        picture=picture,
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text).strip()[:MAX_NOTE_CHARS]


def to_markdown(table: Table) -> str:
    """The first column is text."""
    lines = [table.headings, *table.rows]
    head, *rows = ("| " + " | ".join(map(escape_markdown, line)) + " |" for line in lines)
    return "\n".join([head, "|---|" + "---:|" * (len(table.headings) - 1), *rows])


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "≈": r"$\approx$",
    "×": r"$\times$",
    **{one: f"\\{one}" for one in "&%$#_{}"},
}


def to_latex(table: Table) -> str:
    r"""A table for a paper; needs ``\usepackage{booktabs}``."""

    def row(cells: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in cells) + r" \\"

    columns = "l" + "r" * (len(table.headings) - 1)
    rows = "\n".join(map(row, table.rows))
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{row(table.headings)}\n\\midrule\n{rows}\n\\bottomrule\n\\end{{tabular}}\n"


@cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
    )
    templates.filters["data_uri"] = _data_uri
    return templates


def _data_uri(picture: bytes, *, jpeg: bool = False) -> str:
    kind = "svg+xml" if picture.lstrip().startswith(b"<") else "png"
    if jpeg:
        out = io.BytesIO()
        Image.open(io.BytesIO(picture)).convert("RGB").save(out, "JPEG", quality=85)
        picture, kind = out.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


PLACE = "#"
"""The heading of a column of places in the leaderboard."""


def _without_empty_columns(table: Table) -> Table:
    kept = [k for k, cells in enumerate(zip(*table.rows, strict=True)) if any(cells)]
    return replace(
        table,
        headings=[table.headings[k] for k in kept],
        rows=[[row[k] for k in kept] for row in table.rows],
        sentence_columns=[new for new, old in enumerate(kept) if old in table.sentence_columns],
    )


def _column_kinds(table: Table) -> list[str]:
    """The classes of each column: numbers stand on the right, words on the left, sentences may break into lines; the first words are a row's name."""
    columns = zip(*table.rows, strict=True)
    kinds = ["text" if k in table.sentence_columns else "words" if _is_words(cells) else "" for k, cells in enumerate(columns)]
    first = int(table.headings[0] == PLACE)
    if first:
        kinds[0] = "place"
    if len(kinds) > first:
        kinds[first] = f"{kinds[first] or 'words'} name"
    return kinds


FOLD_WIDTHS_PX = (480, 640, 800, 960)
"""Widths of a screen at which tables change to blocks; the widest tables always are."""
PAGE_WIDTH_PX = 950


def _fold_class(table: Table) -> str:
    """The class of a table: up to which width of the screen it is too wide, and its rows are shown as blocks. Empty for one that fits a phone."""
    width = 0.0
    for k, (heading, cells, kind) in enumerate(zip(table.headings, zip(*table.rows, strict=True), _column_kinds(table), strict=True)):
        longest = max(map(len, cells))
        if k in table.sentence_columns or "words" in kind:
            longest = min(longest, 28)
        width += max(8.0 * longest, *(9.0 * len(word) for word in heading.split())) + 16  # in wide letters, headings bold
    if width <= 360:
        return ""
    if width > PAGE_WIDTH_PX:
        return "fold-0"
    return f"fold-{next((one for one in FOLD_WIDTHS_PX if width < one - 40), FOLD_WIDTHS_PX[-1])}"


_NUMBER = re.compile(r"[<>≈~±]?\s*[-+−–]?\.?\d[\d.,]*(e[-+]\d+)?(\s|%|$)")


def _is_words(cells: Sequence[str]) -> bool:
    """Whether most cells of a column are no numbers; ranges and numbers with a unit are numbers, hashes are words.

    >>> _is_words(["better", "", "no"]), _is_words(["0.96 to 0.97", "213 k", "< 0.001", "skipped"]), _is_words(["3f9a", "77e1"])
    (True, False, True)
    """
    filled = [cell.strip() for cell in cells if cell.strip(" –-")]
    return 2 * sum(not _NUMBER.match(cell) for cell in filled) > len(filled)
