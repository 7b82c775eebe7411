"""The options of every command, each declared once: its name, type, default and help.

The command line derives its parsers from these records (:mod:`cellbench.cli.main`) and hands a filled record to the command. The field ``dry_run``
becomes ``--dry-run``. The annotation decides how a value is read: ``bool`` is a switch, a tuple a repeatable option, ``Literal`` a choice. Base
classes hold what several commands share.
"""

# ruff: noqa: RUF009  option() and argument() are dataclasses.field with fewer words

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal


def option(text: str, default: Any = None, *, metavar: str | None = None, flag: str = "") -> Any:
    """A field that is given as ``--name VALUE``. ``text``: its help; ``flag``: another name than the field's."""
    return field(default=default, metadata={"help": text, "metavar": metavar, "flag": flag})


def argument(text: str, default: Any = MISSING, *, metavar: str | None = None) -> Any:
    """A positional argument; required if it has no default."""
    return field(default=default, metadata={"help": text, "metavar": metavar, "positional": True})


# --- what several commands share ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    device: str = option("auto, cpu, cuda, cuda:N or mps", "auto")


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(DeviceOptions):
    precision: str = option("auto, fp32 or bf16 (default: bf16 where the device has fast instructions for it)", "auto")


@dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    weights: Path | None = option("a folder of backbone weights: <backbone>.safetensors, .pth or .bin", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class RegistryOptions:
    registry: Path | None = option("a folder of your own cards; they take precedence over the shipped ones", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    wide: bool = option("print all columns of tables, however wide (default: those that fit the terminal)", False)


@dataclass(frozen=True, kw_only=True)
class SettingOptions:
    changes: tuple[str, ...] = option("change a setting for this call, like run.epochs=3; repeatable", (), flag="set", metavar="KEY=VALUE")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(ComputeOptions, WeightsOptions, RegistryOptions, SettingOptions):
    """What ``grid`` and ``search`` train on, and where."""

    data: Path | None = option("the folder of images and masks", metavar="DIR")
    unfit: bool = option("train although `check` calls the data not fit", False)
    limit: int | None = option("use at most N images of each of train, validation and test, for a quick try", metavar="N")
    memory: str = option("for decoded images and features, like 4G (default: half of the free memory)", "auto", metavar="SIZE")
    cache: str | None = option(
        "the cache folder (default: ~/.cache/cellbench); with a size like 50G, features are kept there", metavar="DIR[:SIZE]"
    )
    cache_url: str | None = option(
        "features that several machines share, like s3://bucket/folder (default: CELLBENCH_CACHE_URL)", metavar="URL"
    )
    workers: int | None = option("run N processes, each on its share of the cores (default: this process alone)", metavar="N")
    on: str | None = option("run on Ray: a new local one, or the cluster at ray://HOST:PORT", metavar="ray[://ADDRESS]")
    gpu_share: float = option("with --on: the part of a GPU that each process asks for", 1.0, metavar="X")


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(ComputeOptions, WeightsOptions, RegistryOptions):
    """A trained run, and where it computes."""

    run: str = argument(
        "best, best-by-validation, best:EXPERIMENT, a model as in the leaderboard, a run's name or id, or an exported folder", metavar="RUN"
    )
    trust: bool = option("run the Python code in an exported folder that you did not export", False)


# --- one record a command -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GridOptions(TrainingOptions, TableOptions):
    file: str = argument("an experiment file, or the name of a shipped one (default: quickstart, or own with --data)", "")
    tests: tuple[str, ...] = option(
        "a further folder of images and masks, on which every model is tested too; repeatable", (), metavar="DIR"
    )
    perturb: bool = option("also test every model on images of other stain, brightness, focus, noise, compression and scale", False)
    dry_run: bool = option("print the runs, the cohorts and an estimate of time, memory and disk; train nothing", False)

    @property
    def all_changes(self) -> tuple[str, ...]:
        """``--set``, and ``--tests`` and ``--perturb``, which are short for some."""
        tests = [f"data.tests={json.dumps(self.tests, ensure_ascii=False)}"] if self.tests else []
        return (*self.changes, *tests, *(['data.perturb=["all"]'] if self.perturb else []))


@dataclass(frozen=True, kw_only=True)
class SearchOptions(TrainingOptions):
    file: str = argument("a search file, or the name of a shipped one", "search")
    trials: int | None = option("the total number of trials, those of earlier calls included (default: as in the file)", metavar="N")
    timeout: float | None = option("start no more trials after S seconds", metavar="S")
    storage: str | None = option("the database of the study (default: OPTUNA_STORAGE, else sqlite:///mlruns/optuna.db)", metavar="URL")
    helper: int = option("", 0)
    """Number of this process among ``workers``; 0 is the first one, which starts the others. Not shown in the help."""

    @property
    def all_changes(self) -> tuple[str, ...]:
        """``--set``, and ``--trials``, which is short for one."""
        return (*self.changes, *([f"search.trials={self.trials}"] if self.trials is not None else []))


@dataclass(frozen=True, kw_only=True)
class PredictOptions(InferenceOptions):
    images: tuple[Path, ...] = argument(
        "image files, folders, and patterns in quotes; of folders and patterns the subfolders too", metavar="IMAGE"
    )
    out: Path = option("the folder of the masks, NAME.png", MISSING, metavar="DIR")
    probability: bool = option("also write NAME.probability.png, 0..255", False)
    overlay: bool = option(
        "also write NAME.overlay.png: the image with outlines, with --instances each cell in its own colour and numbered", False
    )
    geojson: bool = option("also write NAME.geojson: the outline of each cell, for QuPath", False)
    coco: bool = option("also write coco.json: the outlines of the cells of all images in DIR", False)
    instances: bool = option("also write NAME.instances.png and NAME.cells.csv, the single cells, and counts.csv for all of DIR", False)
    regions: Path | None = option(
        "with --instances: a folder of regions of interest, NAME.geojson for each image, or a file for one: a row of counts.csv for each region",
        metavar="PATH",
    )
    min_cell_px: int | None = option("smallest area of a cell in px (default: that of the training data)", metavar="N")
    um_per_px: float | None = option("with --instances: pixel size of all images in um (default: as stated in each file)", metavar="X")
    range: str | None = option(
        "intensity range of images of more than 8 bits, like 0,4095 (default: that of the training images)", metavar="BLACK,WHITE"
    )
    skip_empty: bool = option(
        "faster for slides with much empty ground: tiles without structure share the prediction of one of them", False
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(InferenceOptions):
    data: Path | None = option(
        "a folder of images and masks with the classes of the run, or of images with boxes, points or counts of cells (default: its own data set)",
        metavar="DIR",
    )
    visualize: int = option("also write error maps of the N worst images", 0, metavar="N")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(RegistryOptions):
    name: str = argument("how the tool is called in tables, like cellpose")
    masks: Path = argument(
        "a folder with a mask for each test image (PNG, TIFF, .npy, Cellpose's _seg.npy, GeoJSON, LabelMe, ImageJ ROI zips), a pattern in quotes "
        "like 'masks/*.instances.png', both with subfolders, or a COCO file",
        metavar="MASKS",
    )
    data: Path | None = option(
        "the folder of images and masks (default: where the experiment's data lay), or of images with boxes, points or counts of cells",
        metavar="DIR",
    )
    experiment: str | None = option("the name of an experiment in MLflow (default: the one with the newest finished run)", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(InferenceOptions):
    out: Path = option("a new folder", MISSING, metavar="DIR")
    onnx: bool = option("also write model.onnx: backbone and head, checked against torch", False)
    mlflow: bool = option("also write mlflow/, for `mlflow models serve -m DIR/mlflow --env-manager local`", False)
    backbone: Literal["auto", "embed", "reference"] = option("whether to copy its weights; auto: where the licence allows it", "auto")


@dataclass(frozen=True, kw_only=True)
class ReportOptions(TableOptions):
    experiments: tuple[str, ...] = argument(
        "names of experiments in MLflow (default: the one with the newest finished run)", (), metavar="EXPERIMENT"
    )
    out: Path | None = option("where to write (default: reports/EXPERIMENT)", metavar="DIR")
    margin: float = option("models whose Dice differs by less are equal for practical purposes", 0.005, metavar="X")


@dataclass(frozen=True, kw_only=True)
class ExploreOptions(DeviceOptions, WeightsOptions, RegistryOptions):
    data: Path | None = argument("the folder of images and masks (default: synthetic smears)", None, metavar="DIR")
    dataset: str = option("the dataset card (default: folder)", "", metavar="CARD")
    features: bool = option("the last feature maps of backbones, in several framings of one image, side by side", False)
    backbone: tuple[str, ...] = option("with --features; repeatable (default: those whose weights are here)", (), metavar="NAME")
    framing: tuple[str, ...] = option("tile, pad, resize or tile:0.5; repeatable (default: all three)", (), metavar="KIND[:SCALE]")
    image: str = option("the image to show (default: the first)", "", metavar="NAME")
    point: str = option("a pixel of the image: the similarity of every other place to it", "", metavar="X,Y")
    tile_px: int = option("side of a tile", 224, metavar="N")
    samples: int = option("number of images in the picture of samples, up to 6", 4, metavar="N")
    seed: int = option("of the choice of images", 0, metavar="N")
    out: Path | None = option("where to write (default: explored/NAME)", metavar="DIR")
    log: bool = option("also log pictures and statistics as a run in MLflow", False)


@dataclass(frozen=True, kw_only=True)
class UiOptions:
    port: int = option("the first port to try", 5000)


@dataclass(frozen=True, kw_only=True)
class BenchOptions(ComputeOptions, WeightsOptions):
    backbone: str = option("a backbone (default: vit-tiny-in1k where its weights are here, else vit-tiny-random)", "", metavar="NAME")
    data: Path | None = option("a folder of images and masks (default: synthetic smears)", metavar="DIR")
    out: Path | None = option("write bench.json and bench.png there", metavar="DIR")
    quick: bool = option("fewer images, epochs and repeats: under two minutes, less exact", False)
    peer: Literal["none", "eva"] = option(
        "another tool that executes the same runs, if it is installed: pip install 'kaiko-eva[vision]'", "none"
    )
    gpu: bool = option("instead: larger backbones, heads with and without CUDA graphs, and what the time of a whole grid goes to", False)
    scale: bool = option("instead: 1 to 27 runs, and up to a hundred times as many images, with memory", False)


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ComputeOptions, WeightsOptions, RegistryOptions, SettingOptions):
    data: Path = argument("the folder of images and masks, or a manifest or COCO file", metavar="DIR")
    dataset: str = option("the card that says what the masks mean, like bccd", "folder", metavar="CARD")
    experiment: str | None = option(
        "also find masks that are likely wrong, by the best models of this experiment in MLflow, each asked only for images that it was not trained on",
        flag="with",
        metavar="EXPERIMENT",
    )
    out: Path | None = option("where check.json and check.html are written (default: reports/check-NAME)", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class NextOptions(ComputeOptions, WeightsOptions, RegistryOptions):
    data: Path = argument("a folder of images without masks; in a dataset's folder, those of its images that have none", metavar="DIR")
    experiment: str | None = option("the name of an experiment in MLflow (default: the one with the newest finished run)", metavar="NAME")
    out: Path | None = option("where next.csv is written (default: reports/next-NAME)", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    cache: Path | None = option("the cache folder (default: ~/.cache/cellbench)", metavar="DIR")
    prune: bool = option("remove cached features; they are computed again when needed", False)
    older_than: float = option("with --prune: only those not used for DAYS (default: 0)", 0.0, metavar="DAYS")


@dataclass(frozen=True, kw_only=True)
class ListOptions(RegistryOptions):
    kind: str | None = argument("backbones, heads, baselines, datasets or experiments (default: all)", None)


@dataclass(frozen=True, kw_only=True)
class ShowOptions(RegistryOptions):
    name: str = argument("KIND/NAME, or NAME where only one kind has it")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(DeviceOptions, WeightsOptions, RegistryOptions, TableOptions):
    names: tuple[str, ...] = argument(
        "backbones to load, check and time, or heads to time (default: a table of all backbones)", (), metavar="NAME"
    )
    cache: Path | None = option("the cache folder (default: ~/.cache/cellbench)", metavar="DIR")
    deep: bool = option("for the table: also read large files, once, to compare their hashes", False)
    contracts: bool = option("run the conformance checks of backbones and heads: those named, those of --registry, or all", False)
    services: bool = option("check the configured services: the MLflow server, databases, the cache folder, Ray", False)
