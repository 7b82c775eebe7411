"""Functions called in other processes, such as drawing, while this one goes on.

Not ``multiprocessing``: its processes import the caller's main module, which a script without ``if __name__ == "__main__"`` does not survive.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from cellbench.hardware import num_cores
from cellbench.startup import collect_rarely

R = TypeVar("R")

_CODE = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from cellbench.background import serve; serve()"


class BackgroundCalls:
    """Calls functions in processes of low priority, which start with the first calls and end with :meth:`close` or this process.

    ``num``: their largest number; by default a few, on a machine of more than eight cores half as many as cores, up to eight.

    They are out of reach of Ctrl-C, so that it does not break off a call that this process waits for. Where a process cannot be started, or is
    killed, the call is made here.
    """

    def __init__(self, num: int | None = None) -> None:
        cores = num_cores()
        self._num = num or min(cores, max(4, cores // 2), 8)
        self._own = threading.local()
        self._children: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(self._num, "background")

    def submit(self, function: Callable[..., R], *arguments: Any) -> Future[R]:
        """The result to come of ``function``, which another process can import, with arguments that can be pickled."""
        return self._threads.submit(self._call, function, arguments)

    @property
    def started(self) -> bool:
        """Whether there are processes, so that a call does not wait for its process to start."""
        return bool(self._children)

    def import_ahead(self, *modules: str) -> None:
        """Imports modules in every process, so that the first call does not wait for it."""
        for _ in range(self._num):
            self.submit(_import, modules)

    def close(self) -> None:
        """Waits for the calls under way, drops the others, and ends the processes."""
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            with contextlib.suppress(OSError):
                child.stdin.close()  # type: ignore[union-attr]  # and it ends
        for child in self._children:
            child.wait()
            child.stdout.close()  # type: ignore[union-attr]
        self._children = []

    def _call(self, function: Callable[..., R], arguments: tuple[Any, ...]) -> R:
        try:
            child = self._own.child if hasattr(self._own, "child") else self._start()
            _send((function, arguments), child.stdin)
            error, result = _receive(child.stdout)
        except (OSError, EOFError):
            return function(*arguments)
        if error is not None:
            raise error
        return result

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            [sys.executable, "-c", _CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._own.child = child
        self._children.append(child)
        pickle.dump(sys.path, child.stdin)  # type: ignore[arg-type]
        return child


def serve() -> None:
    """The main function of such a process: answers calls from standard input until it ends."""
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    if hasattr(os, "nice"):
        os.nice(5)
    collect_rarely()
    while True:
        try:
            function, arguments = _receive(calls)
            answer: tuple[Exception | None, Any] = (None, function(*arguments))
        except EOFError:
            return
        except Exception as error:  # raised again by the caller
            error.add_note(traceback.format_exc())
            answer = (error, None)
        try:
            _send(answer, answers)
        except BrokenPipeError:  # the caller is gone
            return


def _send(value: Any, pipe: Any) -> None:
    pickle.dump(pickle.dumps(value), pipe)  # twice: what cannot be unpickled is still read to its end
    pipe.flush()


def _receive(pipe: Any) -> Any:
    return pickle.loads(pickle.load(pipe))  # noqa: S301


def _import(modules: tuple[str, ...]) -> None:
    for module in modules:
        importlib.import_module(module)
