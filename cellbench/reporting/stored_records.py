"""Checks what a report reads back from the artifacts of runs, each as a whole: these files may come from anybody.

``per_image.json`` and the sets in ``tests.json`` have the fields of :class:`ScoresOfImages`; runs of older versions lack some of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from cellbench.config.base import StrictModel
from cellbench.metrics import catalog
from cellbench.metrics.catalog import Metric

Count = Annotated[int, Field(ge=0, lt=2**53)]
Score = Annotated[float, Field(allow_inf_nan=False)] | None
"""None for an image without a score."""
Matrix = list[list[Count]]
R = TypeVar("R", bound=StrictModel)
_METRIC: TypeAdapter[Metric] = TypeAdapter(Metric)
_SCORES: TypeAdapter[list[Score]] = TypeAdapter(list[Score])
_COUNTS: TypeAdapter[list[Count]] = TypeAdapter(list[Count])


class SplitSizes(StrictModel):
    """Numbers of images."""

    model_config = ConfigDict(extra="ignore")

    train: Count
    val: Count
    test: Count


class ScoresOfImages(StrictModel):
    """Scores of the images of one test set: one value an image in each list."""

    model_config = ConfigDict(extra="allow")

    images: list[str] = Field(min_length=1)
    dataset: str
    classes: list[str] = Field(default_factory=list)
    unused: list[str] = Field(default_factory=list)
    num_images: SplitSizes | None = None
    num_train: Count | None = None
    fold: Count | None = None
    num_folds: Count | None = None
    pool: str = ""
    groups: list[str | None] | None = None
    appearance: list[str] = Field(default_factory=list)
    tolerance_px: float | None = None
    min_area_px: list[Count] = Field(default_factory=list)
    separation: str | None = None
    separation_saddle_ratio: float | None = None
    cut_px: float | None = None
    cells_numbered: list[bool] = Field(default_factory=list)
    confusion: list[Matrix] | None = None
    cell_confusion: list[Matrix] | None = None
    own_metrics: list[dict[str, Any]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _lists_are_of_the_images(self) -> ScoresOfImages:
        num, more = len(self.images), self.model_extra or {}
        own = [_METRIC.validate_python({**one, "scopes": tuple(one.get("scopes", ()))}) for one in self.own_metrics]
        scores = {one.key: _SCORES.validate_python(more[one.key], strict=True) for one in catalog.per_image(own) if one.key in more}
        counts = {one.key: _COUNTS.validate_python(more[one.key], strict=True) for one in catalog.counts() if one.key in more}
        if "dice" not in scores:
            raise ValueError("dice is missing")
        matrices = {name: found for name in ("confusion", "cell_confusion") if (found := getattr(self, name)) is not None}
        facts = {name: found for name in ("groups", "appearance", "min_area_px", "cells_numbered") if (found := getattr(self, name))}
        for name, values in {**scores, **counts, **matrices, **facts}.items():
            if len(values) != num:
                raise ValueError(f"{name} does not hold one score an image")
        for name, each in matrices.items():
            size = len(self.classes) or len(each[0])
            if any(len(matrix) != size or any(len(row) != size for row in matrix) for matrix in each):
                raise ValueError(f"{name} does not hold a row and a column for each class")
        if self.fold is not None and not (self.pool and self.num_folds):
            raise ValueError("a fold without its pool and the number of folds")
        if "nsd" in more and (self.tolerance_px is None or not self.min_area_px):
            raise ValueError("nsd without its tolerance and the smallest cell")
        return self


class FurtherScores(StrictModel):
    """A run's ``tests.json``: its scores on further sets, and its Dice for each image of its test set as it was perturbed."""

    model_config = ConfigDict(extra="ignore")

    sets: dict[str, ScoresOfImages] = Field(default_factory=dict)
    perturbed: dict[str, list[Score]] = Field(default_factory=dict)


class DatasetFacts(StrictModel):
    """The dataset of a grid or search."""

    model_config = ConfigDict(extra="ignore")

    name: str = ""
    digest: str = ""
    root: str = ""
    classes: list[str] = Field(default_factory=list)
    images: dict[str, int] = Field(default_factory=dict)
    """Their number by split."""
    notes: list[str] = Field(default_factory=list)


class RunRequest(StrictModel):
    """The inputs of a grid or search, ``about.json`` of its parent run. Fields are empty if they were not recorded."""

    model_config = ConfigDict(extra="ignore")

    question: str = ""
    experiment: str = ""
    """The experiment file with the command's options applied."""
    command: str = ""
    machine: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    dataset: DatasetFacts = DatasetFacts()

    @classmethod
    def from_json(cls, data: bytes | None) -> RunRequest:
        """The record; empty for no data, and for data that is no such record."""
        with contextlib.suppress(ValueError):
            if data is not None:
                return _checked(cls, data)[1]
        return cls()


class Settings(StrictModel):
    """What a report reads as a number of a run's params."""

    model_config = ConfigDict(extra="ignore", strict=False)

    seed: Annotated[str, Field(pattern="^[0-9]{1,18}$")] = "0"
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0


def odd_settings(params: Mapping[str, str]) -> str:
    """Why a run's params are not those of a run of cellbench; empty where they are."""
    try:
        Settings.model_validate(params)
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        return f"its {name} in MLflow is {params[str(name)]!r:.40}"
    return ""


def read_scores(data: bytes) -> dict[str, Any]:
    """The content of a ``per_image.json``. Raises ValueError with the reason where it is damaged."""
    return _checked(ScoresOfImages, data)[0]


def read_tests(data: bytes, num_images: int) -> dict[str, Any]:
    """The content of a ``tests.json`` of a run with so many test images, with ``sets`` and ``perturbed``. Raises ValueError where it is damaged."""
    tree, record = _checked(FurtherScores, data)
    if any(len(values) != num_images for values in record.perturbed.values()):
        raise ValueError("perturbed does not hold one score an image")
    return {"sets": tree.get("sets", {}), "perturbed": tree.get("perturbed", {})}


def _checked(record: type[R], data: bytes) -> tuple[dict[str, Any], R]:
    try:
        return json.loads(data, parse_constant=_refuse_constant), record.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"].removeprefix("Value error, ")) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no score")  # null is an image without one
