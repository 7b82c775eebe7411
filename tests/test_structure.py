"""Each outside library has one door, and an import does nothing. That imports point down is import-linter's to say (``pyproject.toml``)."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cellbench"

# Each outside library is used where it belongs, and nowhere else. A name that ends in a slash is a package of ours.
DOORS = {
    "mlflow": {"tracking/", "inference/mlflow_model.py"},
    "optuna": {"search/"},
    "matplotlib": {"reporting/plots/", "search/plots.py"},
    "seaborn": {"reporting/plots/"},
    "PIL": {"data/io/", "data/synthetic/", "reporting/render.py", "reporting/plots/example.py"},
    "tifffile": {"data/io/"},
    "pycocotools": {"data/annotations.py"},
    "segmentation_models_pytorch": {"training/losses.py", "models/baselines/unet.py", "models/heads/smp_decoder.py"},
    "timm": {"models/backbones/"},
    "huggingface_hub": {"models/backbones/download.py", "cli/doctor.py"},  # doctor: whether a person is logged in
    "onnxruntime": {"inference/onnx.py"},
    "pydantic": {"config/", "inference/records.py", "reporting/stored_records.py"},
    "pandas": {"api/", "inference/segmenter.py", "inference/mlflow_model.py"},
    "argparse": {"cli/main.py"},
    "ray": {"execution/ray_cluster.py"},
    "fsspec": {"features/remote_cache.py"},
    "sqlalchemy": {"tracking/", "search/study.py", "cli/services.py"},
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


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_its_door(library: str) -> None:
    users = {name for name, path in MODULES.items() if any(f"{other}.".startswith(f"{library}.") for other in imported(path))}
    assert {user for user in users if not user.startswith(tuple(DOORS[library]))} == set()


def test_config_metrics_and_statistics_need_no_torch_and_no_image_files() -> None:
    packages = ("config/", "metrics/", "statistics/")
    for name in (name for name in MODULES if name.startswith(packages) or name in ("errors.py", "files.py", "cli/catalog.py")):
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
