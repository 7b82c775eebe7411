"""How single cells are found in a predicted class map: the parameters, the methods, and their tuning on validation images.

By default touching cells are separated by a watershed (:mod:`cellbench.metrics.distance_watershed`). Models with cell targets find cells by other
methods, ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from cellbench.metrics.cell_confidence import MIN_CONFIDENCES, ap50_by_confidence, drop_improbable
from cellbench.metrics.distance_watershed import DistanceWatershed
from cellbench.metrics.flow_basins import FlowBasins, OffsetBasins
from cellbench.metrics.instances import (
    MIN_AREA_PX,
    Instances,
    connected_instances,
    merge_parts_into_objects,
    numbered_instances,
)
from cellbench.metrics.pixel import impute_missing, nan_mean
from cellbench.metrics.star_polygons import StarPolygons


@dataclass(frozen=True, kw_only=True)
class SeparationParams:
    """How single cells are found in a class map, and in the fields that the model predicts beside it."""

    saddle_ratio: float = 0.0
    """Of the watershed, in 0..1; 0: connected regions."""
    method: str = "watershed"
    """A key of ``METHODS``."""
    settings: dict[str, float] = field(default_factory=dict, hash=False)
    """The parameters of another method than the watershed, and ``min_confidence`` (``cellbench.metrics.cell_confidence``)."""
    val_ap50: dict[str, float] = field(default_factory=dict, hash=False)
    """Result of tuning: mean AP50 over the validation images for each tried setting. Empty: not tuned."""
    num_images: int = 0
    """Number of validation images used for tuning."""
    min_area_px: int = MIN_AREA_PX
    """Minimum area of a cell, that of the reference masks used for tuning."""
    learned: bool = False
    """Whether basins are those of the boundary depth that the model predicts, not of the mask's own distances."""
    owners: tuple[int, ...] = ()
    """For each class the class of the object that it is a part of, its own for an object; empty: every class is an object."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "owners", tuple(self.owners))  # JSON has only lists

    def instances(
        self, classes: np.ndarray, fields: np.ndarray | None = None, probability: np.ndarray | None = None, min_area_px: int | None = None
    ) -> Instances:
        """The cells of a class map (H, W) uint8.

        ``fields`` (F, H, W) uint8 and ``probability`` (H, W) uint8, that of not being background, where the model predicts them;
        ``min_area_px``: another minimum area than that of the tuning.
        """
        finder = METHODS[self.method](merge_parts_into_objects(classes, self.owners), fields)
        return self._found_by(finder, probability, self.min_area_px if min_area_px is None else min_area_px)

    def _found_by(self, finder: CellFinder, probability: np.ndarray | None, min_area_px: int) -> Instances:
        setting = dict(self.setting)
        min_confidence = setting.pop("min_confidence", 0.0)
        cells = finder.instances(min_area_px, **setting)
        return drop_improbable(cells, probability, min_confidence) if min_confidence and probability is not None else cells

    def connected(self, classes: np.ndarray, min_area_px: int) -> Instances:
        """The same without separation."""
        return connected_instances(merge_parts_into_objects(classes, self.owners), min_area_px)

    def instances_and_regions(
        self, classes: np.ndarray, fields: np.ndarray | None, probability: np.ndarray | None, min_area_px: int
    ) -> tuple[Instances, Instances]:
        """:meth:`instances` and :meth:`connected`, the same object where nothing is separated."""
        finder = METHODS[self.method](merge_parts_into_objects(classes, self.owners), fields)
        cells = self._found_by(finder, probability, min_area_px)
        if not isinstance(finder, DistanceWatershed):
            return cells, self.connected(classes, min_area_px)
        return cells, finder.instances(min_area_px, saddle_ratio=0.0) if self.saddle_ratio else cells

    @property
    def setting(self) -> dict[str, float]:
        """The parameters of the method."""
        return {"saddle_ratio": self.saddle_ratio} if self.method == "watershed" else self.settings

    @property
    def val_ap50_of_setting(self) -> float | None:
        """The mean AP50 over the validation images; None if not tuned."""
        return self.val_ap50.get(setting_name(self.setting))

    @property
    def description(self) -> str:
        """For messages and MLflow tags."""
        if self.method == NUMBERS:
            return "the tool's own cell numbers"
        if self.method != "watershed":
            return ", ".join([self.method, *(f"{name} {value:g}" for name, value in self.settings.items())])
        return (
            f"watershed{' on the learned boundary depth' * self.learned}, saddle_ratio {self.saddle_ratio:g}"
            if self.saddle_ratio
            else "connected regions"
        )


def setting_name(setting: dict[str, float]) -> str:
    """The values of a method's parameters, as the key of ``SeparationParams.val_ap50``."""
    return " ".join(f"{value:g}" for value in setting.values())


