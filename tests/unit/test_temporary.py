"""Temporary folders that a killed process left are removed by the next command, those of live ones stay."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from cellbench.errors import SystemFault
from cellbench.liveness import owner_as_file_name, this_owner
from cellbench.temporary import TemporaryFolder, remove_abandoned


def test_folders_of_dead_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    host, _, identity = this_owner().split(":")
    dead = tmp_path / f"cellbench-{owner_as_file_name(f'{host}:{2**22 + 1}:{identity}')}-ab12cd_3"
    foreign = tmp_path / "cellbench-notes"
    for folder in (dead, foreign):
        folder.mkdir()
        (folder / "x").write_text("x")
    with TemporaryFolder() as name:
        assert remove_abandoned() == 1
        assert Path(name).is_dir()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([Path(name).name, "cellbench-notes"])
    assert [path.name for path in tmp_path.iterdir()] == ["cellbench-notes"]


def test_a_temporary_folder_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(SystemFault, match="making a temporary folder in"):
        TemporaryFolder()


def test_a_folder_that_cannot_be_removed_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def work() -> None:
        with TemporaryFolder() as name:
            (Path(name) / "x").write_text("x")
            for call in ("unlink", "rmdir", "chmod"):
                monkeypatch.setattr(os, call, refuse)
            raise SystemFault("no space")

    with pytest.raises(SystemFault, match="no space"):
        work()
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
