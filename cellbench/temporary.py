"""Temporary folders of this process. Those that a killed process left are removed by the next command."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from pathlib import Path

from cellbench.files import os_errors_as
from cellbench.liveness import is_alive, owner_as_file_name, owner_of_file_name, this_owner

PREFIX = "cellbench-"


class TemporaryFolder:
    """A folder in the temporary folder of the system, removed at the end of ``with``, or with the object. Its name tells whose it is.

    What cannot be removed is left: on a disk that turned read-only, the error of the work matters, not that of the removal. (The standard library's
    ``TemporaryDirectory`` would raise it, also with ``ignore_cleanup_errors``, if access rights cannot be changed.) Raises SystemFault.
    """

    def __init__(self) -> None:
        with os_errors_as(f"making a temporary folder in {tempfile.gettempdir()}"):
            self.name = tempfile.mkdtemp(prefix=f"{PREFIX}{owner_as_file_name(this_owner())}-")
        self.cleanup = weakref.finalize(self, shutil.rmtree, self.name, ignore_errors=True)

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *_: object) -> None:
        self.cleanup()


def remove_abandoned() -> int:
    """Removes the folders of processes that are gone; returns their number."""
    num = 0
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*@*-*"):
        owner = owner_of_file_name(path.name.removeprefix(PREFIX).rpartition("-")[0])
        with contextlib.suppress(OSError):  # of another user, or removed meanwhile
            if not is_alive(owner, path.stat().st_mtime):
                shutil.rmtree(path)
                num += 1
    return num
