"""A project that was copied, moved or renamed: MLflow's SQLite store holds absolute paths, so that artifacts would be lost, or those of a copy
would be written into the original. Set right here.

Only three columns hold them (measured on MLflow 3.17.2): ``experiments.artifact_location``, ``runs.artifact_uri`` and
``logged_models.artifact_location``. A store's artifacts are in the ``mlruns`` beside it. The recorded folder of an experiment is replaced by
the one there where that exists, or where the recorded one is gone; and it stays where people keep a store and its artifacts apart.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlparse

from cellbench.errors import CellbenchError
from cellbench.tracking.sqlite_store import store_file, store_lock

COLUMNS = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))










def fix_artifact_paths(uri: str | None = None) -> list[str]:
    """Sets the places of artifacts right where the project was copied or moved; says what was done, one sentence a folder.

    Raises CellbenchError for a copy that was made without its artifacts.
    """
    path = store_file(uri)
    if path is None or not path.is_file():
        return []
    with store_lock(uri):
        try:
            return _healed(path)
        except sqlite3.Error as error:
            raise CellbenchError(f"{path}: MLflow's store cannot be read: {error}. Put a backup in its place, or move it away.") from None


def experiment_names(most: int = 8) -> list[tuple[str, str]]:
    """Names and numbers of the newest experiments that a grid has described, read without MLflow."""
    path = store_file()
    if path is None or not path.is_file():
        return []
    query = (
        "SELECT e.name, e.experiment_id FROM experiments e JOIN experiment_tags t USING (experiment_id) "
        "WHERE t.key = 'mlflow.sharedViewState.leaderboard' AND e.lifecycle_stage = 'active' ORDER BY e.last_update_time DESC LIMIT ?"
    )
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
        return [(name, str(number)) for name, number in connection.execute(query, (most,))]


def _healed(path: Path) -> list[str]:
    told = []
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
        known, places = _places(connection)
        moves: dict[str, Path] = {}
        folders = sorted({folder for place in places if (folder := _folder(place))})
        roots = {folder: Path(_local(_root(folder) or "")) for folder in folders}  # a folder may be written as a path and as a URI
        for old_root in dict.fromkeys(roots.values()):
            new_root = path.parent / old_root.name
            if old_root.resolve() == new_root.resolve():
                continue
            ways = {
                folder: (old := Path(_local(folder)), new_root / old.relative_to(old_root))
                for folder in folders
                if roots[folder] == old_root
            }
            here = new_root.is_dir() and (not old_root.is_dir() or any(new.is_dir() for _, new in ways.values()))
            for folder, (old, new) in ways.items():
                if here and (new.is_dir() or not old.is_dir()):
                    moves[folder] = new
                elif (original := _original(old, old_root, path)) is not None:
                    raise CellbenchError(
                        f"{path}: is a copy of {original}, and its artifacts in {old} are that store's. Copy that folder to {new} too, or go to the original."
                    )
            if here:
                words = "copied" if old_root.is_dir() else "moved"
                told.append(f"this project was {words}: artifacts that MLflow looked for in {old_root} are found in {new_root} again.")
        with connection:
            for folder, new in moves.items():
                fresh = new.as_uri() if folder.startswith("file:") else str(new)
                for table, column in known:
                    # By length, not LIKE: a path may hold % and _.
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                        (fresh, len(folder) + 1, len(folder) + 1, folder + "/"),
                    )
                    connection.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (fresh, folder))
    return told


def _places(connection: sqlite3.Connection) -> tuple[list[tuple[str, str]], set[str]]:
    """The columns that hold places of artifacts in this store, and the places."""
    # A store that was never made to its end lacks some; `making` has the words for it.
    asked = "SELECT 1 FROM pragma_table_info(?) WHERE name = ?"
    known = [pair for pair in COLUMNS if connection.execute(asked, pair).fetchone()]
    return known, {place for table, column in known for (place,) in connection.execute(f"SELECT DISTINCT {column} FROM {table}") if place}


def _original(old: Path, old_root: Path, path: Path) -> Path | None:
    """The store that this one is a copy of: it lies beside the artifacts under the same name and knows the folder as its own."""
    store = old_root.parent / path.name
    if not old.is_dir() or not store.is_file() or store.samefile(path):
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True, timeout=20)) as connection:
            _, places = _places(connection)
    except sqlite3.Error:
        return None
    return store if any(folder and Path(_local(folder)) == old for folder in map(_folder, places)) else None


def _folder(place: str) -> str | None:
    """The folder of an experiment within ``mlruns`` that a place lies in, as it is written."""
    root = _root(place)
    return None if root is None else "/".join([root, *place.removeprefix(root).strip("/").split("/")[:1]]).rstrip("/")


def _root(place: str) -> str | None:
    """The part of a place up to its last ``mlruns`` folder; None for what does not lie in one on this machine."""
    if not place.startswith(("file:", "/")):
        return None
    match = re.match(r"(.*/mlruns)(?:/|$)", place)
    return match[1] if match else None


def _local(place: str) -> str:
    return unquote(urlparse(place).path) if place.startswith("file:") else place
