"""A project that was copied or renamed: MLflow's SQLite store holds absolute paths, so every artifact would be lost. Found again here.

Only three columns hold them (measured on MLflow 3.17.2): ``experiments.artifact_location``, ``runs.artifact_uri`` and
``logged_models.artifact_location``. They are changed only where the recorded folder is gone and one of that name lies beside the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sqlite3
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlparse

from filelock import FileLock

from cellbench.errors import CellbenchError

COLUMNS = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))


def store() -> str:
    """The tracking URI, as MLflow takes it, without importing MLflow."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def store_file(uri: str | None = None) -> Path | None:
    """The SQLite file of the store; None for a server or another database."""
    uri = uri or store()
    if not uri.startswith("sqlite:///"):
        return None
    path = Path(uri.removeprefix("sqlite:///")).absolute()
    # MLflow writes its default with %20 for a space, and opens the folder with the space.
    return path if path.is_file() or "%" not in uri else Path(unquote(str(path)))


def present() -> None:
    """Raises CellbenchError where the store that is set is a SQLite file and not there: what only reads makes none."""
    file = store_file()
    if file is not None and not file.is_file():
        raise CellbenchError(f"there is no MLflow store at {file}. Go to the folder where `grid` was run, or run it here first.")


def lock(uri: str | None = None) -> FileLock:
    """One for each store and person: held while the store is made, healed, or runs are claimed."""
    uri = uri or store()
    file = store_file(uri)
    # The name of a file is for everybody to read, and an address may hold a password.
    key = re.sub(r"\W+", "-", str(file))[-150:] if file else hashlib.sha256(uri.encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"cellbench-{os.getuid() if hasattr(os, 'getuid') else 0}-{key}.lock")


def heal() -> list[str]:
    """Sets the places of artifacts right where the project was moved; says what was done, one sentence a folder."""
    path = store_file()
    if path is None or not path.is_file():
        return []
    with lock():
        try:
            return _healed(path)
        except sqlite3.Error as error:
            raise CellbenchError(f"{path}: MLflow's store cannot be read: {error}. Put a backup in its place, or move it away.") from None


def experiments(most: int = 8) -> list[tuple[str, str]]:
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
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        known = [(table, column) for table, column in COLUMNS if table in tables]
        places = {place for table, column in known for (place,) in connection.execute(f"SELECT DISTINCT {column} FROM {table}") if place}
        roots = sorted({root for place in places if (root := _root(place))})
        for root in roots:
            old = Path(_local(root))
            new = path.parent / old.name
            if old.is_dir() or not new.is_dir():
                continue
            fresh = new.as_uri() if root.startswith("file:") else str(new)
            with connection:
                for table, column in known:
                    # By length, not LIKE: a path may hold % and _.
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                        (fresh, len(root) + 1, len(root) + 1, root + "/"),
                    )
                    connection.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (fresh, root))
            told.append(f"this project was moved: artifacts that MLflow looked for in {old} are found in {new} again.")
    return list(dict.fromkeys(told))  # once, though a folder may be written as a path and as a URI


def _root(place: str) -> str | None:
    """The part of a place up to its last ``mlruns`` folder; None for what does not lie in one on this machine."""
    if not place.startswith(("file:", "/")):
        return None
    match = re.match(r"(.*/mlruns)(?:/|$)", place)
    return match[1] if match else None


def _local(place: str) -> str:
    return unquote(urlparse(place).path) if place.startswith("file:") else place
