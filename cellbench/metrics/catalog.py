"""Declares every metric that a run logs, once: its name, meaning, unit and better direction.

Derived from these declarations are the names in MLflow (``test_image/nsd``), the columns of the leaderboard and of MLflow's view, figure labels,
the glossary, the table of metrics in the docs, and the objectives of a search. A new metric is one :class:`Metric` in ``METRICS``.

Metrics of a user come from cards in ``metrics/`` of a registry folder (:func:`own_metrics`). A run records their declarations in its
``per_image.json`` (:func:`to_record`), so that a report needs neither the folder nor their code (:func:`from_record`). Functions here that select
metrics take such metrics as ``own`` and list them after the shipped ones.

``config`` and ``tracking`` must not import this module (see the layers in ``pyproject.toml``). So ``config.search_space`` is handed
:func:`objectives`, and ``tracking.ui_view`` is handed :func:`view_columns`, by the callers above them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cellbench.config.cards import MetricCard
from cellbench.config.registry import Registry, load
from cellbench.errors import CellbenchError, one_line

if TYPE_CHECKING:  # the command line lists metrics without importing numpy and scipy
    import numpy as np

    from cellbench.metrics.instance import InstanceScores
    from cellbench.metrics.instances import Instances

Direction = Literal["maximize", "minimize", ""]


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """One test image and its prediction: the input of a metric."""

    truth: np.ndarray
    """(H, W) uint8 class numbers; ``cellbench.metrics.pixel.IGNORE`` (255) marks pixels that must not count."""
    prediction: np.ndarray
    """(H, W) uint8 class numbers."""
    probability: np.ndarray | None
    """(H, W) uint8, 0..255: the probability of not being background; None for a method without one."""
    classes: tuple[str, ...]
    """Names of the classes, the background first."""
    true_cells: Instances
    found_cells: Instances
    pixels: Mapping[str, float]
    """The overlap scores of :func:`cellbench.metrics.pixel.per_image_scores`."""
    instances: InstanceScores


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. MLflow's names for it are ``scope/key``, one for each of its scopes."""

    key: str
    label: str
    """In headings and figures."""
    meaning: str
    """One sentence or phrase for the glossary."""
    unit: str = ""
    """Unit; empty for a share from 0 to 1 or a number without unit."""
    direction: Direction = "maximize"
    """The better direction; empty if there is none."""
    scopes: tuple[str, ...] = ("test_image",)
    """Prefixes in MLflow. ``test``: pooled over all test pixels, or a total; ``test_image``: mean over test images; ``val``: validation images, each
    epoch; ``best``: the best epoch; ``cost``, ``separation``, ``train``."""
    compute: Callable[[ScoredImage], float] | None = None
    """The score of one image; NaN if there is nothing to score. None for other metrics, and if the code is not available."""
    per_image: bool = False
    """Whether it is a score of one image; ``per_image.json`` then has a list under its key."""
    compared: bool = False
    """Whether reports compare models by it, image by image."""
    in_leaderboard: bool = False
    in_figures: bool = False
    """Whether the figures that compare models draw it."""
    searchable: bool = False
    """Whether a search may optimise or bound it."""

    @property
    def pooled(self) -> bool:
        """Whether it is also computed from the pixels of all test images together."""
        return self.per_image and "test" in self.scopes

    @property
    def names(self) -> tuple[str, ...]:
        """All its names in MLflow."""
        return tuple(f"{scope}/{self.key}" for scope in self.scopes) if self.scopes != ("",) else (self.key,)

    @property
    def objective(self) -> str:
        """Its name in ``[search]``."""
        return f"{'cost' if 'cost' in self.scopes else 'val'}/{self.key}"


def _pixel(key: str, label: str, meaning: str, **more: Any) -> Metric:
    """An overlap score from pixel counts."""
    scopes = ("test", "test_image", "test_mean", "test_<class>", *(("val",) if more.get("searchable") else ()))
    return Metric(key=key, label=label, meaning=meaning, scopes=scopes, compute=lambda image: image.pixels[key], per_image=True, **more)


