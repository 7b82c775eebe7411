"""Sphinx configuration of the documentation. `make docs` builds it into docs/_build, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402  in this folder
from docutils.nodes import Element  # noqa: E402
from sphinx.addnodes import pending_xref  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402
from sphinx.environment import BuildEnvironment  # noqa: E402
from sphinx.ext.napoleon import Config, GoogleDocstring  # noqa: E402

import cellbench  # noqa: E402

project = "cellbench"
author = "the cellbench authors"
copyright = f"{author}, Apache-2.0"
release = version = cellbench.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [
    # Types of other libraries, whose documentation is not fetched so that the build works offline; and types of the package that are not public.
    (r"py:.*", r"(np|numpy|pd|pandas|torch|nn|os|pathlib|collections|typing|matplotlib|pydantic|PIL|types)\b.*"),
    (r"py:.*", r"(Path|Tensor|Any|Callable|Iterable|Iterator|Mapping|Sequence|Figure|Literal|optional|DataFrame|ndarray|Field|Scalar)"),
    (r"py:.*", r"(dict|list|tuple)\[\w+|cellbench\.\w+\.[\w.]+|FailedImage|InstanceScores"),
]

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"cellbench {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["style.css"]
smartquotes = False  # --on is an option, and no dash
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp"


def setup(app: Sphinx) -> None:
    """Fills in blocks like ``{generated} settings run``, and links public names by whatever path the code names them."""
    app.connect("source-read", _fill)
    app.connect("missing-reference", _public)
    app.connect("autodoc-process-docstring", _sections)


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = generate.fill(source[0])


def _public(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: Element) -> Element | None:
    name = node["reftarget"].rpartition(".")[2]
    if node.get("refdomain") != "py" or name not in cellbench.__all__:
        return None
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], f"cellbench.{name}", node, shown)


def _sections(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Args and Returns as lists. Not by the extension napoleon itself, which takes "Empty: unknown" of an attribute for its type."""
    if what in ("class", "exception", "function", "method"):
        lines[:] = GoogleDocstring(list(lines), Config(napoleon_use_rtype=False), app, what, name, thing, options).lines()
