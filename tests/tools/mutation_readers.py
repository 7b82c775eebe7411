"""What ``mutation_sweep.py`` reads: for each kind of file its samples, and a function that reads damaged bytes as a command would."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

Samples = list[bytes]
Reader = Callable[[bytes], object]
IMAGE = np.random.default_rng(3).integers(0, 256, (30, 41, 3), dtype=np.uint8)
SQUARE = [[3.0, 4.0], [20.0, 4.0], [20.0, 22.0], [3.0, 22.0]]


def _saved(array: np.ndarray, form: str, mode: str = "", **options: object) -> bytes:
    buffer, image = io.BytesIO(), Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


def _image(samples: Samples, name: str) -> Callable[[Path], tuple[Samples, Reader]]:
    """An image, as data and as a mask."""

    def made(folder: Path) -> tuple[Samples, Reader]:
        from cellbench.data.io.images import labels_to_classes, read_image, read_image_facts, read_labels, read_pixel_size
        from cellbench.data.io.windowed import open_source

        path = folder / name

        def read(data: bytes) -> object:
            path.write_bytes(data)
            failed = None
            for reader in (
                read_image,
                read_image_facts,
                read_pixel_size,
                lambda path: labels_to_classes(read_labels(path)),
                _rows(open_source),
            ):
                try:
                    reader(path)
                except Exception as error:
                    from cellbench.errors import CellbenchError

                    if not isinstance(error, CellbenchError) or "\n" in str(error):
                        raise
                    failed = error
            if failed is not None:
                raise failed
            return None

        return samples, read

    return made


def _rows(open_source: Callable[[Path], object]) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        source = open_source(path)
        try:
            return source.rows(0, min(16, source.size_px[0]))
        finally:
            source.close()

    return read


def _tiffs() -> Samples:
    import tifffile

    found = []
    for array, options in (
        (IMAGE, {"photometric": "rgb"}),
        (IMAGE[..., 0].astype(np.uint16) * 200, {"compression": "zlib"}),
        (IMAGE[..., 0] / np.float32(255), {"tile": (16, 16)}),
        (np.stack([IMAGE[..., 0]] * 3), {"imagej": True, "metadata": {"unit": "um", "axes": "CYX"}}),
        (np.stack([IMAGE] * 2), {"photometric": "rgb", "ome": True}),
        (IMAGE, {"photometric": "rgb", "compression": "zlib", "predictor": True}),
    ):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array, **options)
        found.append(buffer.getvalue())
    return found


def _file(samples: Samples, name: str, read_path: Callable[[Path], object]) -> Callable[[Path], tuple[Samples, Reader]]:
    def made(folder: Path) -> tuple[Samples, Reader]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)

        def read(data: bytes) -> object:
            path.write_bytes(data)
            return read_path(path)

        return samples, read

    return made


def _coco(path: Path) -> object:
    from cellbench.data.annotations import count_coco_categories, read_coco

    labels = dict.fromkeys(count_coco_categories(path), 1)
    return [one.read() for one in read_coco(path, labels).images]


COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": 30, "width": 41}, {"id": 2, "file_name": "b.png", "height": 30, "width": 41}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 9, "bbox": [3, 4, 5, 6], "segmentation": [[3, 4, 20, 4, 20, 22]]},
        {"id": 2, "image_id": 2, "category_id": 2, "iscrowd": 1, "segmentation": {"size": [30, 41], "counts": [600, 30, 600]}},
        {"id": 3, "image_id": 2, "category_id": 1, "segmentation": {"size": [30, 41], "counts": "a0]1b0"}},
    ],
    "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "nucleus"}],
}


def _csv(path: Path) -> object:
    from cellbench.data.manifest import read_manifest

    for name in ("a.png", "b.png"):
        if not (path.parent / name).exists():
            Image.fromarray(IMAGE).save(path.parent / name)
    listing = read_manifest(path, path.parent)
    listing.raise_first()
    return listing.lines


def _outlines(path: Path) -> object:
    from cellbench.data.outline_files import read_tool_mask

    found = read_tool_mask(path)
    return found.paint((30, 41), {one.label: 1 for one in found.outlines}, str(path))


GEOJSON = {
    "type": "FeatureCollection",
    "features": [
        {
            "type": "Feature",
            "id": "x",
            "geometry": {"type": "Polygon", "coordinates": [[*SQUARE, SQUARE[0]]]},
            "properties": {"objectType": "detection", "classification": {"name": "cell", "color": [1, 2, 3]}},
        },
        {
            "type": "Feature",
            "geometry": {"type": "MultiPolygon", "coordinates": [[SQUARE], [SQUARE]]},
            "properties": {"objectType": "annotation"},
        },
        {
            "type": "Feature",
            "geometry": {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [1, 2]}]},
            "properties": {},
        },
    ],
}
LABELME = {
    "shapes": [
        {"label": "cell", "points": SQUARE, "shape_type": "polygon", "group_id": 1},
        {"label": "cell", "points": SQUARE[:2], "shape_type": "circle", "group_id": None},
        {"label": "cell", "points": [SQUARE[0], SQUARE[2]], "shape_type": "rectangle"},
    ],
    "imageHeight": 30,
    "imageWidth": 41,
}


def _roi(kind: int, num: int = 4, options: int = 0, subtype: int = 0) -> bytes:
    head = bytearray(64)
    head[:4], head[5], head[6] = b"Iout", 228, kind
    head[8:18] = np.array([4, 3, 22, 20, num], ">i2").tobytes()
    head[18:34] = np.array([3, 4, 17, 18], ">f4").tobytes()
    head[48:52] = np.array([subtype, options], ">i2").tobytes()
    corners = np.array([[0, 17, 17, 0], [0, 0, 18, 18]])
    return bytes(head) + corners.astype(">i2").tobytes() + corners.astype(">f4").tobytes()


def _zip(parts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _npy(value: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


def _cards(folder: Path) -> tuple[Samples, Reader]:
    """A card of any kind, as the card of every kind."""
    from cellbench.config.cards import KINDS
    from cellbench.config.registry import Registry, shipped
    from cellbench.errors import CellbenchError

    files = sorted(shipped("registry").glob("*/*.toml"))
    for kind in KINDS:
        (folder / "parts" / kind).mkdir(parents=True)

    def read(data: bytes) -> object:
        failed = None
        for kind in KINDS:
            (folder / "parts" / kind / "x.toml").write_bytes(data)
            try:
                Registry(folder / "parts").card(kind, "x")
            except CellbenchError as error:
                if "\n" in str(error):
                    raise
                failed = error
        if failed is not None:
            raise failed
        return None

    return [path.read_bytes() for path in files], read


def _experiment(path: Path) -> object:
    from cellbench.config.loading import read_experiment

    return read_experiment(str(path))


def _space(path: Path) -> object:
    from cellbench.config.loading import read_space
    from cellbench.config.registry import Registry
    from cellbench.metrics import catalog

    registry = Registry()
    return read_space(str(path), (), None, None, registry, catalog.search_objectives(registry))


def _shipped(search: bool) -> Samples:
    found = sorted((Path(__file__).resolve().parents[2] / "experiments").glob("*.toml"))
    return [data for path in found if (b"[space]" in (data := path.read_bytes())) == search]


def _safetensors(folder: Path) -> tuple[Samples, Reader]:
    from cellbench.models.backbones.weight_files import read_state

    path = folder / "weights.safetensors"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return read_state(path)

    return [(_exported(folder) / "head.safetensors").read_bytes()], read


def _exported(folder: Path) -> Path:
    """An exported folder of an untrained head."""
    from cellbench.config.registry import Registry
    from cellbench.config.run import RunSpec
    from cellbench.data.transforms.framing import Framing
    from cellbench.data.transforms.preprocessing import Preparation
    from cellbench.features.frozen_backbone import FrozenBackbone
    from cellbench.hardware import detect_hardware
    from cellbench.inference.export import write_export
    from cellbench.inference.trained_run import TrainedRun
    from cellbench.models.backbones.build import open_backbone
    from cellbench.training.model import build_model

    registry, out = Registry(), folder / "export"
    run = registry.complete(RunSpec(backbone="filter-bank", head="bilinear", tile_px=64))
    backbone = FrozenBackbone(open_backbone(registry.backbone("filter-bank"), None, False), detect_hardware("cpu", "fp32"), [1])
    model = build_model(run, registry.part(run), backbone, 2)
    trained = TrainedRun(
        name="x", run=run, classes=("background", "cell"), preparation=Preparation(framing=Framing.of(run)), weights=model.state_dict()
    )
    write_export(out, trained, registry, None, "auto")
    return out


def _export(name: str) -> Callable[[Path], tuple[Samples, Reader]]:
    """A file of an exported folder, which then segments an image."""

    def made(folder: Path) -> tuple[Samples, Reader]:
        from cellbench.inference.segmenter import Segmenter

        out = _exported(folder)

        def read(data: bytes) -> object:
            (out / name).write_bytes(data)
            return Segmenter.load(out, device="cpu").predict(IMAGE).table()

        return [(out / name).read_bytes()], read

    return made


def _artifact(name: str) -> Callable[[Path], tuple[Samples, Reader]]:
    """An artifact of a run in MLflow, for ``predict`` and for a report."""

    def made(folder: Path) -> tuple[Samples, Reader]:
        from cellbench.config.registry import Registry
        from cellbench.inference.run_lookup import open_run
        from cellbench.reporting.collect import collect_report
        from cellbench.reporting.sections import build_report
        from cellbench.tracking.schema import RunRecord

        files, registry = _run_files(folder), Registry()
        params = {"backbone": "filter-bank", "head": "bilinear", "baseline": "none", "seed": "0", "dataset": "smears"}
        tags = {"cellbench.fingerprint": "f", "model": "filter-bank · bilinear", "cellbench.tests": "other"}
        metrics = {"test/dice": 0.5, "best/val_dice": 0.5}
        parent = RunRecord(run_id="p", name="grid: x", status="finished", tags={"cellbench.kind": "grid"})
        record = RunRecord(run_id="r", name="x", status="finished", fingerprint="f", params=params, tags=tags, metrics=metrics)

        def read(data: bytes) -> object:
            here = files | {name: data}
            tracker = SimpleNamespace(
                name="x",
                stored=lambda: [record, parent],
                num_deleted=lambda: 0,
                artifact=lambda _, name: here.get(name),
                data_source=lambda _: "",
            )
            if name not in ("per_image.json", "tests.json", "about.json"):
                return open_run(tracker, record, registry)
            return build_report(collect_report([tracker]))

        return [files[name]], read

    return made


def _tags(folder: Path) -> tuple[Samples, Reader]:
    """A run's tags, params and metrics in MLflow, which a user may edit."""
    from cellbench.config.registry import Registry
    from cellbench.execution.wanted_tests import missing_tests
    from cellbench.inference.run_lookup import open_run
    from cellbench.reporting.collect import collect_report
    from cellbench.reporting.sections import build_report
    from cellbench.tracking.schema import to_record

    files, registry = _run_files(folder), Registry()
    tags = {"cellbench.fingerprint": "f", "model": "filter-bank · bilinear", "cellbench.status": "finished", "cellbench.heartbeat": "1.5"}
    tags |= {"cellbench.owner": "lab-2:71:8123.5f0c.40265", "cellbench.tests": '{"dark": "1"}', "cellbench.machine": "cpu, 1 core, bf16"}
    params = {"backbone": "filter-bank", "head": "bilinear", "baseline": "none", "seed": "0", "dataset": "smears", "fraction": "1.0"}
    whole = {"tags": tags, "params": params, "metrics": {"test/dice": 0.5, "best/val_dice": 0.5}}

    def read(data: bytes) -> object:
        try:
            tree = json.loads(data)
            parts = {name: {str(k): str(v) for k, v in tree[name].items()} for name in ("tags", "params")}
            metrics = {str(k): float(v) for k, v in tree["metrics"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None  # what MLflow cannot hold
        info = SimpleNamespace(run_id="r", run_name="x", start_time=1000, artifact_uri="")
        record = to_record(SimpleNamespace(info=info, data=SimpleNamespace(metrics=metrics, **parts)))
        tracker = SimpleNamespace(
            name="x", stored=lambda: [record], num_deleted=lambda: 0, artifact=lambda _, name: files.get(name), data_source=lambda _: ""
        )
        missing_tests(record, {"dark": "1"})
        assert record.alive in (True, False)
        open_run(tracker, record, registry)
        return build_report(collect_report([tracker]))

    return [json.dumps(whole).encode()], read


def _run_files(folder: Path) -> dict[str, bytes]:
    out = _exported(folder)
    facts = json.loads((out / "run.json").read_text())
    scores = {
        "classes": ["background", "cell"],
        "images": ["a", "b"],
        "dataset": "d",
        "num_images": {"train": 3, "val": 1, "test": 2},
        "tolerance_px": 2.0,
    }
    names = ("dice", "iou", "precision", "recall", "accuracy", "ap50", "ap50_95", "aji", "pq", "nsd", "boundary_dice")
    scores |= {name: [0.5, 0.6] for name in names}
    scores |= {"confusion": [[[90, 5], [7, 40]]] * 2, "groups": ["", ""], "separation": "connected regions", "own_metrics": []}
    scores |= {"min_area_px": [60, 60], "cells_numbered": [False, True], "num_true": [3, 4], "num_predicted": [3, 2]}
    config = 'experiment = "x"\ndataset = "smears"\n[grid]\nbackbone = ["filter-bank"]\nhead = ["bilinear"]\n[run]\ntile_px = 64\n'
    return {
        "config.toml": config.encode(),
        "per_image.json": json.dumps(scores).encode(),
        **{f"{part}.json": json.dumps(facts[part]).encode() for part in ("preparation", "separation", "calibration")},
        "head.safetensors": (out / "head.safetensors").read_bytes(),
        "about.json": json.dumps(ABOUT).encode(),
        "tests.json": json.dumps({"sets": {"other": scores}, "perturbed": {}}).encode(),
    }


ABOUT = {
    "question": "Which?",
    "comments": ["a comment"],
    "experiment": "x",
    "command": "cellbench grid",
    "machine": "cpu",
    "versions": {"torch": "2"},
    "dataset": {
        "name": "x",
        "digest": "d",
        "root": "/x",
        "classes": ["background", "cell"],
        "images": {"train": 3, "test": 2},
        "notes": ["a"],
    },
}
ARTIFACTS = (
    "about.json",
    "config.toml",
    "per_image.json",
    "preparation.json",
    "separation.json",
    "calibration.json",
    "head.safetensors",
    "tests.json",
)
READERS: dict[str, Callable[[Path], tuple[Samples, Reader]]] = {
    "png": _image(
        [_saved(IMAGE, "PNG"), _saved(IMAGE[..., 0], "PNG"), _saved(IMAGE, "PNG", "P"), _saved(IMAGE[..., 0].astype(np.uint16), "PNG")],
        "a.png",
    ),
    "jpeg": _image([_saved(IMAGE, "JPEG"), _saved(IMAGE[..., 0], "JPEG"), _saved(IMAGE, "JPEG", progressive=True)], "a.jpg"),
    "tiff": _image(_tiffs(), "a.tif"),
    "coco": _file([json.dumps(COCO).encode()], "coco.json", _coco),
    "csv": _file(
        [b"image,mask,split\na.png,b.png,train\nb.png,a.png,test\n", "image;mask\r\na.png;b.png\r\n".encode("utf-16")],
        "m/manifest.csv",
        _csv,
    ),
    "geojson": _file([json.dumps(GEOJSON).encode()], "a.geojson", _outlines),
    "labelme": _file([json.dumps(LABELME).encode()], "a.json", _outlines),
    "roi": _file([_roi(kind) for kind in (0, 1, 2, 7, 8)] + [_roi(7, options=128), _roi(7, subtype=3)], "a.roi", _outlines),
    "roi-zip": _file([_zip({"a.roi": _roi(0), "b.roi": _roi(1)})], "a.zip", _outlines),
    "seg-npy": _file(
        [_npy(IMAGE[..., 0].astype(np.uint16)), _npy({"masks": IMAGE[..., 0].astype(np.uint16), "x": [1]})], "a_seg.npy", _outlines
    ),
    "card": _cards,
    "experiment": _file(_shipped(False), "x.toml", _experiment),
    "search": _file(_shipped(True), "x.toml", _space),
    "safetensors": _safetensors,
    "run.json": _export("run.json"),
    "head": _export("head.safetensors"),
    "mlflow-tags": _tags,
    **{f"mlflow-{name}": _artifact(name) for name in ARTIFACTS},
}
WEIGHTS = {
    "run.json": 0.3,
    "head": 0.3,
    "mlflow-per_image.json": 0.3,
    "mlflow-tests.json": 0.3,
    "mlflow-tags": 0.3,
    "experiment": 0.5,
    "search": 0.5,
    "card": 0.5,
}
"""Shares of the inputs, by default 1: fewer where reading takes long."""
