"""The tour: every cell of it runs, from an empty folder, and what it shows is kept small."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from small_data import ROOT

SHORTER = {
    '"epochs": 8': '"epochs": 1',
    '"crops_per_image": 6': '"crops_per_image": 2',
    '"num_train": 6, "num_test": 12': '"num_train": 3, "num_test": 4',
}
TOUR = ROOT / "experiments" / "tour.ipynb"


def shown(notebook: nbformat.NotebookNode) -> str:
    """All that its cells printed."""
    return "".join(one.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs)


def test_the_tour_runs_from_an_empty_folder_to_counted_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn_processes: None
) -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            for whole, shorter in SHORTER.items():
                cell.source = cell.source.replace(whole, shorter)
    assert all(any(shorter in cell.source for cell in notebook.cells) for shorter in SHORTER.values())
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path.parent))  # where it makes its folder
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    output = shown(notebook)
    assert "Best on average is" in output
    assert " cells cover " in output
    assert list(tmp_path.iterdir()) == []  # it writes into a folder of its own


def test_what_is_committed_of_it_is_small_and_whole() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    assert TOUR.stat().st_size < 300_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [one for cell in code for one in cell.outputs if one.output_type == "error"]
    assert " cells cover " in shown(notebook)
    pictures = [one for cell in code for one in cell.outputs if {"image/png", "image/jpeg"} & set(one.get("data", {}))]
    assert len(pictures) == 2  # the scores of each image, and the cells found in one
