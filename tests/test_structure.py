"""The house as it stands: imports point down, parts do not know each other, each outside library has one door, an import does nothing."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cellbench"

# From the ground up. A module imports from layers below its own, or beside it in its own layer; PARTS says who may look beside.
LAYERS = (
    ("words", {"errors", "escaping", "files", "imports", "source_code", "spec"}),
    (
        "facts and mathematics",
        {"registry", "space", "tiles", "framing", "plan", "losses", "metrics", "shapes", "separate", "targets", "measure"}
        | {"likeness", "crops", "placement", "audit", "significance", "scored", "stats", "ranking"},
    ),
    ("parts", {"backbones/", "heads/", "baselines/", "data/"}),
    (
        "the one harness",
        {"machine", "load", "checkpoints", "lanes", "randomness", "store", "shards", "shared"}
        | {"trunk", "features", "model", "infer", "learner", "teams", "train", "tuning", "exam"}
        | {"trained", "room", "survey", "tokens"},
    ),
    (
        "doors and what is told",
        {"track", "logged", "refusals", "outbox", "entries", "system", "views", "moved", "making"}
        | {"figures", "figures_many", "figures_tests", "figures_explore", "page"}
        | {"results", "lineup", "evidence", "leaderboard", "learning", "chapters", "colophon"}
        | {"samplers", "study", "study_figures"},
    ),
    ("a run in use", {"winners", "segmenter", "inputs", "outlines", "outputs", "exported", "onnx_file", "serving"}),
    ("what is tried out", {"estimate", "naive", "trials", "bench", "scaling", "contracts/"}),
    (
        "verbs",
        {"jobs", "recorder", "runner", "grid", "batches", "search", "sought"}
        | {"check", "orders", "workers", "services", "commands", "catalogue", "report", "doctor"}
        | {"on_ray", "ray_cohorts", "ray_helpers"}
        | {"ui", "predict", "evaluate", "export", "explore"},
    ),
    ("the command line", {"run"}),
)
# Parts are strangers, except for what they promise each other.
PARTS = {"backbones/": set(), "data/": set(), "heads/": {"backbones.base"}, "baselines/": {"backbones.base", "heads.base"}}
DOORS = {
    "mlflow": {"track.py", "entries.py", "system.py", "serving.py"},
    "optuna": {"samplers.py", "study.py", "study_figures.py"},
    "matplotlib.pyplot": {"figures.py", "figures_many.py", "figures_tests.py", "figures_explore.py", "study_figures.py"},
    "matplotlib": {"figures.py", "figures_many.py", "figures_tests.py", "figures_explore.py", "study_figures.py"}
    | {"chapters.py"},  # chapters: the word Figure in its signatures
    "seaborn": {"figures.py", "figures_many.py", "figures_tests.py"},
    "PIL": {f"data/{name}.py" for name in ("image_files", "images", "smears", "_shapes", "sources", "png_rows")}
    | {"page.py"},  # page: into HTML
    "tifffile": {"data/image_files.py", "data/sources.py"},
    "pycocotools": {"data/annotations.py"},
    "segmentation_models_pytorch": {"losses.py", "baselines/unet.py"},
    "timm": {"backbones/timm_vit.py", "backbones/timm_pyramid.py"},
    "huggingface_hub": {"backbones/fetch.py", "doctor.py"},  # doctor: whether a person is logged in
    "skimage": {"separate.py", "measure.py", "baselines/otsu.py", "data/augment.py", "data/stain.py", "outlines.py"},
    "cv2": {"crops.py"},
    "onnxruntime": {"onnx_file.py"},
    "pydantic": {"spec.py", "registry.py", "space.py"},
    "argparse": {"run.py"},
    "ray": {"on_ray.py"},
    "fsspec": {"shared.py"},
    "sqlalchemy": {"making.py", "services.py", "study.py"},
}
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py")) if "_shipped" not in path.parts}


@functools.cache
def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by full dotted name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = (ROOT / f"{inner.replace('.', '/')}.py").is_file()
                found.add(inner if is_module else str(node.module))
    return found


def ours(name: str) -> set[str]:
    """What a module imports of cellbench, without the package's name."""
    return {name.removeprefix("cellbench.") for name in imported(MODULES[name]) if name.startswith("cellbench.")}


def place(module: str) -> str:
    """``data.images`` or ``data/images.py`` lies in ``data/``, ``spec`` in ``spec``."""
    parts = module.removesuffix(".py").replace("/", ".").split(".")
    return f"{parts[0]}/" if (PACKAGE / parts[0]).is_dir() else parts[0]


def layer(module: str) -> int:
    return next((number for number, (_, members) in enumerate(LAYERS) if place(module) in members), len(LAYERS))


def test_every_module_stands_in_one_layer() -> None:
    standing = [member for _, members in LAYERS for member in members]
    assert len(standing) == len(set(standing))
    assert {place(name) for name in MODULES if name != "__init__.py"} - set(standing) == set(), "say in LAYERS where it belongs"


@pytest.mark.parametrize(("title", "members"), LAYERS, ids=[title for title, _ in LAYERS])
def test_imports_point_down(title: str, members: set[str]) -> None:
    mine = [name for name in MODULES if place(name) in members]
    assert {name: upward for name in mine if (upward := {other for other in ours(name) if layer(other) > layer(name)})} == {}


@pytest.mark.parametrize("part", PARTS)
def test_parts_do_not_know_each_other(part: str) -> None:
    for name in MODULES:
        if place(name) == part:
            strange = {other for other in ours(name) if place(other) in PARTS and place(other) != part}
            assert strange <= PARTS[part], name


def test_no_import_goes_round_in_a_circle() -> None:
    graph = {name.removesuffix(".py").replace("/", "."): ours(name) for name in MODULES}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_its_door(library: str) -> None:
    users = {name for name, path in MODULES.items() if any(f"{other}.".startswith(f"{library}.") for other in imported(path))}
    assert users <= DOORS[library]


def test_words_facts_and_the_catalogue_need_no_torch_or_files_of_images() -> None:
    light = ("errors.py", "files.py", "spec.py", "registry.py", "catalogue.py", "metrics.py", "significance.py", "stats.py", "ranking.py")
    for name in light:
        assert not {other.split(".")[0] for other in imported(MODULES[name])} & {"torch", "torchvision", "PIL", "mlflow"}, name


def test_the_harness_runs_where_mlflow_and_optuna_are_not_installed() -> None:
    code = """
import sys
sys.modules.update(mlflow=None, optuna=None, matplotlib=None, seaborn=None)
import cellbench.training.fit, cellbench.training.tiled_inference, cellbench.training.cost_estimate, cellbench.models.baselines.otsu, cellbench.data.loading
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_importing_the_command_line_imports_no_library_at_all() -> None:
    code = "import sys; before = set(sys.modules); import cellbench.run; print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert {name for name in done.stdout.split() if name not in sys.stdlib_module_names} == {"cellbench"}


def test_every_module_says_what_it_is() -> None:
    texts = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    assert [name for name, text in texts.items() if text.strip() and not ast.get_docstring(ast.parse(text))] == []


def test_the_registry_and_experiments_hold_facts_and_no_code() -> None:
    for folder in ("registry", "experiments"):
        shown = {"tour.ipynb", "README.md"} if folder == "experiments" else set()
        assert {path.suffix for path in (ROOT / folder).rglob("*") if path.is_file() and path.name not in shown} == {".toml"}
