"""What draws in most tests, which are about other things: a picture of a run is one pixel, a figure of a report is laid out and not rendered.

Rendering takes 3 of the 5 processor seconds of a small grid. The fixture ``pictures`` has them rendered.
"""

from __future__ import annotations

import base64
import inspect
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

    from cellbench.reporting.report_data import DrawnFigure, Figure

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")


class Undrawn:
    """In the place of BackgroundCalls."""

    started = True

    def __init__(self, num: int | None = None) -> None: ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        from cellbench.reporting.report_data import draw

        done: Future[Any] = Future()
        done.set_result(self.figure(*arguments) if function is draw else PIXEL)
        return done

    def figure(self, asked: Figure) -> DrawnFigure:
        return unrendered(asked)

    def import_ahead(self, *modules: str) -> None: ...

    def close(self) -> None: ...


class Unseen(Undrawn):
    """Does not even lay a figure out, which imports matplotlib."""

    def figure(self, asked: Figure) -> DrawnFigure:
        return blank("")


def blank(caption: str) -> DrawnFigure:
    from cellbench.reporting.report_data import DrawnFigure

    return DrawnFigure(picture=b"<svg xmlns='http://www.w3.org/2000/svg'/>", narrow=b"", png=PIXEL, caption=caption, width_px=1)


def unrendered(figure: Figure) -> DrawnFigure:
    """In the place of Figure.drawn."""
    from cellbench.reporting.plots.by_name import find_plot
    from cellbench.reporting.plots.style import get_caption

    caption = " ".join(part for part in (get_caption(figure.draw()), figure.note) if part)
    if "narrow" in inspect.signature(find_plot(figure.plot)).parameters:
        figure.draw(narrow=True)
    return blank(caption)


def leave_undrawn(patch: pytest.MonkeyPatch) -> None:
    """Has the processes that are started from now on, too, draw no picture of a run."""
    patch.setenv("PYTHONPATH", str(Path(__file__).parent / "in_processes"), prepend=os.pathsep)
