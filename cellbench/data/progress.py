"""Reads many files in threads with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cellbench.console import progress_bar

T = TypeVar("T")
S = TypeVar("S")


def map_files(
    function: Callable[[S], T], items: Sequence[S], description: str, *, unit: str = "image", hide_below: int = 20, threads: int = 2
) -> list[T]:
    """Returns the results in order. The first error cancels the remaining work. Fewer than ``hide_below`` items show no bar."""
    with ThreadPoolExecutor(threads) as pool:  # decoding releases the GIL
        jobs = [pool.submit(function, item) for item in items]
        try:
            return [job.result() for job in progress_bar(jobs, desc=description, unit=unit, disable=len(items) < hide_below or None)]
        finally:
            pool.shutdown(cancel_futures=True)
