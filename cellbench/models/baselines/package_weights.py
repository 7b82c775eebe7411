"""What the baselines of other packages share: the model of a package, kept once it is loaded, and its errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cellbench.errors import WeightsUnavailable, one_line

_KEPT: dict[tuple[str, str], Any] = {}
LOCK = threading.Lock()
"""Packages keep state between calls, and images come from several threads."""


def opened(package: str, model: str, load: Callable[[str], Any], known: list[str]) -> Any:
    """The model of a package, by its own name or the path of a file or folder; loaded once a process. Raises WeightsUnavailable.

    ``known``: the package's own names. Another name would silently be the package's default.
    """
    if model not in known and not Path(model).exists():
        shown = ", ".join(known[:12])
        raise WeightsUnavailable(f"[baseline.{package}] model = {model!r} is no file, and no model of {package} ({shown}).")
    key = (package, str(Path(model).absolute()) if model not in known else model)
    if key not in _KEPT:
        try:
            _KEPT[key] = load(model)
        except Exception as error:  # a package's own download raises what its libraries raise
            where = "" if model in known else ", as a file"
            raise WeightsUnavailable(
                f"{package} has no weights '{model}' here{where} ({one_line(error)[:120]}). Fetch them where there is a network, or name a "
                f'file: [baseline.{package}] model = "PATH".'
            ) from None
    return _KEPT[key]
