"""Escapes text for formats with special characters: CSV, Markdown, the terminal. Names of files, classes and runs are untrusted data.

JSON, TOML, HTML, SQL parameters and shell lines have their own writers and are not handled here.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""A spreadsheet evaluates a cell that begins with one of these, quoted or not."""


def to_csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    r"""Rows with a heading, comma-separated, each line ended by a newline.

    Text that a spreadsheet would evaluate gets a leading apostrophe (OWASP, CSV injection); numbers do not. Undecodable
    bytes of a file's name are written as ``\\xNN``.

    >>> print(to_csv(["image", "cells"], [["=1+1", 3], ["-0.5", -2]]), end="")
    image,cells
    '=1+1,3
    -0.5,-2
    """
    buffer = io.StringIO()
    for row in (columns, *rows):
        cells = [_cell(value) for value in row]
        # Python's writer quotes a carriage return only if its line terminator contains one.
        has_return = any("\r" in cell for cell in cells if isinstance(cell, str))
        csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL).writerow(cells)
    return buffer.getvalue()


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = readable(value)
    is_number = re.fullmatch(r"[+-]?(\d[\d ,]*)?(\.\d+)?([eE][+-]?\d+)?", text) is not None
    return f"'{text}" if text.startswith(FORMULA) and not is_number else text


def readable(text: str) -> str:
    r"""Text that every format can hold: bytes of a file's name that are not UTF-8 are written as ``\\xNN``.

    >>> readable("Pr\udcfcfung.png")
    'Pr\\xfcfung.png'
    """
    if text.isascii():
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, as JSON can contain
        return text.encode("utf-8", "backslashreplace").decode()


def escape_markdown(text: str) -> str:
    r"""Text for a line of Markdown or a cell of its tables.

    >>> escape_markdown("a|b *c* <d>")
    'a\\\\|b \\\\*c\\\\* &lt;d&gt;'
    """
    text = to_printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|$])", r"\\\1", text)


def to_printable(text: str) -> str:
    r"""One line that is safe on a terminal: characters that are not printable become Python's escapes, like ``\\n``.

    >>> to_printable("a\\nb\\x1b[2J")
    'a\\\\nb\\\\x1b[2J'
    """
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in readable(text))
