"""A run that fails, whatever its fault, fails alone and with its reason; the others end with the numbers that they have without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from experiment_files import finished_results, place
from safetensors.torch import save_file
from small_data import OWN_VIT

from cellbench.cli.main import main

HEAD = """
from cellbench.models.heads.bilinear import Bilinear

class Broken(Bilinear):
    calls = 0

    def forward(self, maps, pixels_BCHW):
        Broken.calls += 1
        {fault}
        return super().forward(maps, pixels_BCHW)
"""
FAULTS = {
    "late": "if Broken.calls > 3 and self.training: raise ValueError('a fault in training')",
    "untested": "if Broken.calls > 3 and not self.training: raise LookupError('a fault in validation of Pr\\udcfcfung.png')",
    "exits": "if self.training: raise SystemExit('usage: me')",
    "deleted": "if Broken.calls == 3: delete()",
}
DELETE = """
def delete():
    import mlflow
    client = mlflow.MlflowClient()
    ids = [one.experiment_id for one in client.search_experiments()]
    for run in client.search_runs(ids, "tags.model LIKE '%deleted%' AND tags.`cellbench.status` = 'running'"):
        client.delete_run(run.info.run_id)
"""
BASELINE = "def broken(image, num_classes):\n    raise RuntimeError('a fault of a baseline')\n"
FEW = [part for change in ("run.epochs=3", "grid.seed=[0]", "grid.backbone=['filter-bank']") for part in ("--set", change)]
CALL = ["grid", "small.toml", "--data", "smears", "--device", "cpu", *FEW]
FAULTY = [
    *CALL, "--registry", "parts", "--weights", "weights", "--set", "grid.backbone=['bad','filter-bank']",
    "--set", "grid.head=['bilinear','late','untested','exits','deleted']", "--set", "baselines=['otsu','broken']",
]  # fmt: skip


def write_parts(folder: Path) -> None:
    for kind in ("heads", "backbones", "baselines"):
        (folder / "parts" / kind).mkdir(parents=True)
    for name, fault in FAULTS.items():
        (folder / "parts" / "heads" / f"{name}.toml").write_text(f'# A fault\nbuilder = "{name}.py:Broken"\n')
        (folder / "parts" / "heads" / f"{name}.py").write_text(HEAD.format(fault=fault) + DELETE)
    (folder / "parts" / "backbones" / "bad.toml").write_text(OWN_VIT)
    (folder / "parts" / "baselines" / "broken.toml").write_text('# A fault\nbuilder = "broken.py:broken"\ntrained = false\n')
    (folder / "parts" / "baselines" / "broken.py").write_text(BASELINE)
    (folder / "weights").mkdir()
    save_file(
        {"patch_embed.proj.weight": torch.rand(192, 3, 16, 16), "patch_embed.proj.bias": torch.rand(192)},
        folder / "weights" / "bad.safetensors",
    )


def runs() -> dict[str, Any]:
    found = mlflow.search_runs(experiment_names=["small"], output_format="list", run_view_type=mlflow.entities.ViewType.ALL)
    return {run.info.run_name.removesuffix(" · seed 0"): run for run in found if "mlflow.parentRunId" in run.data.tags}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a grid without a fault."""
    with pytest.MonkeyPatch.context() as patch:
        place(tmp_path_factory.mktemp("alone"), patch)
        assert main(CALL) == 0
        return finished_results()


@pytest.mark.parametrize("workers", [[], ["--workers", "1"]], ids=["in this process", "in another process"])
def test_faults_of_single_runs_leave_the_others_and_their_numbers_as_they_are(
    workers: list[str], alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place(tmp_path, monkeypatch)
    write_parts(tmp_path)
    assert main([*FAULTY, *workers]) == 1
    printed = "".join(capsys.readouterr())
    assert "Traceback" not in printed
    assert "10 failed" in printed, printed
    found = runs()
    states = {name: run.data.tags.get("cellbench.status") for name, run in found.items() if run.info.lifecycle_stage == "active"}
    assert states == {
        **dict.fromkeys(("filter-bank · bilinear", "otsu"), "finished"),
        **dict.fromkeys(("filter-bank · late", "filter-bank · untested", "filter-bank · exits", "broken"), "failed"),
        **{f"bad · {head}": "failed" for head in ("bilinear", *FAULTS)},
    }
    reasons = {name: run.data.tags.get("cellbench.reason", "") for name, run in found.items()}
    assert reasons["filter-bank · late"].startswith("ValueError: a fault in training (late.py, line 9). error.txt of this run")
    assert reasons["filter-bank · exits"].startswith("RuntimeError: its code calls sys.exit('usage: me') (exits.py, line 9).")
    assert "Pr\\xfcfung.png" in reasons["filter-bank · untested"]
    assert reasons["broken"].startswith("RuntimeError: a fault of a baseline (broken.py, line 2).")
    assert "does not fit the network that the card describes" in reasons["bad · bilinear"]
    assert "failed filter-bank · deleted · seed 0: it was deleted in MLflow" in printed
    trace = mlflow.artifacts.load_text(f"runs:/{found['filter-bank · untested'].info.run_id}/error.txt")
    assert trace.startswith("Traceback")
    assert "a fault in validation" in trace
    for run in mlflow.search_runs(experiment_names=["small"], output_format="list"):  # leaves those that finished
        if run.data.tags.get("cellbench.status") == "failed":
            mlflow.delete_run(run.info.run_id)
    for name, (numbers, head) in finished_results().items():
        assert (numbers, head) == alone[name], name
