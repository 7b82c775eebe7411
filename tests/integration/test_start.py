"""A command starts with the libraries that it needs: each of those that are ruled out here takes 0.5 to 2 s of processor time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import undrawn
from small_data import MODEL, QUESTION

from cellbench.run import main

COMPILER, FIGURES = {"torch._dynamo", "torch._inductor", "sympy"}, {"matplotlib", "seaborn"}
NEVER = {"IPython", "sklearn", "optuna", "ray", "scipy.stats"}
RULED_OUT = {
    "predict": (
        ["predict", MODEL, "smears/test/original/t0.png", "--out", "out", "--device", "cpu"],
        {*COMPILER, *FIGURES, *NEVER, "scipy.optimize", "jinja2", "shapely"},
    ),
    "a grid without anything to do": (
        ["grid", "small.toml", "--data", "smears", "--device", "cpu"],
        {"torch", *FIGURES, *NEVER, "timm", "torchvision", "skimage", "scipy.optimize"},
    ),
    "report": (["report", "small"], {*NEVER, "torch", "timm", "seaborn", "cv2"}),
    "check": (["check", "smears"], {*FIGURES, *NEVER, "torch", "timm", "mlflow", "pandas"}),
}


@pytest.mark.parametrize("name", RULED_OUT)
def test_a_command_imports_what_it_needs(there: Path, name: str) -> None:
    arguments, ruled_out = RULED_OUT[name]
    if arguments[0] == "grid":
        main(arguments)  # draws the report anew where other tests have added runs
    assert imported(arguments, ruled_out) == ""


def test_a_grid_that_trains_draws_in_other_processes_and_masks_are_scored_without_torch(small_folder: Path) -> None:
    Path("small.toml").write_text(QUESTION.replace("epochs  = 2", "epochs = 1"))
    assert imported(["grid", "small.toml", "--data", "smears", "--device", "cpu"], {*COMPILER, *FIGURES, *NEVER}) == ""
    assert imported(["score", "other", "smears/test/mask"], {*NEVER, "torch", "timm", "seaborn"}) == ""


def imported(arguments: list[str], ruled_out: set[str]) -> str:
    """Which of these modules a command imports."""
    code = f"""
import sys
sys.path.append({str(Path(undrawn.__file__).parent)!r})
from undrawn import Unseen  # in the place of the processes that draw, whose modules are not this one's
from cellbench import background
background.BackgroundCalls = Unseen
from cellbench.run import main
code = main({arguments})
print("imported:", *sorted({ruled_out} & set(sys.modules)))
sys.exit(code if code != 1 else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].removeprefix("imported:").strip()


def test_a_network_that_is_filled_from_a_file_draws_no_weights_that_import_the_compiler() -> None:
    code = """
import sys, torch
from cellbench.startup import without_compiler
with without_compiler():
    from cellbench.models.backbones.timm_vit import build
    nets = [build(name, "meta", num_classes=0) for name in ("vit_tiny_patch16_224", "tf_efficientnet_lite0")]
print(sum(one.is_meta for net in nets for one in net.state_dict().values()), *sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300  # nothing else is printed