def _cells(key: str, label: str, meaning: str, **more: Any) -> Metric:
    """A score of boundaries or of single cells."""
    return Metric(
        key=key,
        label=label,
        meaning=meaning,
        compute=lambda image: float(getattr(image.instances, key)),
        per_image=True,
        compared=True,
        **more,
    )


def _count(key: str, label: str, meaning: str, *more_scopes: str) -> Metric:
    return Metric(key=key, label=label, meaning=meaning, unit="cells", direction="", scopes=("test", *more_scopes))


def _cost(key: str, label: str, meaning: str, unit: str = "s", **more: Any) -> Metric:
    return Metric(key=key, label=label, meaning=meaning, unit=unit, **{"direction": "minimize", "scopes": ("cost",), **more})


def _other(scope: str, key: str, meaning: str, direction: Direction = "", unit: str = "") -> Metric:
    return Metric(key=key, label=key, meaning=meaning, unit=unit, direction=direction, scopes=(scope,))


METRICS: tuple[Metric, ...] = (
    _pixel(
        "dice", "Dice", "2 TP / (2 TP + FP + FN) of pixels; F1", compared=True, in_leaderboard=True, in_figures=True, searchable=True,
    ),
    _pixel("iou", "IoU", "TP / (TP + FP + FN) of pixels; Jaccard index", in_leaderboard=True, searchable=True),
    _pixel("precision", "precision", "TP / (TP + FP) of pixels", in_leaderboard=True),
    _pixel("recall", "recall", "TP / (TP + FN) of pixels; sensitivity", in_leaderboard=True),
    _pixel("accuracy", "accuracy", "share of the pixels that are right, one class against the rest"),
    _cells(
        "nsd", "NSD", "normalised surface distance: share of both outlines' pixels within 2 px of the other outline (Nikolov et al. 2021)",
        in_leaderboard=True, in_figures=True,
    ),
    _cells("boundary_dice", "boundary Dice", "Dice of the bands within 2 px inside each outline (after Cheng et al. 2021)"),
    _cells(
        "ap50", "AP50", "TP / (TP + FP + FN) of cells, matched where IoU > 0.5 (Data Science Bowl 2018); of a class, over all test images",
        scopes=("test_image", "test_<class>"), in_leaderboard=True, in_figures=True,
    ),
    _cells("ap50_95", "AP50-95", "mean of the same over IoU thresholds 0.50, 0.55 … 0.95"),
    _cells("aji", "AJI", "aggregated Jaccard index of cells (Kumar et al. 2017)"),
    _cells("pq", "PQ", "panoptic quality of cells (Kirillov et al. 2019)", in_figures=True),
    _count("num_true", "cells", "cells in the truth", "test_<class>"),
    _count("num_predicted", "predicted", "predicted cells", "test_<class>"),
    _count("num_found", "found", "true cells matched by a predicted cell with IoU > 0.5"),
    _count("num_missed", "missed", "true cells that are neither found, merged nor split"),
    _count("num_split", "split", "true cells not found, in which two or more predicted cells mostly lie"),
    _count("num_merged", "merged", "true cells not found, mostly inside a predicted cell that holds another true cell"),
    _count("num_extra", "extra", "predicted cells without a match"),
    _other("test", "num_empty", "test images without a cell", unit="images"),
    _other("test", "num_empty_found", "those of them in which a cell was predicted", "minimize", "images"),
    _other("test", "calibration_error", "expected calibration error of the probability of a cell (Naeini et al. 2015)", "minimize"),
    _other("calibration", "temperature", "the logits of probabilities are divided by it, as fitted in validation (Guo et al. 2017)"),
    _other("calibration", "test_error", "test/calibration_error after that division", "minimize"),
    _other("calibration", "dice_error", "mean absolute error of the Dice that is estimated for a test image without its truth", "minimize"),
    *(
        Metric(
            key=f"{key}_empty1",
            label=f"{key}_empty1",
            meaning=f"{key}, where a class (of cells: an image without cells) in neither truth nor prediction scores 1",
            scopes=("test", "test_image") if key in ("dice", "iou") else ("test_image",),
        )
        for key in ("dice", "iou", "nsd", "boundary_dice", "ap50", "ap50_95", "aji", "pq")
    ),
    _other("test_image", "dice_low", "lower end of the 95 % interval of the mean Dice over images"),
    _other("test_image", "dice_high", "upper end of it"),
    _other("test_image", "dice_units", "images, or groups of images, that the interval resamples"),
    _other("test_image", "count_error", "predicted minus true cells, mean over images: a bias", unit="cells"),
    _other("test_image", "count_error_abs", "the same without sign, mean over images", "minimize", "cells"),
    _other("test_image", "ap50_connected", "AP50 where touching cells are not separated", "maximize"),
    _other("test_image", "count_error_abs_connected", "count_error_abs where touching cells are not separated", "minimize", "cells"),
    _other("separation", "saddle_ratio", "parameter of the watershed, tuned on validation images; 0: touching cells are not separated"),
    _other("separation", "min_parting", "parameter of flows and hv: parts of a cell are joined where directions part less"),
    _other("separation", "min_probability", "parameter of stars: the least object probability of a star"),
    _other("separation", "max_overlap", "parameter of stars: two stars that overlap more are one cell"),
    _other("separation", "min_confidence", "cells whose mean probability is lower are left out, for flows, hv and stars"),
    _other("separation", "val_ap50", "AP50 on validation images with it", "maximize"),
    Metric(
        key="loss", label="loss", meaning="the run's loss, mean over the tiles of an epoch", direction="minimize", scopes=("train", "val"), searchable=True,
    ),
    Metric(key="lr", label="learning rate", meaning="learning rate at the start of an epoch", direction="", scopes=("",)),
    _other("best", "epoch", "the epoch with the best validation score, from 0"),
    _other("best", "val_loss", "validation loss in that epoch", "minimize"),
    _other("best", "val_dice", "validation Dice in that epoch", "maximize"),
    _other("best", "val_iou", "validation IoU in that epoch", "maximize"),
    _cost("head_params", "head", "trained parameters: of the head and of unfrozen blocks", "", in_leaderboard=True, searchable=True),
    _cost("backbone_params", "backbone", "parameters of the backbone", "", searchable=True),
    _cost("train_s", "train s", "wall time of training, passes of the backbone included", in_leaderboard=True, searchable=True),
    _cost("train_cpu_s", "train CPU s", "processor time of training", searchable=True),
    _cost("head_s", "head s", "the head's part of train_s"),
    _cost("head_cpu_s", "head CPU s", "the head's part of train_cpu_s"),
    _cost("trunk_s", "backbone s", "the backbone's part of train_s, shared by the runs of a cohort"),
    _cost("trunk_cpu_s", "backbone CPU s", "the backbone's part of train_cpu_s"),
    _cost("images_per_s", "image/s", "test images per second", "1/s", direction="maximize", in_leaderboard=True),
    _cost("image_cpu_s", "CPU s/image", "processor time per test image"),
    _cost("latency_ms", "latency ms", "time for one image", "ms", searchable=True),
    _cost("peak_mib", "peak MiB", "most memory in use", "MiB"),
    _cost("features_mib", "features MiB", "size of the cached features", "MiB", searchable=True),
    _cost("train_other_load_pct", "other load", "share of the processor used by other processes while training", "%"),
    _cost("test_other_load_pct", "other load in test", "the same while testing", "%"),
)  # fmt: skip


