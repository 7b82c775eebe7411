"""``doctor --services`` against real servers on loopback (PostgreSQL if installed), and against none."""

from __future__ import annotations

import glob
import http.server
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from experiment_files import SEARCH
from small_data import ROOT

from cellbench.run import main


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def doctor(monkeypatch, capsys):
    """Calls ``doctor --services`` in such an environment; gives its exit code and what it printed, a line a service."""

    def ask(**environment: str) -> tuple[int, dict[str, str]]:
        for name in ("MLFLOW_TRACKING_URI", "OPTUNA_STORAGE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code = main(["doctor", "--services"])
        return code, {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}

    return ask


@pytest.fixture
def server():
    """An address that answers ``/version`` as MLflow's server does; the version can be set."""

    class Version(http.server.BaseHTTPRequestHandler):
        text = importlib.metadata.version("mlflow")

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.text.encode())

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    there = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Version)
    threading.Thread(target=there.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{there.server_port}", Version
    there.shutdown()
    there.server_close()


def _program(name: str) -> str | None:
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None)


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory):
    """The address of a PostgreSQL on loopback with a password and the databases ``mlflow`` and ``optuna``."""
    initdb, postgres = _program("initdb"), _program("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed: pip install 'cellbench[postgresql]'")
    folder = tmp_path_factory.mktemp("postgresql")
    (folder / "password").write_text("s3cret\n")
    anyone: list[str] = []
    if os.getuid() == 0:  # which PostgreSQL refuses to run as
        shutil.chown(folder, "postgres")
        shutil.chown(folder / "password", "postgres")
        for parent in folder.parents:  # pytest's own folders are closed to others, one more of them where it runs in several processes
            if parent == Path(tempfile.gettempdir()):
                break
            parent.chmod(parent.stat().st_mode | 0o011)
        anyone = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    port = free_port()
    make = [initdb, "-D", str(folder / "data"), "-U", "lab", "-A", "scram-sha-256", "--pwfile", str(folder / "password"), "--no-sync"]
    subprocess.run([*anyone, *make], check=True, capture_output=True, cwd=folder)
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder, "fsync": "off"}
    flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    running = subprocess.Popen([*anyone, postgres, "-D", str(folder / "data"), *flags], cwd=folder, stderr=subprocess.DEVNULL)
    address = f"postgresql://lab:s3cret@127.0.0.1:{port}"
    try:
        _make_databases(address)
        yield address
    finally:
        running.send_signal(signal.SIGINT)  # at once: SIGTERM would wait until each connection of a pool is given up
        running.wait(60)


def _make_databases(address: str) -> None:
    import psycopg

    end = time.monotonic() + 30
    while True:
        try:
            connection = psycopg.connect(f"{address}/postgres")
            break
        except psycopg.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    connection.autocommit = True
    for name in ("mlflow", "optuna"):
        connection.cursor().execute(f"CREATE DATABASE {name}")
    connection.close()


def test_an_empty_environment_passes(doctor, tmp_path: Path):
    code, lines = doctor()
    assert code == 0
    assert "created by the first grid" in lines["MLflow"]
    assert not (tmp_path / "mlflow.db").exists()


def test_a_responding_server_passes_and_another_minor_version_fails(doctor, server):
    address, version = server
    code, lines = doctor(MLFLOW_TRACKING_URI=address)
    assert code == 0
    assert f"answers, MLflow {version.text}" in lines["MLflow"]
    version.text = "2.1.0"
    code, lines = doctor(MLFLOW_TRACKING_URI=address)
    assert code == 1
    assert "WRONG" in lines["MLflow"]
    assert "2.1.0" in lines["MLflow"]


