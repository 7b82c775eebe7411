"""``doctor --services``: checks that the configured services respond in a compatible version: MLflow, databases, caches and Ray.

Reads only the environment (``MLFLOW_TRACKING_URI``, ``OPTUNA_STORAGE``, ``CELLBENCH_CACHE``, ``CELLBENCH_CACHE_URL``, ``RAY_ADDRESS``). Prints no
password, and removes the files that it writes.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cellbench.console import Column, format_table, say, sentence_width
from cellbench.errors import CellbenchError, one_line, redact_passwords
from cellbench.features.remote_cache import RemoteCache, shared_url
from cellbench.files import cache_dir, make_folder, os_errors_as
from cellbench.tracking.client import WRONG_HOST
from cellbench.tracking.store_address import store_file, store_uri

ANSWER_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A service, whether it works, and details or the remedy."""

    service: str
    good: bool
    text: str


def services() -> int:
    """Prints one line per service. Returns exit code 0, or 1 if one does not work."""
    found = findings()
    columns = [Column("service"), Column("state"), Column("details", folded=True)]
    rows = [(one.service, "ok" if one.good else "WRONG", one.text) for one in found]
    say("\n".join(format_table(columns, rows, room=sentence_width(), headings=False)))
    return 0 if all(one.good for one in found) else 1


def findings() -> list[Finding]:
    """The state of each service."""
    tracking, storage = store_uri(), os.environ.get("OPTUNA_STORAGE", "")
    found = [_check("MLflow", lambda: _tracking(tracking)), _check("Optuna", lambda: _storage(storage))]
    if "://" in storage and storage == tracking and not store_file(tracking):
        found.append(
            Finding(
                service="Optuna", good=False, text="shares MLflow's database, where their tables mix. Create another one: createdb optuna."
            )
        )
    found.append(_check("cache", _cache))
    if url := shared_url():
        found.append(_check("cache-url", lambda: _shared(url)))
    return [*found, _check("Ray", lambda: _ray(os.environ.get("RAY_ADDRESS", "")))]


def _check(service: str, ask: Callable[[], str]) -> Finding:
    try:
        return Finding(service=service, good=True, text=redact_passwords(ask()))
    except CellbenchError as error:
        return Finding(service=service, good=False, text=redact_passwords(str(error)))


def _tracking(uri: str) -> str:
    file = store_file(uri)
    if file is not None:
        return f"{file}, {'exists' if file.is_file() else 'created by the first grid'}; for this machine alone. MLFLOW_TRACKING_URI names a server."
    if not uri.startswith(("http://", "https://")):
        return _database(uri)
    theirs, ours = _get(f"{uri.rstrip('/')}/version", uri).strip(), importlib.metadata.version("mlflow")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise CellbenchError(f"{uri}: the server is MLflow {theirs}, this is {ours}. Install the same minor version on both.")
    # The version is shown to everyone; the calls of a grid are not.
    _get(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search", uri, {"max_results": 1})
    return f"{uri} answers, MLflow {theirs}."


def _get(url: str, uri: str, question: Mapping[str, object] | None = None) -> str:
    """What a server answers; ``question``: sent as JSON, for a call that takes one."""
    data = None if question is None else json.dumps(question).encode()
    # A login is sent as MLflow sends it, from the address or the environment.
    plain, headers = _without_login(url), {"Content-Type": "application/json"} | _login(uri)
    try:
        request = urllib.request.Request(plain, data, headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:  # noqa: S310
            text: bytes = answer.read(200)
            return text.decode(errors="replace")
    except urllib.error.HTTPError as error:
        text = error.read(200)
        if b"Invalid Host header" in text:
            raise CellbenchError(f"{uri}: {WRONG_HOST}") from None
        raise CellbenchError(
            f"{uri}: refuses a call ({one_line(error)}). Are the address, and MLFLOW_TRACKING_USERNAME and …_PASSWORD right?"
        ) from None
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise CellbenchError(f"{uri}: no answer ({one_line(error)}). Is `mlflow server` up, and MLFLOW_TRACKING_URI right?") from None


def _without_login(url: str) -> str:
    return re.sub(r"^(\w+://)[^/@]*@", r"\1", url)


def _login(uri: str) -> dict[str, str]:
    parts, get = urllib.parse.urlsplit(uri), os.environ.get
    user, password = parts.username or get("MLFLOW_TRACKING_USERNAME"), parts.password or get("MLFLOW_TRACKING_PASSWORD")
    if token := get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    if user is None:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password or ''}".encode()).decode()}


def _storage(url: str) -> str:
    if not url:
        return "OPTUNA_STORAGE is not set: searches are kept in a file in this folder, for this machine alone."
    return _database(url) if "://" in url else f"{url}, a file."


def _database(url: str) -> str:
    import sqlalchemy  # comes with MLflow; takes 0.3 s to import

    try:
        limit = {} if url.startswith(("mssql", "oracle", "sqlite")) else {"connect_timeout": round(ANSWER_S)}
        engine = sqlalchemy.create_engine(url, connect_args=limit)
        with engine.connect() as connection:
            return f"{url} answers, {engine.dialect.name} {'.'.join(map(str, connection.dialect.server_version_info or ()))}."
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise CellbenchError(
            f"{url}: {one_line(error).split(' (Background')[0][:200]}. Is the database up, made and named right?"
        ) from None
    except ModuleNotFoundError as error:
        raise CellbenchError(f"{url}: {error.name} is not installed. `pip install 'cellbench[postgresql]'`.") from None


def _cache() -> str:
    folder = make_folder(cache_dir())
    with os_errors_as(f"writing into the cache folder {folder}"), tempfile.NamedTemporaryFile(dir=folder):
        free = shutil.disk_usage(folder).free / 2**30
    nodes = "Nodes of a cluster may have others." if shared_url() else "On a cluster all nodes must share it."
    return f"{folder} can be written to, {free:.0f} GiB free. {nodes}"


def _shared(url: str) -> str:
    shared = RemoteCache(url, say)
    shared.probe()
    return f"{shared.shown} takes files and gives them back."


def _ray(address: str) -> str:
    if importlib.util.find_spec("ray") is None:
        return "not installed (pip install 'cellbench[ray]'); --workers N needs nothing more."
    version = importlib.metadata.version("ray")
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return f"Ray {version}; RAY_ADDRESS is not set: `--on ray` starts one here."
    try:
        with contextlib.closing(socket.create_connection((host, int(port)), timeout=ANSWER_S)):
            return f"Ray {version}; {address} answers."
    except OSError as error:
        raise CellbenchError(f"{address} does not answer ({error.strerror or error}). Is the cluster up, and its port open?") from None