# --- selections -------------------------------------------------------------------------------------------------------------------------


def metric(key: str, own: Iterable[Metric] = ()) -> Metric:
    """The metric of a key. Raises KeyError."""
    return {one.key: one for one in (*METRICS, *own)}[key]


def per_image(own: Iterable[Metric] = ()) -> list[Metric]:
    """Scores of single images: their keys name the lists in ``per_image.json``."""
    return [one for one in (*METRICS, *own) if one.per_image]


def compared(own: Iterable[Metric] = ()) -> list[Metric]:
    """Per-image scores by which reports compare models."""
    return [one for one in (*METRICS, *own) if one.compared]


def leaderboard(own: Iterable[Metric] = ()) -> list[Metric]:
    """Columns of the leaderboard: scores, then costs."""
    chosen = [one for one in (*METRICS, *own) if one.in_leaderboard]
    return sorted(chosen, key=lambda one: "cost" in one.scopes)


def counts() -> list[Metric]:
    """Outcomes of the cells: totals over the test images."""
    return [one for one in METRICS if one.unit == "cells" and "test" in one.scopes]


def objectives(own: Iterable[Metric] = ()) -> dict[str, Direction]:
    """What a search may optimise or bound, with the better direction: values of the best epoch on validation images, never of the test."""
    return {one.objective: one.direction for one in (*METRICS, *own) if one.searchable}