class CellFinder(Protocol):
    """Finds cells in one image, prepared so that every setting is cheap."""

    SETTINGS: ClassVar[tuple[dict[str, float], ...]]
    """The values of the parameters that tuning tries; among equally good ones the first is chosen."""

    def __init__(self, classes: np.ndarray, fields: np.ndarray | None) -> None:
        """A class map (H, W) uint8, and the fields (F, H, W) uint8 that the model predicts."""

    def instances(self, min_area_px: int, *args: Any, **setting: Any) -> Instances:
        """The cells, each of at least ``min_area_px`` pixels."""


CONNECTED = SeparationParams()
"""No separation."""


NUMBERS = "numbers"
"""The method of a tool that numbers its cells itself."""


class NumberedCells:
    """The cells of a class map (H, W) by numbers that the tool gave, (3, H, W) uint8 from the lowest byte up."""

    SETTINGS: ClassVar[tuple[dict[str, float], ...]] = ({},)

    def __init__(self, classes: np.ndarray, fields: np.ndarray) -> None:
        self._classes = classes
        self._ids = sum(part.astype(np.int32) << (8 * place) for place, part in enumerate(fields))

    def instances(self, min_area_px: int) -> Instances:
        """The cells, each of at least ``min_area_px`` pixels."""
        return numbered_instances(np.asarray(self._ids), self._classes, min_area_px)


METHODS: dict[str, type[CellFinder]] = {
    "watershed": DistanceWatershed,
    "flows": FlowBasins,
    "hv": OffsetBasins,
    "stars": StarPolygons,
    NUMBERS: NumberedCells,
}
"""By the name that a cell target gives; the watershed also serves models without one."""


def tried_settings(method: str) -> list[dict[str, float]]:
    """The settings that tuning tries for a method; all but the watershed also leave out improbable cells."""
    settings = METHODS[method].SETTINGS
    if method in ("watershed", NUMBERS):
        return list(settings)
    return [{**setting, "min_confidence": value} for setting in settings for value in MIN_CONFIDENCES]


class SeparationTuner:
    """Chooses from a method's ``SETTINGS`` the one with the best AP50 over predicted class maps and their true cells.

    For other methods than the watershed also how confident a cell must be.
    """

    def __init__(self, min_area_px: int = MIN_AREA_PX, *, owners: Sequence[int] = (), method: str = "watershed") -> None:
        """``min_area_px``: used if no image is added; ``owners``: as in :class:`SeparationParams`."""
        self._found: list[list[float]] = []
        self._min_area_px, self._learned, self._owners, self._method = min_area_px, False, tuple(owners), method
        self._settings = tried_settings(method)

    def add(
        self, classes: np.ndarray, fields: np.ndarray | None, probability: np.ndarray | None, truth: Instances, min_area_px: int
    ) -> None:
        """A predicted class map (H, W) uint8, fields and probability as for :class:`SeparationParams`, and the true cells."""
        finder, self._learned = METHODS[self._method](merge_parts_into_objects(classes, self._owners), fields), fields is not None
        self._min_area_px = min_area_px
        if isinstance(finder, DistanceWatershed):
            self._found.append(finder.ap50s(truth, min_area_px))
        else:
            assert probability is not None, "a model that predicts fields predicts probabilities"
            found = (finder.instances(min_area_px, **setting) for setting in METHODS[self._method].SETTINGS)
            self._found.append([ap50 for cells in found for ap50 in ap50_by_confidence(truth, cells, probability)])

    def best(self) -> SeparationParams:
        """The setting with the highest mean AP50; the first one if no image has a true or predicted cell, which is connected regions for a watershed."""
        found = impute_missing(np.array(self._found, dtype=np.float64).reshape(-1, len(self._settings)).T)
        means: Sequence[float] = [round(nan_mean(values), 6) for values in found]
        tuned = not np.isnan(means).any()
        setting = self._settings[int(np.argmax(means)) if tuned else 0]
        own = {"saddle_ratio": setting["saddle_ratio"]} if self._method == "watershed" else {"settings": dict(setting)}
        return SeparationParams(
            method=self._method,
            **own,
            val_ap50={setting_name(one): value for one, value in zip(self._settings, means, strict=True)} if tuned else {},
            num_images=len(self._found) if tuned else 0,
            min_area_px=self._min_area_px,
            learned=self._learned,
            owners=self._owners,
        )
