"""A project with a finished grid, for tests of reports and of the store."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a store that holds a small grid's runs."""
    import mlflow
    from finished_runs import EXPERIMENT, small_grid

    from cellbench.tracking.tracker import Tracker

    folder = tmp_path_factory.mktemp("made") / "project"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        mlflow.set_tracking_uri(None)
        small_grid(Tracker(EXPERIMENT))
    return folder


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    """A copy of that folder, with its paths fixed, to add runs to; it is the working folder."""
    from cellbench.tracking import relocate

    folder = tmp_path / "project"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    hidden = made.with_name("hidden")
    made.rename(hidden)  # paths are fixed only where the old folder is gone
    try:
        relocate.fix_artifact_paths()
    finally:
        hidden.rename(made)
    return folder