def search_objectives(registry: Registry) -> dict[str, Direction]:
    """:func:`objectives` with the user's metrics of a registry folder, whose code is not imported."""
    return objectives(from_card(registry.metric(name)) for name in registry.names("metrics"))


def view_columns(own: Iterable[Metric] = ()) -> tuple[str, ...]:
    """Names in MLflow of what its view shows: mean Dice first, by which it sorts, pooled Dice, other compared scores of the leaderboard, time."""
    scores = [f"test_image/{one.key}" for one in leaderboard(own) if one.compared]
    return (scores[0], "test/dice", *scores[1:], "cost/train_s")


def score(image: ScoredImage, own: Iterable[Metric] = ()) -> dict[str, float]:
    """Every per-image metric of an image. Raises CellbenchError where a user's metric fails."""
    out = {one.key: one.compute(image) for one in METRICS if one.compute is not None}
    for one in own:
        assert one.compute is not None
        try:
            out[one.key] = float(one.compute(image))
        except Exception as error:  # user code may raise anything
            raise CellbenchError(f"metric '{one.key}': {type(error).__name__}: {one_line(error)}") from error
        if math.isinf(out[one.key]):
            raise CellbenchError(f"metric '{one.key}' is infinite. Return NaN where there is nothing to score.")
    return out


# --- metrics of a user ------------------------------------------------------------------------------------------------------------------


def own_metrics(registry: Registry) -> tuple[Metric, ...]:
    """The metrics that the user's registry folder adds, their code imported. Raises CellbenchError."""
    taken = {one.key for one in METRICS}
    out = []
    for name in registry.names("metrics"):
        card = registry.metric(name)
        if name in taken:
            raise CellbenchError(f"{card.path}: '{name}' is a metric of cellbench already. Choose another file name.")
        out.append(from_card(card, load(card)))
    return tuple(out)


def from_card(card: MetricCard, compute: Callable[[ScoredImage], float] | None = None) -> Metric:
    return Metric(
        key=card.id,
        label=card.label or card.id,
        meaning=card.title,
        unit=card.unit,
        direction=card.direction,
        compute=compute,
        per_image=True,
        scopes=("test_image", "val") if card.searchable else ("test_image",),
        compared=True,
        in_leaderboard=card.in_leaderboard,
        in_figures=card.in_leaderboard,
        searchable=card.searchable,
    )


def to_record(own: Iterable[Metric]) -> list[dict[str, Any]]:
    """The declarations of own metrics as JSON."""
    return [{field.name: getattr(one, field.name) for field in dataclasses.fields(one) if field.name != "compute"} for one in own]


def from_record(record: Iterable[Mapping[str, Any]]) -> tuple[Metric, ...]:
    """The declarations that :func:`to_record` wrote, without code. Names that are no fields any more are left out."""
    names = {field.name for field in dataclasses.fields(Metric)}
    return tuple(
        Metric(**{name: value for name, value in one.items() if name in names} | {"scopes": tuple(one["scopes"])}) for one in record
    )
