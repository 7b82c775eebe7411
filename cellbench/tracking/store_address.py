"""Addresses of stores, of MLflow and of Optuna: which file of SQLite an address means, or which kind of server. Nothing here needs MLflow."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

from cellbench.errors import CellbenchError

_SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)([^?]*)(\?.*)?", re.DOTALL)
"""Driver, file and options, as SQLAlchemy splits an address."""


def store_uri() -> str:
    """The tracking URI, as MLflow takes it, without importing MLflow."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def store_file(uri: str | None = None) -> Path | None:
    """The SQLite file of the store; None for a server or another database. Raises CellbenchError for a store in memory.

    >>> store_file("sqlite:////data/runs.db?timeout=60"), store_file("sqlite:///file:/data/runs.db?mode=ro&uri=true")
    (PosixPath('/data/runs.db'), PosixPath('/data/runs.db'))
    """
    uri = uri or store_uri()
    if not uri.startswith(("sqlite:", "sqlite+")):
        return None
    match = _SQLITE.fullmatch(uri)
    name, options = (match[2], match[3] or "") if match else ("", "")
    if name in ("", ":memory:") or name.startswith("file::memory:") or "mode=memory" in options:
        raise CellbenchError(f"{uri}: a store in memory is lost when the command ends. Name a file, as in sqlite:///mlflow.db.")
    if name.startswith("file:"):
        return Path(unquote(re.sub("^file:(//(?=/))?", "", name))).absolute()
    path = Path(name).absolute()
    # MLflow writes its default with %20 for a space, and opens the folder with the space.
    return path if path.is_file() or "%" not in name else Path(unquote(str(path)))


def renamed(uri: str, file: str) -> str:
    """The address of another file of SQLite with the same driver and options. ``file``: as it is written in an address.

    >>> renamed("sqlite:///runs.db?timeout=60", "/data/runs.db")
    'sqlite:////data/runs.db?timeout=60'
    """
    match = _SQLITE.fullmatch(uri)
    assert match is not None
    prefix = "file:" if match[2].startswith("file:") and not file.startswith("file:") else ""
    return f"{match[1]}{prefix}{file}{match[3] or ''}"


def file_part(uri: str) -> str:
    """The file of an address of SQLite as it is written there."""
    match = _SQLITE.fullmatch(uri)
    assert match is not None
    return match[2]


def local_path(uri: str) -> str:
    """The path of a ``file:`` URI, or of a plain path."""
    return url2pathname(urlparse(uri).path) if uri.startswith("file:") else uri


def absolute(uri: str) -> str:
    """The address as it is valid in every working folder."""
    file = store_file(uri)
    return uri if file is None else renamed(uri, str(file))


def is_http(uri: str) -> bool:
    return uri.startswith(("http:", "https:"))


def is_database_server(uri: str) -> bool:
    """Whether it is a database that is reached over the network, such as PostgreSQL."""
    return re.match(r"(postgresql|postgres|mysql|mariadb|mssql|oracle)(\+\w+)?://", uri) is not None


def require_store() -> None:
    """Raises CellbenchError if the configured store is a missing SQLite file. Commands that only read create none."""
    file = store_file()
    if file is not None and not file.is_file():
        raise CellbenchError(f"there is no MLflow store at {file}. Go to the folder where `grid` was run, or run it here first.")