def test_a_server_that_refuses_its_own_name_fails_with_the_remedy(doctor, server):
    address, version = server

    def refuse(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(403)
        handler.end_headers()
        handler.wfile.write(b"Invalid Host header - possible DNS rebinding attack detected")

    version.do_POST = refuse
    code, lines = doctor(MLFLOW_TRACKING_URI=address)
    assert code == 1
    assert "--allowed-hosts NAME" in lines["MLflow"]


def test_an_unreachable_service_fails_and_its_password_is_not_shown(doctor):
    nobody = f"127.0.0.1:{free_port()}"
    code, lines = doctor(MLFLOW_TRACKING_URI=f"http://lab:s3cret@{nobody}", OPTUNA_STORAGE=f"postgresql://lab:s3cret@{nobody}/optuna")
    assert code == 1
    assert all("WRONG" in lines[service] for service in ("MLflow", "Optuna"))
    assert "s3cret" not in "".join(lines.values())


def test_a_shared_cache_is_written_and_read_and_a_missing_one_fails(doctor, tmp_path: Path):
    code, lines = doctor(CELLBENCH_CACHE_URL=f"file://{tmp_path / 'there'}")
    assert code == 0
    assert "gives them back" in lines["cache-url"]
    assert list((tmp_path / "there").iterdir()) == []
    code, lines = doctor(CELLBENCH_CACHE_URL="http://lab:s3cret@127.0.0.1:9/features")
    assert code == 1
    assert "WRONG" in lines["cache-url"]
    assert "s3cret" not in lines["cache-url"]


def test_postgresql_is_queried_and_two_services_in_one_database_fail(doctor, postgresql):
    mlflow, optuna = f"{postgresql}/mlflow", f"{postgresql}/optuna"
    code, lines = doctor(MLFLOW_TRACKING_URI=mlflow, OPTUNA_STORAGE=optuna)
    assert code == 0, lines
    assert "answers, postgresql" in lines["MLflow"]
    assert "s3cret" not in "".join(lines.values())
    code, lines = doctor(MLFLOW_TRACKING_URI=mlflow, OPTUNA_STORAGE=mlflow)
    assert code == 1
    assert "createdb optuna" in lines["Optuna"]
    code, lines = doctor(OPTUNA_STORAGE=f"{postgresql}/absent")
    assert code == 1
    assert "absent" in lines["Optuna"]
    code, lines = doctor(OPTUNA_STORAGE=optuna.replace("s3cret", "wr0ng"))
    assert code == 1
    assert "wr0ng" not in "".join(lines.values())


def test_a_search_on_postgresql_resumes_and_writes_its_password_nowhere(small_folder, tmp_path, monkeypatch, postgresql, capsys):
    import psycopg

    Path("sought.toml").write_text(SEARCH.format(trials=4, batch=2))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{postgresql}/mlflow")
    call = ["search", "sought.toml", "--data", str(small_folder), "--device", "cpu", "--storage", f"{postgresql}/optuna"]
    monkeypatch.setattr("sys.argv", ["cellbench", *call])
    for num in ("2", "4"):
        assert main([*call, "--trials", num]) == 0
    printed = "".join(capsys.readouterr())
    with psycopg.connect(f"{postgresql}/optuna") as optuna, psycopg.connect(f"{postgresql}/mlflow") as mlflow:
        trials = optuna.execute("SELECT number, state FROM trials ORDER BY number").fetchall()
        assert [number for number, _ in trials] == [0, 1, 2, 3]
        assert {state for _, state in trials} <= {"COMPLETE", "PRUNED"}
        runs = mlflow.execute("SELECT value FROM tags WHERE key = 'optuna.trial' ORDER BY value").fetchall()
        assert [value for (value,) in runs] == ["0", "1", "2", "3"]
        kept = str([mlflow.execute(f"SELECT * FROM {table}").fetchall() for table in ("tags", "params", "experiment_tags", "runs")])
        kept += str(optuna.execute("SELECT * FROM study_user_attributes").fetchall())
    files = [path for path in [*(tmp_path / "mlruns").rglob("*"), *tmp_path.glob("*.toml")] if path.is_file()]
    assert any(path.name == "report.html" for path in files)
    assert "s3cret" not in printed + kept
    assert not [path for path in files if b"s3cret" in path.read_bytes()]


def test_the_composed_services_listen_on_loopback_and_contain_no_password():
    import yaml

    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert all(port.startswith("${CELLBENCH_BIND:-127.0.0.1}:") for one in services.values() for port in one["ports"])
    assert services["postgresql"]["environment"]["POSTGRES_PASSWORD"].startswith("${CELLBENCH_DB_PASSWORD:?")
    assert "${CELLBENCH_DB_PASSWORD}@" in services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    assert "${CELLBENCH_SERVER:-localhost}:*" in services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert f"mlflow=={importlib.metadata.version('mlflow')}" in services["mlflow"]["command"]
