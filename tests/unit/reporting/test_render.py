"""Records in each format: what must be escaped, and how columns are aligned."""

from __future__ import annotations

from cellbench.reporting.render import to_html, to_latex
from cellbench.reporting.report_data import Page, Section, Table


def test_latex_escapes_what_it_must():
    assert to_latex(Table(headings=["a_b", "±"], rows=[["50 % & more", "$x^2$ #1 {y} \\z ~"]])).splitlines()[4] == (
        r"50 \% \& more & \$x\textasciicircum{}2\$ \#1 \{y\} \textbackslash{}z \textasciitilde{} \\"
    )


def test_text_is_left_aligned_and_numbers_right_aligned_in_tables():
    table = Table(headings=("model", "verdict", "p", "run"), rows=[("a", "better", "< 0.001", "3f9a"), ("b", "worse", "0.40", "77e1")])
    made = to_html(Page(title="t", subtitle="", verdict=[], sections=[Section("a", [table])]))
    assert (
        '<td class="words" data-label="verdict">worse</td><td data-label="p">0.40</td><td class="words" data-label="run">77e1</td>' in made
    )
    assert '<th class="words">verdict</th><th>p</th>' in made
