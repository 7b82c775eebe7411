"""Claims about output: lines are folded for a terminal alone, tables fit its width, and inside ``silent`` nothing is shown."""

from __future__ import annotations

import io
import os

import pytest

from cellbench.console import Column, fold, format_table, progress_bar, say, silent, warn

TABLE = [
    Column("model", cut=True),
    Column("Dice", right=True),
    Column("AP50", right=True, optional=1),
    Column("image/s", right=True, optional=2),
]
ROWS = [("vit-tiny-in1k · transposed-conv", "0.951", "0.81", "12.3"), ("otsu", "0.962", "0.84", "102")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_and_bars_are_shown_again_after_silence(capsys):
    with silent():
        say("first")
        assert list(progress_bar(range(3), desc="first", disable=False)) == [0, 1, 2]
    say("second")
    list(progress_bar(range(3), desc="second", disable=False))
    shown = capsys.readouterr()
    assert shown.out == "second\n"
    assert "second" in shown.err
    assert "first" not in shown.err


def test_a_bar_shows_nothing_in_a_pipe(capsys):
    assert list(progress_bar(range(3), desc="piped")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_sentence_is_folded_for_a_terminal_and_one_line_in_a_pipe(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda fallback: os.terminal_size((30, 24)))
    terminal, pipe = Terminal(), io.StringIO()
    sentence = "/a/long/path/that/is/never/broken/anywhere has no image with a mask"
    for file in (terminal, pipe):
        say(sentence, file=file)
    assert pipe.getvalue() == f"{sentence}\n"
    assert terminal.getvalue() == "/a/long/path/that/is/never/broken/anywhere\n  has no image with a mask\n"


def test_a_file_name_cannot_move_the_cursor(capsys):
    warn("skipped: a\x1b[2J.png")
    assert capsys.readouterr().err == "skipped: a\\x1b[2J.png\n"


@pytest.mark.parametrize(
    ("room", "headings"), [(80, ["model", "Dice", "AP50", "image/s"]), (47, ["model", "Dice", "AP50"]), (30, ["model", "Dice"])]
)
def test_a_table_fits_and_drops_its_least_important_columns_first(room, headings):
    lines = format_table(TABLE, ROWS, room=room)
    assert lines[0].split() == headings
    assert max(map(len, lines)) <= room


def test_names_are_shortened_only_where_no_column_is_left_to_drop():
    assert format_table(TABLE, ROWS, room=38)[2].startswith("vit-tiny-in1k · transposed-conv ")
    assert format_table(TABLE, ROWS, room=20)[2] == "vit-tiny-in1…  0.951"


def test_the_last_column_continues_below_itself():
    columns = [Column("name"), Column("what", folded=True)]
    text = "one two three four five six seven"
    assert format_table(columns, [("x", text)], room=30) == [
        "name  what",
        "-----------------------------",
        "x     one two three four five",
        "      six seven",
    ]


def test_folding_keeps_short_lines_and_their_indent():
    assert fold("  short\n  a longer line", 12) == "  short\n  a longer\n    line"
