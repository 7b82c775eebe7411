"""Sphinx configuration of the documentation. `make docs` builds it into docs/_build, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402  in this folder
from sphinx.application import Sphinx  # noqa: E402

import cellbench  # noqa: E402

project = "cellbench"
author = "the cellbench authors"
copyright = f"{author}, Apache-2.0"
release = version = cellbench.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True
# The types of other libraries: their documentation is not fetched, so that the build works offline.
nitpick_ignore_regex = [(r"py:.*", r"(np|numpy|pd|pandas|torch|nn|pathlib|collections|typing|matplotlib|pydantic|PIL|types)\b.*")]
nitpick_ignore_regex += [
    (r"py:.*", r"(Path|Tensor|Any|Callable|Iterable|Iterator|Mapping|Sequence|Figure|Literal|optional|DataFrame|ndarray)")
]

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"cellbench {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
smartquotes = False  # --on is an option, and no dash
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp"


def setup(app: Sphinx) -> None:
    """Replaces blocks like ``{generated} settings run`` by tables made from the package."""
    app.connect("source-read", _fill)


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = generate.fill(source[0])
