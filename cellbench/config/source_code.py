"""Finds the source files behind a builder: its own file, and those of the same author that it imports. Fingerprints include a hash of them.

Imports are read from the text of the files; nothing is executed. Included are modules of the builder's own package, modules beside its file, and
everything outside the folders of installed packages, such as a library under development. Other installed packages, such as torch, are excluded:
their versions are assumed to agree to rounding. Modules imported by a computed name, and data files, are not detected.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from cellbench.files import compute_sha256, text_digest

OURS = "cellbench"
"""The package's own code, which ``NUMERICS_VERSION`` represents."""
INSTALLED = ("site-packages", "dist-packages")


def digest(builder: str, folder: Path) -> str:
    """Sixteen hex digits over the source files behind ``builder``, which is ``module:object`` or, of a file in ``folder``, ``file.py:object``.

    Empty for the package's own code, and if there is no such file or module; building it then raises the error.
    """
    module = builder.partition(":")[0]
    if module.partition(".")[0] == OURS:
        return ""
    files = _closure(module, folder)
    if not files:
        return ""
    facts = [f"{name} {compute_sha256(file)}" for name, file in sorted(files.items())]
    return text_digest("\n".join(facts))


def _closure(module: str, folder: Path) -> dict[str, Path]:
    """Files by the name of their module, from the builder's on."""
    own = module.partition(".")[0]
    files: dict[str, Path] = {}
    seen: set[str] = set()
    waiting = [module]
    if module.endswith(".py"):
        file = folder / module
        if not file.is_file():
            return {}
        files[module], folder = file, file.parent
        waiting = list(_imports(file, ""))
    while waiting:
        name = waiting.pop()
        for part in _parts(name):
            if part in seen:
                continue
            seen.add(part)
            spec = _spec(part, folder)
            if spec is None or spec.origin is None or not Path(spec.origin).is_file():
                continue
            file = Path(spec.origin)
            if part.partition(".")[0] != own and set(INSTALLED) & set(file.parts):
                continue
            files[part] = file
            package = part if spec.submodule_search_locations is not None else part.rpartition(".")[0]
            waiting += _imports(file, package)
    return files


def _parts(name: str) -> Iterator[str]:
    """``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``: importing the last executes all of them. Empty for the standard library and this package."""
    parts = name.split(".")
    if parts[0] not in sys.stdlib_module_names and parts[0] != OURS:
        yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _spec(name: str, folder: Path) -> ModuleSpec | None:
    """The file of a module. Its parents are located, not imported."""
    parent, _, _ = name.rpartition(".")
    try:
        if not parent:
            return PathFinder.find_spec(name, [str(folder)]) or importlib.util.find_spec(name)
        above = _spec(parent, folder)
        places = above.submodule_search_locations if above is not None else None
        return PathFinder.find_spec(name, list(places)) if places is not None else None
    except (ImportError, ValueError, AttributeError):  # for a module that is partly imported or created by hand
        return None


def _imports(file: Path, package: str) -> Iterator[str]:
    """The names of all modules that a file may import, anywhere in it; of ``from a import b`` both ``a`` and ``a.b``."""
    if file.suffix != ".py":
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # importing it raises a better error
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*filter(None, above), *filter(None, [node.module])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
