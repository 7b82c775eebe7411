"""``search``: options and Ctrl-C of a search; the search itself is :mod:`cellbench.search.driver`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

from cellbench import startup
from cellbench.config.options import SearchOptions
from cellbench.console import say
from cellbench.execution.resources import Resources
from cellbench.features.cache_admin import parse_cache
from cellbench.search import driver
from cellbench.search.driver import StopRequest


def search(options: SearchOptions) -> int:
    """Runs a search. Returns exit code 0, 1 if a test of the best setting failed, or 130 after Ctrl-C."""
    stop = StopRequest.after(options.timeout)
    startup.set_cache(parse_cache(options.cache)[0], options.cache_url)
    startup.configure_threads(options.device)
    if options.helper:
        resources = Resources.of(options, elsewhere=False)
        with stop_at_interrupt(stop):
            driver.assist_here(options, resources, sys.stdin.buffer.read().decode(), stop)
        return 0
    plan = driver.prepare(options)
    with stop_at_interrupt(stop):
        return driver.search(plan, options, stop)


@contextlib.contextmanager
def stop_at_interrupt(stop: StopRequest) -> Iterator[None]:
    """Handles Ctrl-C: the first one stops the search and its helpers after the current batch, the second one at once."""

    def interrupted(number: int, frame: object) -> None:
        if stop.interrupted:
            raise KeyboardInterrupt
        stop.interrupted = True
        for process in stop.helpers:
            process.send_signal(signal.SIGINT)
        say("stopping after this batch; press Ctrl-C again to stop at once. Finished trials are kept either way.")

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
