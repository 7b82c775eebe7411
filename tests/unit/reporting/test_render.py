"""Records in each format: what must be escaped, and how columns are aligned."""

from __future__ import annotations

import re

from cellbench.reporting.render import to_html, to_latex
from cellbench.reporting.report_data import Page, Section, Table, Text


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


def shown(**more):
    """The page of one table, without its style."""
    return to_html(Page(title="t", subtitle="", verdict=[], sections=[Section("a", [Table(**more)])])).partition("</style>")[2]


def test_a_table_is_folded_into_blocks_from_the_width_on_that_it_needs():
    cells = ["0.9123"] * 20
    found = [
        re.search(
            r'<table class="(.*?)">', shown(headings=["model", *"abcdefghijklmnopqrst"][: num + 1], rows=[["uni · fpn", *cells[:num]]])
        )[1]
        for num in (2, 5, 9, 20)
    ]
    assert found == ["", "fold-480", "fold-800", "fold-0"]


def test_columns_without_a_value_are_not_on_the_page():
    made = shown(headings=("model", "95 %", "p"), rows=[("a", "", "0.1"), ("b", "", "0.2")])
    assert "95 %" not in made
    assert ">0.2</td>" in made


def test_rows_beyond_the_open_ones_are_folded_and_none_is_lost():
    made = shown(headings=("model", "p"), rows=[(f"m{k}", "0.1") for k in range(30)], open_rows=12)
    before, _, folded = made.partition("<details")
    assert "m11<" in before
    assert "m12<" not in before
    assert "<summary>18 more</summary>" in folded
    assert "m29<" in folded


def test_a_folded_section_shows_its_title_only():
    made = to_html(Page(title="t", subtitle="", verdict=[], sections=[Section("Cost", [Text(["hidden"])], folded=True)]))
    assert "<details><summary><h2>Cost</h2></summary>" in made
