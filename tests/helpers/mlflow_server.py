"""MLflow's own server on loopback, for tests: started, stopped in the middle, and started again where it was."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class Server:
    """``address`` stays the same; what it holds lies in ``folder``."""

    def __init__(self, folder: Path, store: str = "") -> None:
        self._folder, self._store = folder, store or f"sqlite:///{folder / 'server.db'}"
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self._port = one.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._folder.mkdir(exist_ok=True, parents=True)
        call = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        call += ["--artifacts-destination", str(self._folder / "artifacts")]
        names = {"MLFLOW_BACKEND_STORE_URI": self._store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"} | names
        with (self._folder / "log.txt").open("a") as log:
            self._process = subprocess.Popen(call, env=environment, cwd=self._folder, stdout=log, stderr=log)
        end = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/version", timeout=5).close()
                return
            except OSError:
                over = self._process.poll() is not None or time.monotonic() > end
                assert not over, (self._folder / "log.txt").read_text()
                time.sleep(0.2)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
            self._process = None
