"""Claims about imports that are kept: nobody looks through them for garbage any more, and a caller's own garbage is still found."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

from cellbench import startup

NEW = """
import gc
from cellbench import startup
with startup.no_gc_during_import():
    import colorsys, xml.dom.minidom
print(gc.isenabled(), gc.get_freeze_count() > 0)
"""


class Knot:
    """Garbage that only a search finds: it holds itself."""

    def __init__(self) -> None:
        self.me = self


def test_what_imports_made_is_searched_no_more():
    told = subprocess.run([sys.executable, "-c", NEW], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["True", "True"]


def test_where_nothing_new_is_imported_a_callers_garbage_is_found():
    knot = Knot()
    found = weakref.ref(knot)
    before = gc.get_freeze_count()
    with startup.no_gc_during_import():
        pass
    del knot
    gc.collect()
    assert (found(), gc.get_freeze_count()) == (None, before)


def test_a_search_that_was_off_stays_off():
    gc.disable()
    try:
        with startup.no_gc_during_import():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
