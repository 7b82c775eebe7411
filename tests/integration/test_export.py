"""Exported runs: the folder, the ONNX file and the MLflow model give the same masks as the run."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import MODEL

from cellbench.config.registry import Registry
from cellbench.errors import CellbenchError
from cellbench.inference import export as export_module
from cellbench.inference import onnx
from cellbench.inference.segmenter import Segmenter
from cellbench.run import main

IMAGE = "smears/test/original/t0.png"


def export(out: Path, *arguments: str) -> int:
    return main(["export", MODEL, "--out", str(out), "--device", "cpu", *arguments])


def test_the_folder_works_without_mlflow_and_is_refused_when_damaged(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "it"
    assert export(folder) == 0
    assert export(folder) == 2  # not over what is there
    (Path("plain")).touch()  # every file may be read by whoever may read other new files
    heads = [*folder.glob("*"), *Path("mlruns").rglob("head.safetensors")]
    assert {path.stat().st_mode for path in heads if path.is_file()} == {Path("plain").stat().st_mode}
    of_run = Segmenter.load(MODEL, device="cpu")
    assert Segmenter.load(folder, device="cpu").trained.separation == of_run.trained.separation
    found = of_run.predict(IMAGE)
    np.save(tmp_path / "expected.npy", found.probability)
    code = f"""
import sys
sys.modules["mlflow"] = None
import numpy as np
from cellbench.inference.segmenter import Segmenter
found = Segmenter.load({str(folder)!r}, device="cpu").predict({str(there / IMAGE)!r})
assert (found.probability == np.load({str(tmp_path / "expected.npy")!r})).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-1000:]
    (folder / "head.safetensors").write_bytes(b"short")
    with pytest.raises(CellbenchError, match="is damaged"):
        Segmenter.load(folder)
    (folder / "run.json").unlink()
    with pytest.raises(CellbenchError, match="no complete folder"):
        Segmenter.load(folder)


def test_a_licence_that_forbids_copies_is_kept(there: Path, tmp_path: Path) -> None:
    registry = Registry()
    assert not export_module.may_embed_weights(registry.backbone("uni"))
    assert export_module.may_embed_weights(registry.backbone("vit-tiny-in1k"))
    free = {name for name in registry.names("backbones") if export_module.may_embed_weights(registry.backbone(name))}
    assert all(registry.backbone(name).license in export_module.FREE and not registry.backbone(name).gated for name in free)
    trained_run = Segmenter.load(MODEL, device="cpu").trained
    of_uni = trained_run.__class__(**{**trained_run.__dict__, "run": trained_run.run.model_copy(update={"backbone": "uni"})})
    with pytest.raises(CellbenchError, match="CC-BY-NC-ND"):
        export_module.write_export(tmp_path / "a", of_uni, registry, None, "embed")
    assert not (tmp_path / "a").exists()
    assert "named, not copied" in export_module.write_export(tmp_path / "b", of_uni, registry, None, "auto")


def test_onnx_gives_what_torch_gives(there: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    segmenter = Segmenter.load(MODEL, device="cpu", precision="fp32")
    import torch

    tiles = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = segmenter.tiles(tiles).numpy()
    assert onnx.write_onnx(tmp_path / "m.onnx", segmenter) <= onnx.TOLERANCE
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    given = tiles.permute(0, 3, 1, 2).float().div(255).numpy()
    assert np.abs(session.run(None, {"pixels": given})[0][:, 1:] - expected).max() <= 1e-3
    with pytest.raises(CellbenchError, match="no network"):
        onnx.write_onnx(tmp_path / "o.onnx", Segmenter.load("otsu · seed 0", device="cpu"))


def test_mlflow_answers_bytes_with_a_mask(there: Path, tmp_path: Path) -> None:
    import mlflow
    import pandas as pd

    assert export(tmp_path / "it", "--mlflow") == 0
    assert not list((tmp_path / "it" / "mlflow").rglob("*.pkl"))
    model = mlflow.pyfunc.load_model(str(tmp_path / "it" / "mlflow"))
    answer = model.predict(pd.DataFrame({"image": [Path(IMAGE).read_bytes()]})).to_dict("records")[0]
    found = Segmenter.load(MODEL, device="cpu").predict(IMAGE)
    assert (np.array(Image.open(io.BytesIO(base64.b64decode(answer["mask"])))) == found.mask * 255).all()
    assert (answer["height_px"], answer["width_px"]) == found.classes.shape
    assert json.dumps(answer["share"]) == json.dumps(found.share)


def test_a_filter_bank_is_exported_for_any_number_of_tiles(there: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    import torch

    from cellbench.models.backbones.build import open_backbone

    bank = open_backbone(Registry().backbone("filter-bank"), None)

    class Whole(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            (found,) = bank.maps(x, (0,))
            return found

    pixels = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = Whole()(pixels)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=1024)}}
    torch.onnx.export(Whole(), (pixels[:2],), tmp_path / "m.onnx", input_names=["x"], dynamic_shapes=shapes, dynamo=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for num in (1, 5):
        assert np.abs(session.run(None, {"x": pixels[:num].numpy()})[0] - expected[:num].numpy()).max() < 1e-3


def test_a_refused_export_leaves_nothing_and_the_advice_works(there: Path, tmp_path: Path, capsys) -> None:
    call = ["export", "otsu · seed 0", "--out", str(tmp_path / "new" / "it"), "--device", "cpu"]
    assert main([*call, "--onnx"]) == 2
    assert "Export it without --onnx" in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir())
    assert main(call) == 0
    assert Segmenter.load(str(tmp_path / "new" / "it"), device="cpu").predict(IMAGE).classes.any()


def test_what_torch_cannot_write_is_said_in_plain_words(there: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    segmenter = Segmenter.load(MODEL, device="cpu", precision="fp32")
    forward = segmenter.model.forward
    segmenter.model.forward = lambda batch: forward(batch) if float(batch.pixels.mean()) > 0 else forward(batch) * 2
    with pytest.raises(CellbenchError, match="depends on the values of the pixels") as error:
        onnx.write_onnx(tmp_path / "m.onnx", segmenter)
    assert "\x1b" not in str(error.value)
    assert "torch.export" not in str(error.value)
    assert not (tmp_path / "m.onnx").exists()


def test_a_served_model_names_the_rows_that_it_cannot_segment(there: Path) -> None:
    import pandas as pd
    from mlflow.exceptions import MlflowException

    from cellbench.inference.mlflow_model import ServedSegmenter

    served = ServedSegmenter()
    served.segmenter = Segmenter.load(MODEL, device="cpu")
    good = Path(IMAGE).read_bytes()
    with pytest.raises(
        MlflowException, match=r"3 of 4 rows .*row 1: .* row 2: 'image' is empty.* row 3: 'image' is of the type str"
    ) as error:
        served.predict(None, pd.DataFrame({"image": [good, b"no image", None, "text"]}))
    assert error.value.get_http_status_code() == 400
    assert "/tmp" not in str(error.value)
    with pytest.raises(MlflowException, match="no column 'image', only 'picture'"):
        served.predict(None, pd.DataFrame({"picture": [good]}))
    assert len(served.predict(None, pd.DataFrame({"image": [good, good]}))) == 2
