"""A stand-in for Zenodo and the Hugging Face hub on 127.0.0.1: serves, resumes, gates, cuts short, corrupts and answers with web pages.

Headers and error codes are those that huggingface_hub 2.4 reads (its ``utils/_http.py`` and ``file_download.py``); paths are the real ones.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
MEMBER = "hf_granted"  # the one token that opens gated files


@dataclass
class StandIn:
    """The files of the server, by path, and the requests it received."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut_at: list[int] = field(default_factory=list)
    """The next answers stop after so many bytes, though they promise the whole."""
    pause_s: float = 0.0
    """Between blocks, so that two downloads meet."""
    etags: dict[str, str] = field(default_factory=dict)
    """By path, where it is not the file's sha256: a lie, or the short hash of a file that the hub keeps in git itself."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range of every request."""

    def zenodo(self, name: str, data: bytes, md5: str | None = None) -> str:
        """Serves a file as Zenodo record 1; returns its address. ``md5`` lies about it, the empty string lists none."""
        self.files[f"/records/1/files/{name}"] = data
        if md5 != "":
            listed = [{"key": name, "size": len(data), "checksum": "md5:" + (md5 or hashlib.md5(data).hexdigest())}]
            self.files["/api/records/1"] = json.dumps({"files": listed}).encode()
        return f"{self.url}/records/1/files/{name}?download=1"

    def hub(self, repo: str, name: str, data: bytes, gated: bool = False) -> None:
        """Serves a file as the hub's main revision of ``repo``."""
        path = f"/{repo}/resolve/main/{name}"
        self.files[path] = data
        if gated:
            self.gated.add(path)

    def gets(self, ending: str) -> list[str]:
        """The Range headers of all GETs for a path of this ending."""
        return [given for method, path, given in self.asked if method == "GET" and path.endswith(ending)]


@contextmanager
def standin() -> Iterator[StandIn]:
    """A running server; it stops with the block."""
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(self, state, body=True)

        def do_HEAD(self) -> None:
            _answer(self, state, body=False)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def _answer(handler: BaseHTTPRequestHandler, state: StandIn, body: bool) -> None:
    path = urlsplit(handler.path).path
    given = handler.headers.get("Range", "")
    state.asked.append((handler.command, path, given))
    data = state.files.get(path)
    if path in state.gated:
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        if token != MEMBER:
            return _refuse(handler, 403 if token else 401, "GatedRepo", body)
    if data is None:
        repo = path.split("/resolve/")[0]
        known = any(name.startswith(repo + "/resolve/") for name in state.files)
        hub = "/resolve/" in path
        return _refuse(handler, 404 if known or not hub else 401, ("EntryNotFound" if known else "RepoNotFound") if hub else "", body)
    start = int(given.removeprefix("bytes=").split("-")[0]) if given.startswith("bytes=") else 0
    if start >= len(data):
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(data)}")
        handler.send_header("Content-Length", "0")
        return handler.end_headers()
    handler.send_response(206 if given else 200)
    if given:
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    handler.send_header("Content-Length", str(len(data) - start))
    handler.send_header("Accept-Ranges", "bytes")
    handler.send_header("ETag", f'"{state.etags.get(path) or hashlib.sha256(data).hexdigest()}"')
    handler.send_header("X-Repo-Commit", COMMIT)
    handler.end_headers()
    if not body:
        return None
    stop = state.cut_at.pop(0) if state.cut_at and not path.startswith("/api") else len(data)
    for at in range(start, min(start + stop, len(data)), 16384):
        time.sleep(state.pause_s)
        handler.wfile.write(data[at : min(at + 16384, start + stop)])
    if start + stop < len(data):
        handler.close_connection = True
    return None


def _refuse(handler: BaseHTTPRequestHandler, code: int, error: str, body: bool) -> None:
    handler.send_response(code)
    handler.send_header("X-Error-Code", error)
    handler.send_header("Content-Length", str(len(PAGE)))
    handler.end_headers()
    if body:
        handler.wfile.write(PAGE)
