"""Fixes MLflow's SQLite store after a project was copied, moved or renamed.

The store contains absolute paths: artifacts of a moved project would be lost, and a copy would write to its original. Only three columns hold them
(measured on MLflow 3.17.2): ``experiments.artifact_location``, ``runs.artifact_uri`` and ``logged_models.artifact_location``. A store's artifacts
are in the ``mlruns`` folder beside it. The recorded folder of an experiment is replaced by the one there if that exists, or if the recorded one is
gone. A store that is kept apart from its artifacts does not change.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path

from cellbench.errors import CellbenchError
from cellbench.tracking.availability import connect, is_locked, locked_error, wait_until_unlocked, writable
from cellbench.tracking.store_address import local_path, store_file, store_uri
from cellbench.tracking.store_lock import file_lock

COLUMNS = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))


def fix_artifact_paths(uri: str | None = None) -> list[str]:
    """Fixes the paths of artifacts if the project was copied or moved; returns a sentence for each folder.

    Raises CellbenchError for a copy without its artifacts.
    """
    path = store_file(uri)
    if path is None or not path.is_file():
        return []
    with file_lock(uri or store_uri()):
        wait_until_unlocked(path)
        try:
            return _fix(path)
        except sqlite3.Error as error:
            if is_locked(error):
                raise locked_error(path) from None
            raise CellbenchError(
                f"{path}: MLflow's store cannot be read: {error}. If it is damaged, move it away and put a backup in its place."
            ) from None


def experiment_names(most: int = 8) -> list[tuple[str, str]]:
    """Names and ids of the newest experiments that have a leaderboard view, read without MLflow."""
    path = store_file()
    if path is None or not path.is_file():
        return []
    query = (
        "SELECT e.name, e.experiment_id FROM experiments e JOIN experiment_tags t USING (experiment_id) "
        "WHERE t.key = 'mlflow.sharedViewState.leaderboard' AND e.lifecycle_stage = 'active' ORDER BY e.last_update_time DESC LIMIT ?"
    )
    with contextlib.closing(connect(path)) as connection:
        return [(name, str(number)) for name, number in connection.execute(query, (most,))]


def _fix(path: Path) -> list[str]:
    fixed = []
    with contextlib.closing(connect(path)) as connection:
        known, places = _places(connection)
        moves: dict[str, Path] = {}
        folders = sorted({folder for place in places if (folder := _folder(place))})
        roots = {folder: Path(local_path(_root(folder) or "")) for folder in folders}  # a folder may be written as a path and as a URI
        for old_root in dict.fromkeys(roots.values()):
            new_root = path.parent / old_root.name
            if old_root.resolve() == new_root.resolve():
                continue
            new_paths = {
                folder: (old := Path(local_path(folder)), new_root / old.relative_to(old_root))
                for folder in folders
                if roots[folder] == old_root
            }
            here = new_root.is_dir() and (not old_root.is_dir() or any(new.is_dir() for _, new in new_paths.values()))
            for folder, (old, new) in new_paths.items():
                if here and (new.is_dir() or not old.is_dir()):
                    moves[folder] = new
                elif (original := _original(old, old_root, path)) is not None:
                    raise CellbenchError(
                        f"{path}: is a copy of {original}, and its artifacts in {old} belong to that store. Copy that folder to {new} too, or use the original."
                    )
            if here:
                how = "copied" if old_root.is_dir() else "moved"
                fixed.append(f"this project was {how}: MLflow now finds its artifacts in {new_root}, not in {old_root}.")
        if moves and not writable(path):
            raise CellbenchError(
                f"{path}: the project was moved or copied, so the paths in its store must be changed, but it can only be read. "
                f"Copy the folder {path.parent} to where you may write."
            )
        with connection:
            for folder, new in moves.items():
                fresh = new.as_uri() if folder.startswith("file:") else str(new)
                for table, column in known:
                    # By length, not LIKE: a path may hold % and _.
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608
                        (fresh, len(folder) + 1, len(folder) + 1, folder + "/"),
                    )
                    connection.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (fresh, folder))  # noqa: S608
    return fixed


def _places(connection: sqlite3.Connection) -> tuple[list[tuple[str, str]], set[str]]:
    """The columns that hold paths of artifacts in this store, and the paths."""
    # An incomplete store lacks some; ``sqlite_store`` reports it.
    asked = "SELECT 1 FROM pragma_table_info(?) WHERE name = ?"
    known = [pair for pair in COLUMNS if connection.execute(asked, pair).fetchone()]
    return known, {place for table, column in known for (place,) in connection.execute(f"SELECT DISTINCT {column} FROM {table}") if place}  # noqa: S608


def _original(old: Path, old_root: Path, path: Path) -> Path | None:
    """The store that this one is a copy of: it is beside the artifacts, has the same name, and records the folder as its own."""
    store = old_root.parent / path.name
    if not old.is_dir() or not store.is_file() or store.samefile(path):
        return None
    try:
        with contextlib.closing(connect(store, read_only=True)) as connection:
            _, places = _places(connection)
    except sqlite3.Error:
        return None
    return store if any(folder and Path(local_path(folder)) == old for folder in map(_folder, places)) else None


def _folder(place: str) -> str | None:
    """The folder of an experiment in ``mlruns`` that a path is in, as it is written."""
    root = _root(place)
    return None if root is None else "/".join([root, *place.removeprefix(root).strip("/").split("/")[:1]]).rstrip("/")


def _root(place: str) -> str | None:
    """The part of a path up to its last ``mlruns`` folder; None for a path outside of such a folder, or on another machine."""
    if not place.startswith(("file:", "/")):
        return None
    match = re.match(r"(.*/mlruns)(?:/|$)", place)
    return match[1] if match else None
