"""One self-contained HTML page: plain, printable, no network. Text in, escaped; pictures embedded."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape

from PIL import Image

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.sub { color: #555; margin: 0 0 1.2rem; }
.verdict { background: #f2f6fa; border-left: 4px solid #0173b2; padding: .6rem 1rem; margin: 1rem 0; }
.verdict p { margin: .3rem 0; }
.verdict p:first-child { font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child, th.words, td.words, th.text, td.text { text-align: left; }
td.text { white-space: normal; min-width: 12rem; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid #888; }
figure { margin: 1rem 0; break-inside: avoid; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: 13px; }
nav { font-size: 13px; margin-bottom: 1rem; }
nav a { margin-right: .9rem; }
pre { background: #f5f5f5; padding: .6rem .8rem; overflow-x: auto; font-size: 12.5px; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: 14px; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
@media print {
  body { font-size: 10.5pt; margin: 0; max-width: none; } nav { display: none; }
  table { font-size: 7.5pt; } .wide { overflow: visible; }
  h2 { break-after: avoid; } tr { break-inside: avoid; }
}
"""


MOST_LINES = 200
"""Lines of a table in the page; the CSV has them all."""


def rows_not_shown(num: int) -> str:
    """A word about the lines of a table that are not shown."""
    return render_paragraphs([f"{num - MOST_LINES} more lines are in the CSV file."]) if num > MOST_LINES else ""


def render_page(title: str, subtitle: str, sections: Sequence[tuple[str, str]], lead: str = "") -> str:
    """The whole page. ``sections``: heading and HTML; empty ones are left out. ``lead``: HTML before the first."""
    kept = [(f"s{k}", heading, body) for k, (heading, body) in enumerate(sections) if body]
    contents = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in kept)
    bodies = "\n".join(f'<section id="{key}"><h2>{escape(heading)}</h2>\n{body}</section>' for key, heading, body in kept)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="sub">{escape(subtitle)}</p>\n<nav>{contents}</nav>\n{lead}\n{bodies}\n</body></html>\n'
    )


def render_paragraphs(sentences: Sequence[str], kind: str = "") -> str:
    inner = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<div class="{kind}">{inner}</div>' if kind and inner else inner


def render_table(headings: Sequence[str], lines: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    """Numbers to the right, words to the left, each heading as its column; the columns numbered in ``text`` hold sentences and may break."""
    if not lines:
        return ""
    kinds = [
        ' class="text"' if k in text else ' class="words"' if _is_words([line[k] for line in lines]) else "" for k in range(len(headings))
    ]
    head = "".join(f"<th{kind}>{escape(one)}</th>" for kind, one in zip(kinds, headings, strict=True))
    rows = ("".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, line, strict=True)) for line in lines)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


_NUMBER = re.compile(r"[<>≈~±]?\s*[-+−–]?\.?\d[\d.,]*(e[-+]\d+)?(\s|%|$)")


def _is_words(cells: Sequence[str]) -> bool:
    """Whether most of a column is other than numbers; ranges and numbers with a unit are numbers, hashes are words.

    >>> _is_words(["better", "", "cannot tell"]), _is_words(["0.96 to 0.97", "213 k", "< 0.001", "skipped"]), _is_words(["3f9a", "77e1"])
    (True, False, True)
    """
    told = [cell.strip() for cell in cells if cell.strip(" –-")]
    return 2 * sum(not _NUMBER.match(cell) for cell in told) > len(told)


def render_facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, one a line; empty values are left out."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs if value) + "</dl>"


def render_code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>" if text else ""


def render_picture(data: bytes, alt: str, caption: str = "", *, photo: bool = False) -> str:
    """A PNG as it is, or with ``photo`` as JPEG, which is a tenth of it for a micrograph."""
    kind = "png"
    if photo:
        out = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").save(out, "JPEG", quality=85)
        data, kind = out.getvalue(), "jpeg"
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">{told}</figure>'
