"""The numbers of small grids are those that are written down, as long as the numerics have the same version."""

from __future__ import annotations

import json

import golden
import pytest

from cellbench.config.run import NUMERICS_VERSION

WRITTEN = json.loads(golden.FILE.read_text())


def test_the_written_numbers_are_of_these_numerics():
    assert WRITTEN["numerics"] == NUMERICS_VERSION, "NUMERICS was raised: write new numbers with `python tests/helpers/golden.py`"


@pytest.mark.parametrize("name", golden.GRIDS)
def test_a_grid_gives_the_written_numbers(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    found = golden.numbers(name, tmp_path)
    assert found.keys() == WRITTEN[name].keys()
    for run, row in WRITTEN[name].items():
        assert found[run].keys() == row.keys(), run
        wrong = {
            k: (found[run][k], value) for k, value in row.items() if found[run][k] != pytest.approx(value, abs=golden.tolerance(name, k))
        }
        assert not wrong, f"{run}: {wrong}. If the numerics changed on purpose, raise NUMERICS and run `python tests/helpers/golden.py`"
