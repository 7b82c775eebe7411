"""Process-wide settings, made by the command line and by worker processes; for calls from Python, only for their duration."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import os
import sys
import types
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cellbench.errors import CellbenchError
from cellbench.files import make_folder

# Measured: MLflow contacts its own telemetry host and writes an installation id at its first event unless this is set before its import.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # By default MLflow would block for four minutes when its server does not answer; we queue the calls instead.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Switches off the telemetry of libraries, which read these variables at import. The user's own settings are kept."""
M_ARENA_MAX = -8  # of glibc's malloc.h


def set_environment() -> None:
    """Sets :data:`ENVIRONMENT`, before any of these libraries is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def prepare_process() -> None:
    """Prepares the process; the command line calls it first."""
    set_environment()
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a log or terminal of ASCII, as in a container: a sign less, rather than an error at the end
        sys.stdout.reconfigure(errors="replace")
    if any(option.startswith("e") for option in sys.warnoptions):
        # PYTHONWARNINGS=error is meant for code of one's own: libraries warn of their next versions, and it is not for them to stop a grid.
        sys.warnoptions[:] = [option for option in sys.warnoptions if not option.startswith("e")]
        os.environ.pop("PYTHONWARNINGS", None)
        warnings.filters[:] = [one for one in warnings.filters if one[0] != "error"]  # type: ignore[index]
    os.environ.setdefault("MPLBACKEND", "Agg")  # Optuna draws with pyplot, which would look for a window system
    collect_rarely()


def collect_rarely() -> None:
    """Collects garbage less often than Python would, and not at exit."""
    # Importing torch and MLflow creates so many objects that garbage collection at Python's own threshold, 2,000, took a fifth of that time.
    gc.set_threshold(100_000, 20, 100)
    # At exit nothing needs to be searched for garbage: 1.5 s, with torch and MLflow loaded; 0.6 s in a process that draws.
    atexit.register(gc.freeze)


def freeze_imports() -> None:
    """Excludes the objects of imported modules from garbage collection: with torch and MLflow half a second each time."""
    global _num_frozen
    if len(sys.modules) > _num_frozen:  # otherwise only the caller's own garbage would be frozen
        _num_frozen = len(sys.modules)
        gc.freeze()


_num_frozen = 0


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Inside ``with``, torchvision, timm and segmentation_models_pytorch are imported, and optimisers take steps, without torch's compiler.

    They import ``torch._dynamo``, and with it sympy, for three functions that matter only to compiled models: 1.3 of the 1.8 seconds of
    processor time that timm takes. Nothing is compiled here. Whatever else is asked of it imports it after all.
    """
    package, utils = "torch._dynamo", "torch._dynamo.utils"
    torch: Any = sys.modules.get("torch")
    if torch is None or package in sys.modules:  # what does not even use torch needs no help
        yield
        return

    def remove() -> None:
        for name, one in stand_ins.items():
            if sys.modules.get(name) is one:
                del sys.modules[name]
        if getattr(torch, "_dynamo", None) is stand_ins[package]:
            del torch._dynamo

    def real(name: str, attribute: str) -> Any:
        if attribute.startswith("__") and (name, attribute) != (package, "__path__"):
            raise AttributeError(attribute)  # ``inspect`` asks every module for its file
        remove()
        return getattr(importlib.import_module(name), attribute)

    stand_ins: dict[str, Any] = {}
    for name in (package, utils):
        stand_ins[name] = types.ModuleType(name)
        stand_ins[name].__getattr__ = partial(real, name)
    stand_ins[package].disable = lambda function=None, *_, **__: function if function is not None else lambda one: one
    stand_ins[package].graph_break = lambda *_, **__: None
    stand_ins[utils].is_compile_supported = lambda kind: real(utils, "is_compile_supported")(kind)
    sys.modules |= stand_ins
    torch._dynamo = stand_ins[package]
    try:
        yield
    finally:
        remove()


def num_threads(device: str) -> int:
    """How many cores one torch operation uses in this process, for a device as in ``--device``.

    On a CPU that is a quarter of the cores: four threads (:class:`cellbench.parallel.WorkerPool`) keep all cores busy with any cohort, and
    more would only slow down a single run.
    """
    from cellbench.hardware import num_cores, on_cpu

    return max(1, num_cores() // 4) if on_cpu(device) else num_cores()


def configure_threads(device: str) -> None:
    """Sets :func:`num_threads` for this process. Call before :func:`cellbench.hardware.detect_hardware`."""
    import torch

    torch.set_num_threads(num_threads(device))
    limit_heaps()


def limit_heaps() -> None:
    """Limits the heaps of malloc for this process."""
    import ctypes

    # glibc gives each thread its own heap, which keeps the most memory that it ever needed. Two heaps suffice for a few large tensors.
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_ARENA_MAX, 2)


def set_cache(folder: str | os.PathLike[str] | None, url: str | None = None) -> None:
    """Sets the cache folder, and the URL of the cache that machines share, for this process and those that it starts; None changes nothing.

    Raises CellbenchError.
    """
    if folder is not None:
        os.environ["CELLBENCH_CACHE"] = str(make_folder(Path(folder).absolute()))
    if url is not None:
        if "://" not in url:
            raise CellbenchError(f"--cache-url {url}: expected a URL, as s3://bucket/folder or sftp://host/folder. --cache names a folder.")
        os.environ["CELLBENCH_CACHE_URL"] = url


# --- for calls from Python, which leave the process as it was -----------------------------------------------------------------------------


@contextlib.contextmanager
def torch_threads(num: int) -> Iterator[None]:
    """Inside ``with`` a torch operation uses ``num`` cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_for(device: str) -> contextlib.AbstractContextManager[None]:
    """:func:`torch_threads` as :func:`configure_threads` sets them, so that numbers equal those of the command line to the last bit."""
    return torch_threads(num_threads(device))


@contextlib.contextmanager
def temporary_cache(folder: str | os.PathLike[str] | None, url: str | None = None) -> Iterator[None]:
    """:func:`set_cache` inside ``with``. Raises CellbenchError."""
    with restored_environment("CELLBENCH_CACHE", "CELLBENCH_CACHE_URL"):
        set_cache(folder, url)
        yield


@contextlib.contextmanager
def restored_environment(*names: str) -> Iterator[None]:
    """Gives these variables of the environment their values back after ``with``."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
