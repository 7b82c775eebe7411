"""The command that starts MLflow's UI."""

from __future__ import annotations

import socket

from cellbench.cli.ui import free_port


def test_the_ui_takes_the_next_free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = taken.getsockname()[1]
        assert first < free_port(first) < first + 50
