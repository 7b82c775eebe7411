"""Temporary folders of this process. Those that a killed process left are removed by the next command."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from cellbench.files import os_errors_as
from cellbench.liveness import is_alive, owner_as_file_name, owner_of_file_name, this_owner

PREFIX = "cellbench-"


class _Folder(tempfile.TemporaryDirectory[str]):
    """What cannot be removed is left: on a disk that turned read-only, the error of the work matters, not that of the removal."""

    @classmethod
    def _rmtree(cls, name: str, *_: object, **__: object) -> None:
        shutil.rmtree(name, ignore_errors=True)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder in the temporary folder of the system, removed at the end of ``with``. Its name tells whose it is.

    Raises SystemFault.
    """
    with os_errors_as(f"making a temporary folder in {tempfile.gettempdir()}"):
        return _Folder(prefix=f"{PREFIX}{owner_as_file_name(this_owner())}-")


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
