"""Calls in other processes: results and errors come back, and neither a killed process nor a library's output loses one."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cellbench.background import BackgroundCalls


@pytest.fixture
def calls():
    pool = BackgroundCalls(1)
    yield pool
    pool.close()


def test_a_call_is_made_in_another_process_and_its_errors_come_back(calls):
    assert calls.submit(os.getpid).result(60) != os.getpid()
    with pytest.raises(ValueError, match="math domain error") as error:
        calls.submit(math.sqrt, -1).result(60)
    assert "cellbench" in error.value.__notes__[0]  # where it was raised
    assert calls.submit(math.sqrt, 4).result(60) == 2


def test_what_a_call_prints_or_cannot_read_leaves_the_next_answer_whole(calls):
    calls.submit(print, "a library's greeting").result(60)
    calls.submit(os.system, "echo from a program").result(60)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        calls.submit(_Unreadable()).result(60)
    assert calls.submit(math.sqrt, 9).result(60) == 3


class _Unreadable:
    """Something that only this process can unpickle."""

    def __reduce__(self):
        return __import__, ("no_such_module",)


def test_where_the_process_is_killed_the_call_is_made_here(calls):
    there = calls.submit(os.getpid).result(60)
    os.kill(there, signal.SIGKILL)
    assert calls.submit(os.getpid).result(60) == os.getpid()


def test_processes_end_with_the_pool_and_with_their_caller():
    pool = BackgroundCalls(1)
    there = pool.submit(os.getpid).result(60)
    pool.close()
    assert _is_gone(there)
    code = "import os; from cellbench.background import BackgroundCalls; print(BackgroundCalls(1).submit(os.getpid).result(), flush=True); os._exit(1)"
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    end = time.monotonic() + 30
    while not _is_gone(int(killed.stdout)) and time.monotonic() < end:
        time.sleep(0.05)
    assert _is_gone(int(killed.stdout))


def test_a_script_without_a_main_guard_can_use_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import math\nfrom cellbench.background import BackgroundCalls\nprint(BackgroundCalls(1).submit(math.sqrt, 4).result())\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2.0\n", done.stderr


def _is_gone(process_id: int) -> bool:
    try:  # one whose parent was killed is a zombie until its new parent asks for its end
        return psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
